//! Finding and reading vector files.

use super::Failure;
use serde_json::Value;
use std::io::Read;
use std::path::{Path, PathBuf};

const FORMAT: &str = "amd-measure-vectors/1";
const EXTENSIONS: [&str; 3] = ["json", "json.gz", "json.zst"];
/// More than a hundred times the size of the recorded set; a bound against files that unpack
/// without end.
const MAX_LEN: u64 = 256 << 20;

/// The vector files under a path, sorted. A file that is named itself is taken whatever its name.
pub(super) fn find(path: &Path) -> (Vec<PathBuf>, Vec<Failure>) {
    let (mut files, mut problems) = (Vec::new(), Vec::new());
    if path.is_dir() {
        walk(path, &mut files, &mut problems);
        files.sort();
    } else {
        files.push(path.to_owned());
    }
    (files, problems)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>, problems: &mut Vec<Failure>) {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            return problems.push(Failure {
                file: folder.to_owned(),
                vector: None,
                reason: error.to_string(),
            });
        }
    };
    for entry in entries.flatten() {
        let path = entry.path();
        // The type of the entry, not of what it links to, so that a link cannot make a cycle.
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&path, files, problems);
        } else if path
            .file_name()
            .and_then(|n| n.to_str())
            .is_some_and(|name| EXTENSIONS.iter().any(|e| name.ends_with(&format!(".{e}"))))
        {
            files.push(path);
        }
    }
}

/// The vectors of a file. The first bytes show if it is compressed, not the name.
pub(super) fn read(path: &Path) -> Result<Vec<Value>, String> {
    let raw = read_bounded(path)?;
    let bytes = match raw.as_slice() {
        [0x1f, 0x8b, ..] => drain(flate2::read::MultiGzDecoder::new(&raw[..]), "unpacks to")?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let unpacked = ruzstd::decoding::StreamingDecoder::new(&raw[..]);
            drain(unpacked.map_err(|e| e.to_string())?, "unpacks to")?
        }
        _ => raw,
    };
    let mut document: Value = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
    match document["format"].as_str() {
        Some(FORMAT) => {}
        Some(other) => return Err(format!("format is {other:?}, expected {FORMAT:?}")),
        None => return Err(format!("no format field, expected {FORMAT:?}")),
    }
    match document["vectors"].take() {
        Value::Array(vectors) => Ok(vectors),
        _ => Err("no list of vectors".to_owned()),
    }
}

/// Reads a regular file. Others are refused unread: a pipe may never be written, a device never end.
fn read_bounded(path: &Path) -> Result<Vec<u8>, String> {
    let metadata = std::fs::metadata(path).map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("not a regular file".to_owned());
    }
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    drain(file, "has")
}

fn drain(reader: impl Read, what: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let mut limited = reader.take(MAX_LEN + 1);
    limited.read_to_end(&mut out).map_err(|e| e.to_string())?;
    if out.len() as u64 > MAX_LEN {
        return Err(format!("{what} more than {MAX_LEN:#x} bytes"));
    }
    Ok(out)
}
