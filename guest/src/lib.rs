#![doc = include_str!("../README.md")]
#![no_std]
#![cfg_attr(not(feature = "instructions"), forbid(unsafe_code))]
#![deny(unsafe_code)]

mod flush;
#[cfg(all(feature = "instructions", target_arch = "x86_64"))]
#[allow(unsafe_code)]
pub mod instructions;
mod pages;
mod range;
mod record;
pub mod sev;
mod shared;
pub mod tdx;

pub use flush::Flush;
pub use range::{GpaRange, PageSize, Privacy, RangeError};
pub use record::{Record, RecordError};
pub use shared::SharedBuffer;
