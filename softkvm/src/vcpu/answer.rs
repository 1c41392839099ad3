//! The completion of an exit: the caller's answer, which is in the run page when the vCPU runs again.

use kvm_ops::{Answer, VcpuOps};
use kvm_ops_uapi::run::{Hypercall, Mmio};

use super::page::{PORT_DATA, Page};
use crate::machine::Processor;
use crate::refusal::Result;

/// The exit that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    Nothing,
    /// Items from a port.
    Port,
    /// Bytes from a device.
    Device,
    /// A result.
    Hypercall,
}

impl Waits {
    /// Hands the answer to the processor.
    pub(super) fn answer(&mut self, page: Page<'_>, vcpu: &mut Processor) -> Result<()> {
        match std::mem::replace(self, Self::Nothing) {
            Self::Nothing => {}
            Self::Port => page.0.read(PORT_DATA, vcpu.exit_data()),
            Self::Device => {
                let mmio: Mmio = page.exit();
                let data = vcpu.exit_data();
                let len = data.len().min(mmio.data.len());
                data[..len].copy_from_slice(&mmio.data[..len]);
            }
            Self::Hypercall => {
                let call: Hypercall = page.exit();
                vcpu.answer(Answer::Value(call.ret.get()))?;
            }
        }
        Ok(())
    }
}
