//! A normal VM on AMD-V.

use kvm_ops::{Host, PlainVm, Result, Tech, VmId, VmParams, VmPort};

use crate::SvmVcpu;

/// A normal VM on AMD-V.
#[derive(Debug)]
pub struct SvmVm<H: Host> {
    plain: PlainVm<H>,
}

impl<H: Host> SvmVm<H> {
    /// Creates it on its host.
    ///
    /// # Errors
    /// Parameters out of range, and what the host answers.
    pub fn create(host: &H, id: VmId, params: &VmParams) -> Result<Self> {
        PlainVm::create(host, id, Tech::Svm, params).map(|plain| Self { plain })
    }

    /// The VM below, for what only its platform offers.
    #[inline]
    pub fn port(&self) -> &H::Vm {
        self.plain.port()
    }
}

/// SVM runs real mode as it is (paged real mode, APM vol. 2, 15.19): nothing is to be placed.
fn set_up<P: VmPort>(_port: &P) -> Result<()> {
    Ok(())
}

kvm_ops::plain_vm_ops!(SvmVm, SvmVcpu, Tech::Svm, set_up);
