//! Posted interrupts for L1 that arrive while an L2 VM runs.

use super::super::Guest;
use super::super::exits::VmExit;
use crate::l2::vmcs::{PerVm, Vmcs};

/// Pin-based controls: process posted interrupts.
const PROCESS_POSTED_INTERRUPTS: u64 = 1 << 7;
/// Offset in the virtual APIC page.
const IRR: u32 = 0x200;
/// Words of 32 bits in IRR, 16 bytes apart, and in a posted-interrupt descriptor.
const IRR_WORDS: u32 = 8;
/// Position of the "outstanding notification" bit in a posted-interrupt descriptor.
const OUTSTANDING: u64 = 32;
/// Vectors up to here are exceptions.
const LAST_RESERVED_VECTOR: u64 = 30;

impl Guest<'_> {
    /// Takes over the interrupts posted for L1, if the exit is their notification. Says whether L1 can take
    /// one; `None`: the interrupt is the host's.
    pub(super) fn posted_interrupt(&mut self, e: &VmExit) -> Option<bool> {
        let enabled = self.ctx.per_vm(PerVm::PinBasedControls, 0) & PROCESS_POSTED_INTERRUPTS != 0;
        let vector = self.ctx.per_vm(PerVm::NotificationVector, 0);
        if !enabled || e.info & 0xFF != vector {
            return None;
        }
        let at = self
            .p
            .cfg
            .strip(self.ctx.per_vm(PerVm::PostedInterruptDescriptor, 0));
        self.p
            .mem
            .host_update(at + OUTSTANDING, |[flags]| [flags & !1]);
        let mut highest = 0;
        for n in 0..IRR_WORDS {
            let posted = self.p.mem.host_update(at + u64::from(n) * 4, |_| [0; 4]);
            let posted = u32::from_le_bytes(posted);
            self.ctx
                .update_vapic(IRR + n * 16, |requested| requested | posted);
            if let Some(bit) = posted.checked_ilog2() {
                highest = u64::from(n * 32 + bit);
            }
        }
        if highest <= LAST_RESERVED_VECTOR {
            highest = 0;
        }
        let status = self.ctx.vmcs(0, Vmcs::InterruptStatus);
        if highest > status & 0xFF {
            self.ctx
                .set_vmcs(0, Vmcs::InterruptStatus, status & !0xFF | highest);
        }
        Some(self.ctx.has_deliverable_interrupt())
    }
}
