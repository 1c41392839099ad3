//! `KVM_RUN` of guest code. Where a test re-tells a case of the kernel's self-tests, it names it.

mod coalesced;
mod debug;
mod exits;
mod guest;
#[path = "../common/host.rs"]
mod host;
mod interrupts;
mod memory;
mod msrs;
mod private;
mod state;
mod threads;
