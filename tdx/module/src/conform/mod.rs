//! Replay of recorded transcripts of a TDX module, and comparison with what this one does.
//!
//! A transcript is a text of one JSON object a line: first the platform, then what happened to it, with the
//! outputs the recorded module gave. Files may be compressed (gzip or Zstandard) and may be tar archives of
//! transcripts; folders are walked.

mod check;
mod event;
mod json;
mod platform;
mod replay;
mod summary;

pub use summary::{Coverage, FileResult, Summary};

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The first line of a transcript that this module answers differently, or that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FirstDifference {
    /// Line number, from 1.
    pub line: usize,
    /// The line.
    pub text: String,
    /// Recorded answer.
    pub expected: String,
    /// Answer of this module.
    pub got: String,
}

impl fmt::Display for FirstDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "line {}: {}", self.line, self.text)?;
        writeln!(f, "  expected {}", self.expected)?;
        write!(f, "  got      {}", self.got)
    }
}

impl std::error::Error for FirstDifference {}

/// Choices of a replay.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// Encrypt private memory. Recorded contents are flat, so keys are escrowed and contents are compared
    /// as their last writer sees them.
    pub encrypt_memory: bool,
}

/// A transcript as found: a name for reports, and its text.
struct Transcript {
    name: String,
    text: Vec<u8>,
}

/// Replays one transcript's text.
///
/// # Errors
/// The first difference.
pub fn replay_bytes(text: &[u8], options: Options) -> Result<Coverage, FirstDifference> {
    let mut coverage = Coverage::default();
    replay::replay(text, options, &mut coverage)?;
    Ok(coverage)
}

/// Replays every transcript in a file, which may be compressed and an archive.
///
/// # Errors
/// The first difference of the first transcript that differs; for a file that cannot be read, line 0.
pub fn replay_file(path: impl AsRef<Path>, options: Options) -> Result<Coverage, FirstDifference> {
    let path = path.as_ref();
    let transcripts = read_transcripts(path).map_err(|e| unreadable(path, &e))?;
    let mut coverage = Coverage::default();
    for t in transcripts {
        replay::replay(&t.text, options, &mut coverage)?;
    }
    Ok(coverage)
}

/// Replays files and folders.
pub fn replay_paths<P: AsRef<Path>>(
    paths: impl IntoIterator<Item = P>,
    options: Options,
) -> Summary {
    let mut summary = Summary::default();
    for path in paths {
        let path = path.as_ref();
        match files_under(path) {
            Ok(files) => {
                for file in files {
                    add_file(&mut summary, &file, options);
                }
            }
            Err(e) => summary.add(path.display().to_string(), Err(unreadable(path, &e))),
        }
    }
    summary
}

fn add_file(summary: &mut Summary, path: &Path, options: Options) {
    match read_transcripts(path) {
        Err(e) => summary.add(path.display().to_string(), Err(unreadable(path, &e))),
        Ok(transcripts) => {
            for t in transcripts {
                let result = replay::replay(&t.text, options, &mut summary.coverage);
                summary.add(t.name, result);
            }
        }
    }
}

fn unreadable(path: &Path, e: &std::io::Error) -> FirstDifference {
    FirstDifference {
        line: 0,
        text: path.display().to_string(),
        expected: "a readable transcript".into(),
        got: e.to_string(),
    }
}

/// The transcripts and archives under a path, sorted; a file named directly counts whatever its name.
fn files_under(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    if !std::fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files = Vec::new();
    let mut entries: Vec<PathBuf> = std::fs::read_dir(path)?
        .map(|e| e.map(|e| e.path()))
        .collect::<std::io::Result<_>>()?;
    entries.sort();
    for entry in entries {
        if entry.is_dir() {
            files.extend(files_under(&entry)?);
        } else if is_transcript_name(&entry) {
            files.push(entry);
        }
    }
    Ok(files)
}

fn is_transcript_name(path: &Path) -> bool {
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let stem = name
        .strip_suffix(".gz")
        .or(name.strip_suffix(".zst"))
        .unwrap_or(&name);
    stem.ends_with(".jsonl") || stem.ends_with(".tar")
}

fn read_transcripts(path: &Path) -> std::io::Result<Vec<Transcript>> {
    const TAR_MAGIC: core::ops::Range<usize> = 257..262;
    let bytes = decompress(read_bounded(path)?)?;
    if bytes.get(TAR_MAGIC) != Some(b"ustar".as_slice()) {
        return Ok(vec![Transcript {
            name: path.display().to_string(),
            text: bytes,
        }]);
    }
    let mut transcripts = Vec::new();
    for entry in tar::Archive::new(bytes.as_slice()).entries()? {
        let mut entry = entry?;
        let inside = entry.path()?.into_owned();
        if entry.header().entry_type().is_file() && is_transcript_name(&inside) {
            let mut text = Vec::new();
            entry.read_to_end(&mut text)?;
            let name = format!("{}:{}", path.display(), inside.display());
            transcripts.push(Transcript { name, text });
        }
    }
    Ok(transcripts)
}

/// The most bytes of a file, packed and unpacked: more than ten times the largest of the recorded set.
const MAX_LEN: u64 = 256 << 20;

/// Reads a regular file. Others are refused unread: a pipe may never be written, a device never end.
fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    drain(std::fs::File::open(path)?, "has")
}

fn drain(reader: impl Read, what: &str) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::new();
    reader.take(MAX_LEN + 1).read_to_end(&mut out)?;
    if out.len() as u64 > MAX_LEN {
        let text = format!("{what} more than {MAX_LEN:#x} bytes");
        return Err(std::io::Error::other(text));
    }
    Ok(out)
}

fn decompress(bytes: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let packed = bytes.as_slice();
    if packed.starts_with(&[0x1F, 0x8B]) {
        drain(flate2::read::MultiGzDecoder::new(packed), "unpacks to")
    } else if packed.starts_with(&[0x28, 0xB5, 0x2F, 0xFD]) {
        let unpacked = ruzstd::decoding::StreamingDecoder::new(packed)
            .map_err(|e| std::io::Error::other(e.to_string()))?;
        drain(unpacked, "unpacks to")
    } else {
        Ok(bytes)
    }
}
