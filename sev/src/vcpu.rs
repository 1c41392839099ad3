//! The vCPU of a SEV, SEV-ES or SEV-SNP guest.

use core::convert::Infallible;
use core::marker::PhantomData;

use kvm_ops::{Arc, Exit, Host, Kick, Result, VcpuId, VcpuOps};

/// A vCPU of [`SevVm`](crate::SevVm). The type has no values, as the VM has none.
#[derive(Debug)]
pub struct SevVcpu<H: Host> {
    never: Infallible,
    host: PhantomData<fn() -> H>,
}

impl<H: Host> VcpuOps for SevVcpu<H> {
    fn id(&self) -> VcpuId {
        match self.never {}
    }

    fn vcpu_run(&mut self) -> Result<Exit<'_>> {
        match self.never {}
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        match self.never {}
    }

    fn vcpu_reset(&mut self, _: bool) -> Result<()> {
        match self.never {}
    }

    fn vcpu_free(self) -> Result<()> {
        match self.never {}
    }
}
