//! x
#[cfg(feature = "conform")]
pub mod conform;
pub mod crypto;
pub mod measure;
mod wire;
