//! Reads evidence, bounded in size and time, and writes it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;

use crate::failure::Failure;

/// Files in a directory of `attest new`.
pub(super) const REPORT: &str = "report.bin";
pub(super) const CHAIN: &str = "cert_chain.pem";
pub(super) const CRL: &str = "crl.der";
pub(super) const QUOTE: &str = "quote.bin";
pub(super) const COLLATERAL: &str = "collateral.json";

/// The size limit of a file. The largest evidence is a revocation list, of at most 1 MiB.
const LIMIT: u64 = 2 << 20;

/// Reads a regular file of at most 2 MiB. Pipes and devices are refused: reading one could block or
/// never end.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let cannot =
        |error: std::io::Error| Failure::because(format!("cannot read {}", path.display()), error);
    if !fs::metadata(path).map_err(cannot)?.is_file() {
        let what = format!("cannot read {}: it is no regular file", path.display());
        return Err(Failure::new(what).hint("write what it gives into a file first"));
    }
    let mut bytes = Vec::new();
    let mut limited = File::open(path).map_err(cannot)?.take(LIMIT + 1);
    limited.read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > LIMIT {
        let what = format!("{} has more than {LIMIT:#x} bytes", path.display());
        return Err(Failure::new(what));
    }
    Ok(bytes)
}

/// Writes a file that must not exist.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(|error| {
            let exists = error.kind() == std::io::ErrorKind::AlreadyExists;
            let failure = Failure::because(format!("cannot write {}", path.display()), error);
            if exists {
                failure.hint("name another directory, or remove the file")
            } else {
                failure
            }
        })
}
