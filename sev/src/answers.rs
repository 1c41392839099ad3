//! What a vCPU answers whose registers are the guest's secret.

use alloc::sync::Arc;

use kvm_ops::{Exit, Kick, Result, VcpuId, VcpuOps};

/// The fixed answers, as a vCPU that does nothing else. What it does not answer is unsupported.
pub(crate) struct Answers(pub(crate) VcpuId);

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl VcpuOps for Answers {
    kvm_ops::protected_vcpu_answers!();

    fn id(&self) -> VcpuId {
        self.0
    }

    fn vcpu_run(&mut self) -> Result<Exit<'_>> {
        kvm_ops::unsupported!("vcpu_run")
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::new(NoKick)
    }

    fn vcpu_reset(&mut self, _: bool) -> Result<()> {
        kvm_ops::unsupported!("vcpu_reset")
    }

    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }
}
