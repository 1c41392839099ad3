#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod compose;
mod hashes;
mod tables;

pub use compose::{ComposeError, compose};
pub use hashes::{HASH_TABLE_LEN, KernelHashes};
pub use tables::{Ovmf, OvmfError, Region, Section, SectionKind};

/// Bytes of a page.
const PAGE_SIZE: usize = 4096;
