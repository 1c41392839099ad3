//! TDH.VP.*: vCPUs. TDH.VP.ENTER is the run loop's.

use kvm_ops::{CpuId, Hpa, SeamPort, SeamRegs};

use super::{Calls, Leaf, Outcome, regs};

impl<S: SeamPort> Calls<'_, S> {
    /// Makes `tdvpr` the first page of a new vCPU.
    pub(crate) fn vp_create(&self, tdvpr: Hpa, tdr: Hpa) -> Outcome {
        self.here(Leaf::VpCreate, regs(tdvpr.get(), tdr.get()))
            .map(drop)
    }

    /// Makes `page` the vCPU's next page.
    pub(crate) fn vp_addcx(&self, page: Hpa, tdvpr: Hpa) -> Outcome {
        self.here(Leaf::VpAddcx, regs(page.get(), tdvpr.get()))
            .map(drop)
    }

    /// Initialises the vCPU with that RCX and x2APIC id, which associates it with `cpu`.
    pub(crate) fn vp_init(&self, cpu: CpuId, tdvpr: Hpa, rcx: u64, x2apic_id: u32) -> Outcome {
        let regs = SeamRegs {
            r8: x2apic_id.into(),
            ..regs(tdvpr.get(), rcx)
        };
        self.on(cpu, Leaf::VpInit, regs).map(drop)
    }

    /// Takes the vCPU's state off `cpu`, with which it is associated.
    pub(crate) fn vp_flush(&self, cpu: CpuId, tdvpr: Hpa) -> Outcome {
        self.on(cpu, Leaf::VpFlush, regs(tdvpr.get(), 0)).map(drop)
    }

    /// Writes the bits of `mask` of a vCPU's field, on `cpu`, with which it is or becomes
    /// associated.
    pub(crate) fn vp_wr(
        &self,
        cpu: CpuId,
        tdvpr: Hpa,
        field: u64,
        value: u64,
        mask: u64,
    ) -> Outcome {
        let regs = SeamRegs {
            r8: value,
            r9: mask,
            ..regs(tdvpr.get(), field)
        };
        self.on(cpu, Leaf::VpWr, regs).map(drop)
    }
}
