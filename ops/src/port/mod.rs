//! Ports: the parts of the machine that a back end needs.
//!
//! A [`Host`] is the real machine (`KvmHost`), a software platform (`SimHost`), or an embedder's own.
//! It creates a [`VmPort`] for each VM and, if the machine has them, offers the SEAMCALL instruction
//! and the AMD SP mailbox. A capability that a host lacks is a `None`, never a panic.

mod device;
mod held;
mod host;
mod inject;
mod memory;
mod none;
mod psp;
mod seam;
mod vm;

pub use device::{DevicePort, HostEvent, IoEvent, IoEventMatch, IrqEvent, Msi};
pub use held::{HeldFailure, HeldPort};
pub use host::{Host, Runs};
pub use inject::{Fault, FaultInjector, FaultPlan, InjectedHost};
pub use memory::PagePort;
pub use none::NoPort;
pub use psp::PspPort;
pub use seam::{SeamPort, SeamRegs};
pub use vm::{
    GuestResponse, NestedFaultAnswer, NestedFaults, Programs, SevPort, SharedMemory, TdPort, VmPort,
};
