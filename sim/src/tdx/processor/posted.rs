//! Interrupts that the host posts, and the virtual APIC page, which is the processor's local APIC.

use kvm_ops_cpu::Cpu;
use soft_tdx_module::VirtualApic;

use crate::irq::Wake;
use crate::tdx::HostApic;

/// Vectors of exceptions and NMI, 0 to 30, which no host can post to a TD.
const RESERVED: u64 = (1 << 31) - 1;

/// Posts what is due. Returns the instructions up to the next interrupt of the timer.
pub(super) fn until_timer(apic: Option<&HostApic>, now: u64) -> u64 {
    let Some(apic) = apic else { return u64::MAX };
    apic.post_due(now);
    apic.next()
        .map_or(u64::MAX, |at| at.saturating_sub(now).max(1))
}

/// Takes over the interrupts that were posted (SDM vol. 3, "Posted-Interrupt Processing").
pub(super) fn take(wake: &Wake, cpu: &mut Cpu) {
    let mut posted = wake.take_vectors();
    posted[0] &= !RESERVED;
    for (i, word) in (0..).zip(posted) {
        for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
            cpu.interrupt(i * 64 + bit);
        }
    }
}

/// True if the highest request is above the processor's priority (VCPU_STATE_DETAILS, "pending virtual interrupt").
pub(super) fn is_deliverable(apic: &VirtualApic) -> bool {
    let words = (0..).zip(apic.requests);
    let vectors = words.filter_map(|(n, word)| Some(n * 32 + word.checked_ilog2()?));
    let class = u32::from(apic.processor_priority >> 4);
    vectors.last().is_some_and(|highest| highest >> 4 > class)
}
