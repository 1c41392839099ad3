#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

mod flush;
mod pages;
mod range;
pub mod sev;
pub mod tdx;

pub use flush::Flush;
pub use range::{GpaRange, PageSize, Privacy, RangeError};
