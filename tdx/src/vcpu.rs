//! The vCPU of a trust domain.

use core::convert::Infallible;
use core::marker::PhantomData;

use kvm_ops::{Arc, Exit, Host, Kick, Result, VcpuId, VcpuOps};

/// A vCPU of [`TdxVm`](crate::TdxVm). The type has no values, as the VM has none.
#[derive(Debug)]
pub struct TdxVcpu<H: Host> {
    never: Infallible,
    host: PhantomData<fn() -> H>,
}

impl<H: Host> VcpuOps for TdxVcpu<H> {
    kvm_ops::protected_vcpu_answers!();

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
