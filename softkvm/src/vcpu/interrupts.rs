//! Interrupts that user space injects.

use kvm_ops::{Error, VcpuOps};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::state::Interrupt;

use super::registers::read;
use crate::Process;
use crate::file::VcpuFile;
use crate::refusal::Result;

/// `KVM_INTERRUPT`: without interrupt controllers in the kernel.
pub(super) fn interrupt(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let given: Interrupt = read(process, argument)?;
    let vector = u8::try_from(given.irq.get()).map_err(|_| Errno::EINVAL)?;
    if file.vm.lock().has_apics() {
        return Err(Errno::ENXIO.into());
    }
    let mut state = file.state();
    match state.cpu.require_processor()?.inject_irq(vector) {
        // As in the kernel the last one counts.
        Err(Error::Exists(..)) => replace(state.cpu.require_processor()?, vector)?,
        answer => answer?,
    }
    Ok(0)
}

fn replace(vcpu: &mut crate::machine::Processor, vector: u8) -> Result<()> {
    let mut events = vcpu.events()?;
    events.interrupt = Some(kvm_ops::Interrupt {
        vector,
        soft: false,
    });
    Ok(vcpu.set_events(&events)?)
}

pub(super) fn nmi(file: &VcpuFile) -> Result<i64> {
    file.state().cpu.require_processor()?.inject_nmi()?;
    Ok(0)
}
