#![doc = include_str!("../README.md")]
//!
//! # Where things are
//!
//! | module | what it holds |
//! |---|---|
//! | `status` | status words of the TDX module, compared by class |
//! | `retry` | what is done about each status, as a table |
//! | `seamcall` | the leaves: numbers, operands, one function each |
//! | `limits`, `params` | what the module allows; `TdParams` to TD_PARAMS |
//! | `topology` | one online processor of every package |
//! | `vm` | [`TdxVm`]: the operations of `VmOps` |
//! | `td` | the state that a VM shares with its vCPUs, and each part of its life in a file |
//! | `vcpu` | [`TdxVcpu`], and what the TD keeps of a vCPU beyond its handle |
//! | `run` | TDH.VP.ENTER and what comes back |
//! | `migrate` | the host's side of live migration between hosts |
//! | `trace` | events of the hot path, which cost a load and a compare |
//! | `proof` | makes the tokens of the teardown; beside the hooks of the mirror (`td`, `migrate`) the only `unsafe` |
//!
//! docs/tdx.md describes the behaviour, the retry table and the rules of leaks;
//! docs/tdx-failures.md lists the outcome of each failure of each call.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
extern crate kvm_ops_core as kvm_ops;
#[cfg(test)]
extern crate std;

mod limits;
pub mod migrate;
mod params;
mod proof;
pub mod retry;
mod run;
mod seamcall;
pub mod status;
mod td;
mod topology;
mod trace;
mod vcpu;
mod vm;

pub use limits::{CpuidRow, Limits};
pub use seamcall::Leaf;
pub use td::VcpuStart;
pub use vcpu::TdxVcpu;
pub use vm::TdxVm;
