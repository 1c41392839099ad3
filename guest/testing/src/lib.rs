#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod layout;
mod running;
mod sync;
pub mod tdx;

pub use layout::LayoutError;
