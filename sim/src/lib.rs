#![doc = include_str!("../README.md")]

extern crate kvm_ops_core as kvm_ops;

mod access;
#[cfg(any(feature = "tdx", feature = "sev"))]
mod builder;
mod frame_set;
#[cfg(any(feature = "tdx", feature = "sev"))]
mod frames;
mod host;
mod irq;
#[cfg(any(feature = "tdx", feature = "sev"))]
mod pages;
mod registers;
#[cfg(feature = "sev")]
mod sev;
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
#[cfg(feature = "sev")]
pub use sev::{SevSetup, SoftPsp};
pub use table::TableStats;
#[cfg(feature = "tdx")]
pub use tdx::SoftSeam;
pub use vcpu::SimVcpu;
pub use vm::SimVm;
