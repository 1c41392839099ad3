//! A trust domain as the framework sees it.

use alloc::sync::Arc;
use core::fmt;

use kvm_ops::{
    Backend, Drained, Error, FreeReport, Host, KeyReleased, MemSlot, Missing, Result, SharedMask,
    Step, Tech, VcpuId, VmId, VmOps, VmParams,
};

use crate::TdxVcpu;
use crate::td::Td;

/// A trust domain.
pub struct TdxVm<H: Host> {
    td: Arc<Td<H>>,
}

impl<H: Host> fmt::Debug for TdxVm<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TdxVm")
            .field("id", &self.td.id)
            .field("step", &self.td.step.get())
            .finish_non_exhaustive()
    }
}

impl<H: Host> TdxVm<H> {
    /// Refuses.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with [`Missing::Backend`], always, after parameters out of range.
    pub fn create(host: &H, id: VmId, params: &VmParams) -> Result<Self> {
        params.validate()?;
        let _ = (host, id);
        Err(Error::Unsupported(Missing::Backend(Tech::Tdx)))
    }
}

impl<H: Host> VmOps for TdxVm<H> {
    kvm_ops::protected_vm_answers!();

    fn tech(&self) -> Tech {
        Tech::Tdx
    }

    fn id(&self) -> VmId {
        self.td.id
    }

    fn step(&self) -> Step {
        self.td.step.get()
    }

    fn shared_mask(&self) -> SharedMask {
        self.td.mask
    }

    fn vm_init(&mut self) -> Result<()> {
        kvm_ops::unsupported!("vm_init")
    }

    fn vm_finalize(&mut self) -> Result<()> {
        kvm_ops::unsupported!("vm_finalize")
    }

    fn mmu_release_hkid(&mut self) -> Result<KeyReleased> {
        kvm_ops::unsupported!("mmu_release_hkid")
    }

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        kvm_ops::unsupported!("drain_private").map_err(|error| (error, released))
    }

    fn vm_free(self, _: Drained) -> FreeReport {
        FreeReport::new(self.td.id, Tech::Tdx)
    }

    fn set_memory_slot(&self, _: &MemSlot) -> Result<()> {
        kvm_ops::unsupported!("set_memory_slot")
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        kvm_ops::unsupported!("delete_memory_slot")
    }
}

impl<H: Host> Backend for TdxVm<H> {
    type Vcpu = TdxVcpu<H>;

    fn create_vcpu(&self, _: VcpuId) -> Result<Self::Vcpu> {
        kvm_ops::unsupported!("create_vcpu")
    }
}
