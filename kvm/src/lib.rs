#![doc = include_str!("../README.md")]
#![forbid(unsafe_op_in_unsafe_fn)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "kvm-ops-kvm needs Linux on x86-64; elsewhere build kvm-ops without its feature `kvm`"
);

extern crate kvm_ops_core as kvm_ops;

mod capability;
mod cpuid;
mod devices;
mod error;
mod events;
mod exit;
mod held;
mod host;
mod irq;
mod kick;
mod machine;
mod msrs;
mod offer;
mod open;
mod reset;
mod run_page;
mod sev_device;
mod signal;
mod slots;
mod state;
mod sys;
mod vcpu;
mod vendor;
mod vm;

pub use capability::Capability;
pub use host::KvmHost;
pub use kvm_ops::{IoEvent, IoEventMatch};
pub use machine::{Encryption, HostMachine};
pub use offer::{Offer, TechOffer, WhyNot};
pub use open::OpenError;
pub use sev_device::{SevDevice, SevFirmware};
pub use vcpu::KvmVcpu;
pub use vm::KvmVm;

/// The event counter that irqfds and ioeventfds are made of.
pub use vmm_sys_util::eventfd::EventFd;
