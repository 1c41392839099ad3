#![doc = include_str!("../README.md")]

extern crate kvm_ops_core as kvm_ops;

mod access;
mod host;
mod irq;
mod registers;
mod table;
mod vcpu;
mod vm;

pub use host::SimHost;
pub use table::TableStats;
pub use vcpu::SimVcpu;
pub use vm::SimVm;
