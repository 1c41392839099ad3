#![doc = include_str!("../README.md")]
#![forbid(unsafe_op_in_unsafe_fn)]

extern crate kvm_ops_core as kvm_ops;

mod gate;
mod memory;
mod moves;
mod vcpu;
mod vm;

pub use vcpu::HeldVcpu;
pub use vm::HeldVm;
