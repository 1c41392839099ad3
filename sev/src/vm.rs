//! A SEV, SEV-ES or SEV-SNP guest.

use core::convert::Infallible;
use core::marker::PhantomData;

use kvm_ops::{
    Backend, Drained, Error, FreeReport, Host, KeyReleased, MemSlot, Missing, Result, Step, Tech,
    VcpuId, VmId, VmOps, VmParams,
};

use crate::SevVcpu;

/// A SEV, SEV-ES or SEV-SNP guest.
///
/// The type has no values: [`create`](Self::create) refuses, because the life cycle is not
/// written yet. It is there so that enums of back ends, features and layouts are what they will
/// be.
#[derive(Debug)]
pub struct SevVm<H: Host> {
    never: Infallible,
    host: PhantomData<fn() -> H>,
}

impl<H: Host> SevVm<H> {
    /// Refuses.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with [`Missing::Backend`], always, after parameters out of range.
    pub fn create(_host: &H, _id: VmId, tech: Tech, params: &VmParams) -> Result<Self> {
        params.validate()?;
        Err(Error::Unsupported(Missing::Backend(tech)))
    }
}

impl<H: Host> VmOps for SevVm<H> {
    fn tech(&self) -> Tech {
        match self.never {}
    }

    fn id(&self) -> VmId {
        match self.never {}
    }

    fn step(&self) -> Step {
        match self.never {}
    }

    fn vm_init(&mut self) -> Result<()> {
        match self.never {}
    }

    fn vm_finalize(&mut self) -> Result<()> {
        match self.never {}
    }

    fn mmu_release_hkid(&mut self) -> Result<KeyReleased> {
        match self.never {}
    }

    fn drain_private(&mut self, _: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        match self.never {}
    }

    fn vm_free(self, _: Drained) -> FreeReport {
        match self.never {}
    }

    fn set_memory_slot(&self, _: &MemSlot) -> Result<()> {
        match self.never {}
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        match self.never {}
    }
}

impl<H: Host> Backend for SevVm<H> {
    type Vcpu = SevVcpu<H>;

    fn create_vcpu(&self, _: VcpuId) -> Result<Self::Vcpu> {
        match self.never {}
    }
}
