//! MOV to CR0 and CR4, and LMSW.

use super::super::Guest;
use super::super::exits::VmExit;
use crate::l2::vmcs::{PerVm, Vmcs};

/// Result of the access.
pub(in super::super) enum Access {
    /// The register is written.
    Done,
    /// #GP.
    Fault,
    /// Not allowed: L1 decides, or takes #VE if it tried itself.
    Refused,
    /// An access that L1's own controls do not let exit.
    Unexpected,
}

const PE: u64 = 1;
const NE: u64 = 1 << 5;
const WP: u64 = 1 << 16;
const NW: u64 = 1 << 29;
const CD: u64 = 1 << 30;
const PG: u64 = 1 << 31;
/// Reserved bits of CR0 that are ignored, and those that are not.
const CR0_IGNORED: u64 = 0x1FFA_FFC0;
const CR0_RESERVED: u64 = 0xFFFF_FFFF_0000_0000;
/// Bits LMSW writes in an L2 VM, and in L1, which is always in protected mode.
const LMSW: u64 = 0xF;
const LMSW_L1: u64 = 0xE;
const CR4_VMXE: u64 = 1 << 13;
const CR4_CET: u64 = 1 << 23;
/// Bits of CR4 and the XFAM bits they need: PKE, CET, UINTR.
const CR4_BY_XFAM: [(u64, u64); 3] = [(1 << 22, 1 << 9), (CR4_CET, 3 << 11), (1 << 25, 1 << 14)];
/// Bits of CR4 and the ATTRIBUTES bits they need: PKS, LASS, KL.
const CR4_BY_ATTRIBUTE: [(u64, u64); 3] =
    [(1 << 24, 1 << 30), (1 << 27, 1 << 27), (1 << 19, 1 << 31)];
/// IA32_VMX_CR0_FIXED0, CR0_FIXED1, CR4_FIXED0, CR4_FIXED1.
const FIXED_MSRS: [u32; 4] = [0x486, 0x487, 0x488, 0x489];
const RSP: u64 = 4;

impl Guest<'_> {
    /// Exit reason 28 of the VM that runs.
    pub(in super::super) fn write_control_register(&mut self, e: &VmExit, vm: usize) -> Access {
        let q = e.qualification;
        let value = match q >> 8 & 0xF {
            RSP => self.ctx.vmcs(vm, Vmcs::Rsp),
            n => self.ctx.gprs.to_array()[n as usize],
        };
        match (q >> 4 & 3, q & 0xF) {
            (0, 0) if !self.is_owned_by_l1(vm, value, PerVm::Cr0Mask, PerVm::Cr0Shadow) => {
                self.mov_to_cr0(value, vm)
            }
            (0, 4) if !self.is_owned_by_l1(vm, value, PerVm::Cr4Mask, PerVm::Cr4Shadow) => {
                self.mov_to_cr4(value, vm)
            }
            (0, 0 | 4) => Access::Refused,
            (3, _) => self.lmsw(q >> 16 & 0xFFFF, vm),
            _ => Access::Unexpected,
        }
    }

    /// A bit that L1 keeps to itself would change. L1 itself has no L1.
    fn is_owned_by_l1(&self, vm: usize, value: u64, mask: PerVm, shadow: PerVm) -> bool {
        let (mask, shadow) = (self.ctx.per_vm(mask, vm), self.ctx.per_vm(shadow, vm));
        vm != 0 && (value ^ shadow) & mask != 0
    }

    fn mov_to_cr0(&mut self, value: u64, vm: usize) -> Access {
        let [fixed0, fixed1, ..] = FIXED_MSRS.map(|msr| self.p.cfg.native_msr(msr));
        let without_paging = value & (PE | PG) == PG;
        let breaks_cet = self.ctx.vmcs(vm, Vmcs::Cr4) & CR4_CET != 0 && value & WP == 0;
        if !value & fixed0 & !(PE | PG) != 0 || value & !fixed1 != 0 || without_paging || breaks_cet
        {
            return Access::Fault;
        }
        let clears_pe = value & PE == 0 && vm == 0;
        if clears_pe || value & NE == 0 || value & (NW | CD | CR0_RESERVED) != 0 {
            return Access::Refused;
        }
        let old = self.ctx.vmcs(vm, Vmcs::Cr0);
        let new = value & !CR0_IGNORED | old & CR0_IGNORED;
        self.ctx.set_vmcs(vm, Vmcs::Cr0, new);
        Access::Done
    }

    /// Every legal value that gets here is one that the module does not allow.
    fn mov_to_cr4(&self, value: u64, vm: usize) -> Access {
        let [_, _, fixed0, fixed1] = FIXED_MSRS.map(|msr| self.p.cfg.native_msr(msr));
        let config = self.td.config();
        let lacks = |has: u64, (bit, needs): (u64, u64)| value & bit != 0 && has & needs != needs;
        let unsupported = CR4_BY_XFAM.into_iter().any(|b| lacks(config.xfam, b))
            || CR4_BY_ATTRIBUTE
                .into_iter()
                .any(|b| lacks(config.attributes, b));
        let breaks_cet = value & CR4_CET != 0 && self.ctx.vmcs(vm, Vmcs::Cr0) & WP == 0;
        let illegal = !value & fixed0 & !CR4_VMXE != 0 || value & !fixed1 != 0;
        if illegal || unsupported || breaks_cet {
            Access::Fault
        } else {
            Access::Refused
        }
    }

    /// LMSW cannot leave protected mode.
    fn lmsw(&mut self, source: u64, vm: usize) -> Access {
        if vm == 0 {
            let old = self.ctx.vmcs(vm, Vmcs::Cr0);
            self.ctx
                .set_vmcs(vm, Vmcs::Cr0, old & !LMSW_L1 | source & LMSW_L1);
            return Access::Done;
        }
        let value = source & LMSW;
        let mask = self.ctx.per_vm(PerVm::Cr0Mask, vm);
        if (value ^ self.ctx.per_vm(PerVm::Cr0Shadow, vm)) & mask & LMSW != 0 {
            return Access::Refused;
        }
        let old = self.ctx.vmcs(vm, Vmcs::Cr0);
        let new = old & !LMSW | value | old & PE;
        self.ctx.set_vmcs(vm, Vmcs::Cr0, new);
        Access::Done
    }
}
