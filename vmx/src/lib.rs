#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

extern crate kvm_ops_core as kvm_ops;

mod vcpu;
mod vm;

pub use vcpu::VmxVcpu;
pub use vm::VmxVm;
