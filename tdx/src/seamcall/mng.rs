//! TDH.MNG.* and TDH.MR.FINALIZE: the TD as a whole.

use kvm_ops::{CpuId, Hkid, Hpa, SeamPort};

use super::{Calls, Leaf, Outcome, regs};

impl<S: SeamPort> Calls<'_, S> {
    /// Makes `tdr` the TDR of a new TD that owns `hkid`.
    pub(crate) fn mng_create(&self, tdr: Hpa, hkid: Hkid) -> Outcome {
        self.here(Leaf::MngCreate, regs(tdr.get(), hkid.0.into()))
            .map(drop)
    }

    /// Gives the TD's key to the package of `cpu`.
    pub(crate) fn mng_key_config(&self, cpu: CpuId, tdr: Hpa) -> Outcome {
        self.on(cpu, Leaf::MngKeyConfig, regs(tdr.get(), 0))
            .map(drop)
    }

    /// Makes `page` the next page of the TDCS.
    pub(crate) fn mng_addcx(&self, page: Hpa, tdr: Hpa) -> Outcome {
        self.here(Leaf::MngAddcx, regs(page.get(), tdr.get()))
            .map(drop)
    }

    /// Sets the TD's parameters from the TD_PARAMS structure at `params`, which is host memory.
    pub(crate) fn mng_init(&self, tdr: Hpa, params: Hpa) -> Outcome {
        self.here(Leaf::MngInit, regs(tdr.get(), params.get()))
            .map(drop)
    }

    /// Reads a metadata field of the TD.
    pub(crate) fn mng_rd(&self, tdr: Hpa, field: u64) -> Outcome<u64> {
        self.here(Leaf::MngRd, regs(tdr.get(), field))
            .map(|out| out.r8)
    }

    /// Closes the TD's measurement.
    pub(crate) fn mr_finalize(&self, tdr: Hpa) -> Outcome {
        self.here(Leaf::MrFinalize, regs(tdr.get(), 0)).map(drop)
    }

    /// Adds 256 bytes of a page to the TD's measurement. `gpa` is that of the first byte.
    pub(crate) fn mr_extend(&self, gpa: u64, tdr: Hpa) -> Outcome {
        self.here(Leaf::MrExtend, regs(gpa, tdr.get())).map(drop)
    }

    /// Declares that no vCPU is associated with a processor, and none will be.
    pub(crate) fn mng_vpflushdone(&self, tdr: Hpa) -> Outcome {
        self.here(Leaf::MngVpflushdone, regs(tdr.get(), 0))
            .map(drop)
    }

    /// Takes the KeyID from the TD.
    pub(crate) fn mng_key_freeid(&self, tdr: Hpa) -> Outcome {
        self.here(Leaf::MngKeyFreeid, regs(tdr.get(), 0)).map(drop)
    }
}
