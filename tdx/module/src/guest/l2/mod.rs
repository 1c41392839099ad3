//! Leaves that a partitioned TD's L1 calls, and the exits of its L2 VMs.

mod attributes;
mod control_registers;
mod enter;
mod exits;
mod interrupts;
mod invalidate;
mod to_l1;

pub(super) use control_registers::Access;
pub(crate) use enter::pending_entry_event;
