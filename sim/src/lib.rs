#![doc = include_str!("../README.md")]

extern crate kvm_ops_core as kvm_ops;

mod access;
#[cfg(any(feature = "tdx", feature = "sev"))]
mod builder;
mod frame_set;
#[cfg(any(feature = "tdx", feature = "sev"))]
#[cfg_attr(not(feature = "tdx"), allow(dead_code))] // What the software AMD SP will use.
mod frames;
mod host;
mod irq;
#[cfg(any(feature = "tdx", feature = "sev"))]
#[cfg_attr(not(feature = "tdx"), allow(dead_code))] // What the software AMD SP will use.
mod pages;
mod registers;
mod table;
#[cfg(feature = "tdx")]
mod tdx;
mod vcpu;
mod vm;

#[cfg(any(feature = "tdx", feature = "sev"))]
pub use builder::{BuildError, SimHostBuilder};
pub use host::SimHost;
#[cfg(any(feature = "tdx", feature = "sev"))]
pub use pages::SoftPages;
pub use table::TableStats;
#[cfg(feature = "tdx")]
pub use tdx::SoftSeam;
pub use vcpu::SimVcpu;
pub use vm::SimVm;
