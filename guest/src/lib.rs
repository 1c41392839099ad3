#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

mod flush;
mod range;
pub mod tdx;

pub use flush::Flush;
pub use range::{GpaRange, PageSize, Privacy, RangeError};
