#![doc = include_str!("../README.md")]

extern crate kvm_ops_core as kvm_ops;

mod access;
mod builder;
mod chips;
mod devices;
mod frame_set;
mod handle;
mod host;
mod irq;
mod mailbox;
mod memory;
mod msr_exits;
mod processor;
mod registers;
mod reported;
mod table;
mod vcpu;
mod vcpu_ops;
mod vm;
mod wires;

// Features choose modules; the rest of the crate is the same in every build.
#[cfg(any(feature = "tdx", feature = "sev"))]
mod frames;
#[cfg(any(feature = "tdx", feature = "sev"))]
mod pages;
#[cfg(feature = "sev")]
mod sev;
#[cfg(not(feature = "sev"))]
#[path = "without/sev.rs"]
mod sev;
#[cfg(feature = "tdx")]
mod tdx;
#[cfg(not(feature = "tdx"))]
#[path = "without/tdx.rs"]
mod tdx;

pub use builder::{BuildError, BuildStage, SimHostBuilder};
pub use chips::{IoApicState, PicState, Pin, PitChannelState, PitState, TimerParts, Took};
pub use handle::SimVcpu;
pub use host::SimHost;
pub use kvm_ops_cpu::{APIC_PAGE_BYTES, Debugger};
pub use msr_exits::{MsrAccess, MsrExits, MsrFilter, MsrLeaves, MsrRange, MsrRefusal};
pub use table::TableStats;
pub use vm::SimVm;
pub use wires::{Ended, Wires};

#[cfg(not(any(feature = "tdx", feature = "sev")))]
use kvm_ops::NoPort as SoftPages;
#[cfg(any(feature = "tdx", feature = "sev"))]
pub use pages::SoftPages;
#[cfg(feature = "sev")]
pub use sev::{SevSetup, SoftPsp};
#[cfg(feature = "tdx")]
pub use tdx::SoftSeam;
