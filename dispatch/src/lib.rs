// The page's examples need the software platform.
#![cfg_attr(all(feature = "sim", feature = "vmx"), doc = include_str!("../../README.md"))]
#![cfg_attr(
    not(all(feature = "sim", feature = "vmx")),
    doc = "Hold normal and confidential VMs alike."
)]
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;
extern crate self as kvm_ops;

mod config;
mod vm;

pub use kvm_ops_core::*;

pub use config::{Kind, VmConfig};
pub use vm::{SlotInfo, Vm, copy_enc_context, move_enc_context};
#[cfg(feature = "std")]
pub use vm::{copy_enc_context_between, move_enc_context_between};

cfg_if::cfg_if! {
    if #[cfg(any(feature = "vmx", feature = "tdx", feature = "svm", feature = "sev"))] {
        mod any_vm;
        mod create;
        #[cfg(feature = "std")]
        pub mod machine;

        #[cfg(any(feature = "svm", feature = "sev"))]
        pub use any_vm::{AmdVcpu, AmdVm};
        pub use any_vm::{AnyVcpu, AnyVm};
        #[cfg(any(feature = "vmx", feature = "tdx"))]
        pub use any_vm::{IntelVcpu, IntelVm};
        pub use create::create;
    } else {
        compile_error!(
            "kvm-ops needs a technology: switch on one or more of the cargo features `vmx`, `tdx`, \
             `svm` and `sev`, or `intel` (vmx + tdx) or `amd` (svm + sev)"
        );
    }
}

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
