#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod layout;
mod pieces;
mod running;
pub mod sev;
mod sync;
pub mod tdx;

pub use layout::LayoutError;
