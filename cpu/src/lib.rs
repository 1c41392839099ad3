#![doc = include_str!("../README.md")]
#![no_std]

extern crate alloc;

mod activity;
mod alu;
mod api;
mod apic;
mod bits;
mod breakpoint;
mod build;
mod bus;
mod call_gate;
mod cpu;
mod cpuid;
mod debugger;
mod deliver;
mod descriptor;
mod exec;
mod exit;
mod extended;
mod far;
mod fast;
mod fault;
mod flags;
mod fpu;
mod host;
#[cfg(all(test, target_arch = "x86_64"))]
mod jumps;
mod mce;
mod memory;
mod msr;
mod op;
mod operand;
mod pages;
mod paging;
mod pair;
mod parallel;
mod physical;
mod registers;
mod segment;
mod select;
mod state;
mod task;
mod tlb;
mod virtual_interrupts;
mod x87;

pub use activity::Activity;
pub use api::{IoError, Registers, Untranslated};
pub use apic::{APIC_PAGE_BYTES, Apic, ApicAddress, ApicEffect};
pub use bus::{Access, Bus, FRAME, Frame, Mapping};
pub use cpu::{Cpu, Stopped};
pub use cpuid::{CpuidLeaf, CpuidTable};
pub use debugger::Debugger;
pub use exit::{Cause, Controls, Exit, PortAccess, SvmExit, VmxExit};
pub use extended::{XSAVE_BYTES, XSAVE_PKRU, XsaveError};
pub use fault::{Event, EventKind, Exception};
pub use op::Dispatch;
pub use pages::CodePages;
pub use segment::{Segment, TableRegister};
