//! Reading the files that a command line or a fleet file names: bounded, and never waiting.

use std::path::Path;

use kvm_ops_machine::{Image, read_file};

use crate::failure::Failure;

/// The most bytes of a firmware image. The largest flash chips of PCs hold less.
pub(crate) const FIRMWARE: u64 = 256 << 20;

/// The most bytes of a kernel or an initial RAM disk.
pub(crate) const KERNEL: u64 = Image::MAX_BYTES;

/// Reads a regular file of at most `limit` bytes. `what` is its use, for messages: `the image`.
pub(crate) fn read(what: &str, path: &Path, limit: u64) -> Result<Vec<u8>, Failure> {
    read_file(path, limit)
        .map_err(|error| Failure::of_machine(format!("{what} cannot be used"), error))
}
