//! TDs for tests, on the software TDX module.

mod builder;
mod current;
mod exit;
mod fault;
pub mod hosts;
mod hypervisor;
mod instruction;
mod machine;
mod processor;
mod quoting;
mod td;
mod vcpu;

pub use builder::{BuildError, TestTdBuilder};
pub use current::tdcall;
pub use exit::{Exit, Reply, ViolationBy};
pub use fault::{Access, Exception, Fault, StopCause, Stopped};
pub use hosts::Host;
pub use hypervisor::Hypervisor;
pub use instruction::Instruction;
pub use kvm_ops_guest::tdx::QuoteStatus;
pub use machine::MachineError;
pub use soft_tdx_module as module;
pub use td::TestTd;
pub use vcpu::{Handled, Vcpu};
