//! Reads evidence, bounded in size and time, and writes it.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use crate::failure::Failure;
use crate::files;

/// Files in a directory of `attest new`.
pub(super) const REPORT: &str = "report.bin";
pub(super) const CHAIN: &str = "cert_chain.pem";
pub(super) const CRL: &str = "crl.der";
pub(super) const QUOTE: &str = "quote.bin";
pub(super) const COLLATERAL: &str = "collateral.json";
pub(super) const EVENT_LOG: &str = "event_log.bin";

/// The size limit of a file. The largest evidence is a revocation list, of at most 1 MiB.
const LIMIT: u64 = 2 << 20;

/// Reads a regular file of at most 2 MiB.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    files::read("the evidence", path, LIMIT)
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
