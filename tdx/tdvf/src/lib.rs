#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod compose;
mod error;
mod launch;
mod mrtd;
mod section;
mod stream;
mod table;
mod tdvf;
mod wire;

pub use compose::{ComposeError, compose};
pub use error::{SectionFault, TdvfError};
pub use launch::{FillError, Launch, Order, PageAdd, Step};
pub use mrtd::{CHUNK_SIZE, Mrtd};
pub use section::{Attributes, Section, SectionKind};
pub use tdvf::{MAX_ADDED_BYTES, MAX_GPA, Tdvf};

/// Size of a page that TDH.MEM.PAGE.ADD adds.
pub const PAGE_SIZE: usize = 4096;
