//! TDH.VP.ENTER up to the point where the guest runs.

use super::checks::{ImplicitTd, VcpuRef, implicit_tdr, tdvpr};
use super::vp::{associate, check_pages};
use super::{Call, Entered, Leaf, busy, invalid};
use crate::lock::{LockMode, Side};
use crate::platform::{Platform, Running};
use crate::regs::Regs;
use crate::sept::SeptState;
use crate::status::{Code, Operand};
use crate::td::Td;
use crate::vcpu::{Event, LastExit, VcpuContext, VcpuState};
use std::sync::atomic::Ordering;

const HOST_RECOVERABILITY_HINT: u64 = 1 << 52;
const RESUME_L1: u64 = 1 << 53;
const EPT_VIOLATION: u64 = 48;
const WRITE_ACCESS: u64 = 2;
/// NOTIFY_ENABLES: tell the guest that zero-step filtering had to act.
const NOTIFY_EPT_FAULTS: u64 = 1;

/// TDH.VP.ENTER
pub(super) fn enter(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let rcx = c.regs.rcx;
    c.check_cpuid_limit()?;
    if rcx & 0xFFF != 0 || rcx >> 54 != 0 {
        return Err(invalid(Operand::RCX));
    }
    let tdvpr_pa = rcx & !(HOST_RECOVERABILITY_HINT | RESUME_L1);
    let VcpuRef { vcpu, slot, page } = tdvpr(p, tdvpr_pa, LockMode::Shared, Operand::RCX)?;
    let ImplicitTd {
        td,
        slot: td_slot,
        guard: tdr,
    } = implicit_tdr(p, vcpu.td_pa(), LockMode::Shared)?;
    let _op_state = c.td_state(td, true)?;
    check_pages(td, vcpu)?;
    if vcpu.state() != VcpuState::Ready {
        return Err(Code::VCPU_STATE_INCORRECT.status());
    }
    associate(c, td, vcpu)?;
    let mut context = vcpu.context();
    let hint = rcx & HOST_RECOVERABILITY_HINT != 0;
    if hint && context.last_exit != LastExit::HostPriorityTimeout || rcx & RESUME_L1 != 0 {
        return Err(invalid(Operand::RCX));
    }
    c.check_tsc_adjust()?;
    if p.machine.tsc() < context.tsc_at_exit {
        return Err(Code::TSC_ROLLBACK.status());
    }
    let epoch = {
        let _epoch = td
            .epoch_lock
            .guard(LockMode::Shared, Side::Host)
            .ok_or(busy(Operand::TD_EPOCH))?;
        let epoch = td.current_epoch();
        td.refcount[(epoch & 1) as usize].fetch_add(1, Ordering::AcqRel);
        epoch
    };
    vcpu.epoch.store(epoch, Ordering::Release);
    match blocked_gpa(p, td, &context) {
        Ok(None) => {}
        stuck => {
            td.refcount[(epoch & 1) as usize].fetch_sub(1, Ordering::AcqRel);
            if let Some(gpa) = stuck? {
                filtered_exit(c.regs, gpa);
            }
            return Ok(());
        }
    }
    let injected = prepare(td, &mut context, c.regs, hint);
    vcpu.set_state(VcpuState::Active);
    p.in_td.fetch_add(1, Ordering::AcqRel);
    page.keep();
    tdr.keep();
    let running = Running {
        td: td_slot,
        vcpu: slot,
        tdvpr: tdvpr_pa,
    };
    c.entered = Some(Entered {
        running,
        guest: context.gprs,
        injected,
        vm: context.curr_vm,
    });
    Ok(())
}

/// Zero-step filtering: the first recorded GPA that is still not mapped.
fn blocked_gpa(p: &Platform, td: &Td, context: &VcpuContext) -> Leaf<Option<u64>> {
    if context.zero_step_gpas.is_empty() {
        return Ok(None);
    }
    let _tree = td
        .tree
        .guard(LockMode::Exclusive, Side::Host)
        .ok_or(busy(Operand::SEPT_TREE))?;
    let is_mapped = |gpa: u64| {
        td.walk(&p.tables, gpa, 0)
            .is_some_and(|w| w.content.state() == SeptState::Mapped)
    };
    Ok(context
        .zero_step_gpas
        .iter()
        .copied()
        .find(|gpa| !is_mapped(*gpa)))
}

/// What the host sees instead of an entry that would fault again.
fn filtered_exit(regs: &mut Regs, gpa: u64) {
    *regs = Regs {
        rax: EPT_VIOLATION,
        rcx: WRITE_ACCESS,
        r8: gpa & !0xFFF,
        rbp: regs.rbp,
        rsp: regs.rsp,
        ..Regs::default()
    };
}

/// Sets the guest's registers and the event to deliver.
fn prepare(td: &Td, context: &mut VcpuContext, host: &Regs, hint: bool) -> Option<Event> {
    let last_exit = std::mem::take(&mut context.last_exit);
    match last_exit {
        LastExit::Vmcall { mask } => {
            let host = host.to_array();
            let mut guest = context.gprs.to_array();
            for (n, slot) in guest.iter_mut().enumerate() {
                if mask >> n & 1 != 0 {
                    *slot = host[n];
                }
            }
            context.gprs = Regs {
                rax: 0,
                rcx: mask,
                ..Regs::from_array(guest)
            };
        }
        LastExit::HostPriorityTimeout => {
            const HINT: u64 = 1 << 60;
            context.gprs.rax = context.gprs.rax & !HINT | u64::from(hint) << 60;
        }
        LastExit::Other | LastExit::PrivateEptViolation(_) => {}
    }
    context.host_rbp = host.rbp;
    context.rip_at_entry = context.rip;
    if let Some(event) = context.vectoring.take() {
        let cr2 = if event.is_exception(14) {
            context.cr2
        } else {
            0
        };
        return Some(Event { cr2, ..event });
    }
    let notify = td.notify_enables.load(Ordering::Acquire) & NOTIFY_EPT_FAULTS != 0;
    match last_exit {
        LastExit::PrivateEptViolation(info)
            if notify && !context.zero_step_gpas.is_empty() && context.ve_info.is_none() =>
        {
            context.set_ve_info(info);
            Some(Event::VE)
        }
        _ => None,
    }
}
