#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod cap;
pub mod checks;
mod commands;
mod errno;
pub mod ioctl;
pub mod irq;
pub mod irqchip;
mod layout;
pub mod memory;
pub mod psp;
pub mod run;
pub mod sev;
pub mod state;
pub mod stats;
pub mod status;
pub mod system;
pub mod tdx;
pub mod vm;

pub use errno::Errno;
pub use zerocopy::little_endian::{U16, U32, U64};
