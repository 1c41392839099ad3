//! The registers of L1's virtual APIC page that its processor keeps, for a processor model.

use crate::meta::vcpu_store::class;
use crate::meta::vmcs;
use crate::vcpu::VcpuContext;

/// The registers of the virtual APIC page that delivery uses (SDM vol. 3, 30.1). Bit n of a bitmap's word w is vector
/// 32 w + n.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VirtualApic {
    /// VTPR.
    pub task_priority: u8,
    /// VPPR.
    pub processor_priority: u8,
    /// VISR.
    pub in_service: [u32; WORDS],
    /// VIRR.
    pub requests: [u32; WORDS],
}

/// Words of a bitmap, which are 16 bytes apart in the page.
const WORDS: usize = 8;
const STEP: u32 = 16;

/// Offsets in the page.
const TPR: u32 = 0x80;
const PPR: u32 = 0xA0;
const ISR: u32 = 0x100;
const IRR: u32 = 0x200;

impl VirtualApic {
    pub(super) fn load(ctx: &VcpuContext) -> Self {
        let word = |offset: u32| {
            let element = ctx.store.get((class::VAPIC, offset / 8));
            (element >> (offset % 8 * 8)) as u32
        };
        let bitmap = |first: u32| core::array::from_fn(|n| word(first + n as u32 * STEP));
        VirtualApic {
            task_priority: word(TPR) as u8,
            processor_priority: word(PPR) as u8,
            in_service: bitmap(ISR),
            requests: bitmap(IRR),
        }
    }

    /// Writes the page, and the guest interrupt status: the highest request (RVI) and the highest interrupt in service
    /// (SVI).
    pub(super) fn store(&self, ctx: &mut VcpuContext) {
        ctx.update_vapic(TPR, |_| self.task_priority.into());
        ctx.update_vapic(PPR, |_| self.processor_priority.into());
        for (first, words) in [(ISR, &self.in_service), (IRR, &self.requests)] {
            for (offset, word) in (first..).step_by(STEP as usize).zip(words) {
                ctx.update_vapic(offset, |_| *word);
            }
        }
        let status = highest(&self.requests) | highest(&self.in_service) << 8;
        ctx.store.set_vmcs(0, vmcs::INTERRUPT_STATUS, status);
    }
}

/// The highest vector of a bitmap; 0 if it is empty.
fn highest(words: &[u32; WORDS]) -> u64 {
    let vectors = (0u32..).zip(words);
    let found = vectors.filter_map(|(n, word)| Some(n * 32 + word.checked_ilog2()?));
    found.last().unwrap_or(0).into()
}
