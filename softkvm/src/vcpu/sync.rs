//! Registers that the run page carries: `KVM_CAP_SYNC_REGS`.

use std::mem::offset_of;

use kvm_ops::{Sregs, VcpuOps};
use kvm_ops_uapi::checks::run::SYNC_REGS;
use kvm_ops_uapi::run::{SyncRegs, sync_regs};
use kvm_ops_uapi::system::CpuidEntry2;

use super::page::Page;
use super::{Parts, controls, convert, events};
use crate::machine::Processor;
use crate::refusal::{Result, ensure};

/// Checks the masks. VMs of types whose state is protected have none.
pub(super) fn check(page: Page<'_>, protected: bool) -> Result<()> {
    let masks = page.valid_regs() | page.dirty_regs();
    let known = if protected { 0 } else { sync_regs::ALL };
    ensure(masks & !known == 0, SYNC_REGS)
}

/// Takes the groups that the caller changed.
pub(super) fn load(
    page: Page<'_>,
    vcpu: &mut Processor,
    cpuid: &[CpuidEntry2],
    parts: Parts,
) -> Result<()> {
    let dirty = page.dirty_regs();
    if dirty & sync_regs::REGS != 0 {
        let regs = page.sync(offset_of!(SyncRegs, regs));
        vcpu.set_regs(&convert::from_regs(&regs))?;
    }
    if dirty & sync_regs::SREGS != 0 {
        let sregs = page.sync(offset_of!(SyncRegs, sregs));
        ensure(controls::are_valid(&sregs, cpuid), SYNC_REGS)?;
        let set = vcpu.set_sregs(&convert::from_sregs(&sregs));
        set.map_err(|_| SYNC_REGS)?;
    }
    if dirty & sync_regs::EVENTS != 0 {
        let given = page.sync(offset_of!(SyncRegs, events));
        let events = events::from_uapi(&given, parts, &vcpu.events()?).map_err(|_| SYNC_REGS)?;
        vcpu.set_events(&events).map_err(|_| SYNC_REGS)?;
    }
    if dirty != 0 {
        page.clear_dirty_regs();
    }
    Ok(())
}

/// Stores the groups that the caller wants.
pub(super) fn store(
    page: Page<'_>,
    vcpu: &Processor,
    sregs: &Sregs,
    parts: impl FnOnce() -> Parts,
) -> Result<()> {
    let valid = page.valid_regs();
    if valid & sync_regs::REGS != 0 {
        let regs = convert::to_regs(&vcpu.regs()?);
        page.set_sync(offset_of!(SyncRegs, regs), &regs);
    }
    if valid & sync_regs::SREGS != 0 {
        page.set_sync(offset_of!(SyncRegs, sregs), &convert::to_sregs(sregs));
    }
    if valid & sync_regs::EVENTS != 0 {
        let events = events::to_uapi(&vcpu.events()?, parts());
        page.set_sync(offset_of!(SyncRegs, events), &events);
    }
    Ok(())
}
