#![doc = include_str!("../README.md")]
#![no_std]
#![deny(unsafe_code)] // Allowed where the tokens of the teardown are minted.
#![warn(missing_docs)]

extern crate alloc;
extern crate kvm_ops_core as kvm_ops;

mod cell;
pub mod command;
mod context;
mod decommission;
mod digest;
mod gate;
pub mod kvm;
mod launch;
mod memory;
pub mod migrate;
mod regions;
pub mod rules;
mod shared;
mod sp;
mod status;
mod swap;
mod teardown;
mod trace;
mod vcpu;
mod vm;
mod vmsa;

pub use context::{GuestState, GuestStatus, Identity};
pub use regions::MAX_REGION_PAGES;
pub use status::{Failure, Instruction, Operation, Status};
pub use swap::{Suspended, SwapSlot, SwapStore};
pub use vcpu::SevVcpu;
pub use vm::SevVm;
pub use vmsa::VMSA_GPA;
