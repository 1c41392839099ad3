// The page's examples need the software platform.
#![cfg_attr(all(feature = "sim", feature = "vmx"), doc = manual::links!())]
#![cfg_attr(all(feature = "sim", feature = "vmx"), doc = include_str!("../../README.md"))]
#![cfg_attr(
    not(all(feature = "sim", feature = "vmx")),
    doc = "Hold normal and confidential VMs alike."
)]
#![no_std]

extern crate alloc;

pub mod manual;

pub use kvm_ops_core::*;

cfg_if::cfg_if! {
    if #[cfg(any(feature = "vmx", feature = "tdx", feature = "svm", feature = "sev"))] {
        mod any_vm;
        mod config;
        mod create;
        mod vm;

        #[cfg(any(feature = "svm", feature = "sev"))]
        pub use any_vm::{AmdVcpu, AmdVm};
        pub use any_vm::{AnyVcpu, AnyVm};
        #[cfg(any(feature = "vmx", feature = "tdx"))]
        pub use any_vm::{IntelVcpu, IntelVm};
        pub use config::{Kind, VmConfig};
        pub use create::{CreateError, create, create_as, create_back_end};
        pub use vm::{SlotInfo, Vm};
    } else {
        compile_error!(
            "kvm-ops needs a technology: switch on one or more of the cargo features `vmx`, `tdx`, \
             `svm` and `sev`, or `intel` (vmx + tdx) or `amd` (svm + sev)"
        );
    }
}

#[cfg(all(feature = "kvm", feature = "sim"))]
mod fleet_vm;
#[cfg(all(feature = "kvm", feature = "sim"))]
pub use fleet_vm::{FleetVcpu, FleetVm};

#[cfg(feature = "kvm")]
pub use kvm_ops_held as held;
#[cfg(feature = "kvm")]
pub use kvm_ops_kvm as kvm;
#[cfg(feature = "tdx")]
pub use kvm_ops_mmu as mmu;
#[cfg(feature = "sev")]
pub use kvm_ops_sev as sev;
#[cfg(feature = "sim")]
pub use kvm_ops_sim as sim;
#[cfg(feature = "svm")]
pub use kvm_ops_svm as svm;
#[cfg(feature = "tdx")]
pub use kvm_ops_tdx as tdx;
#[cfg(feature = "vmx")]
pub use kvm_ops_vmx as vmx;
