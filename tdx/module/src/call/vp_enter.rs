//! TDH.VP.ENTER up to the point where the guest runs.

use super::checks::{ImplicitTd, VcpuRef, implicit_tdr, tdvpr};
use super::l2_entry::{left_by_private_violation, reenter};
use super::vp::{associate, check_pages};
use super::{Call, Entered, Leaf, busy, invalid};
use crate::guest::{EXIT_VM_SHIFT, pending_entry_event};
use crate::l2::preemption;
use crate::l2::translate::translate;
use crate::lock::{LockMode, Side};
use crate::platform::{Platform, Running};
use crate::regs::Regs;
use crate::status::{Code, Operand};
use crate::td::Td;
use crate::vcpu::{Event, LastExit, VcpuContext, VcpuState};
use std::sync::atomic::Ordering;

const HOST_RECOVERABILITY_HINT: u64 = 1 << 52;
const RESUME_L1: u64 = 1 << 53;
const EPT_VIOLATION: u64 = 48;
const WRITE_ACCESS: u64 = 2;
/// NOTIFY_ENABLES: notify the guest when zero-step filtering had to act.
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
    let was_here = vcpu.assoc_lp.load(Ordering::Acquire) == c.lp as i32;
    associate(c, td, vcpu)?;
    let mut context = vcpu.context();
    let hint = rcx & HOST_RECOVERABILITY_HINT != 0;
    if hint && context.last_exit != LastExit::HostPriorityTimeout {
        return Err(invalid(Operand::RCX));
    }
    if rcx & RESUME_L1 != 0 {
        if context.vm() == 0 {
            return Err(invalid(Operand::RCX));
        }
        context.route_to_l1();
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
    let last_epoch = vcpu.epoch.swap(epoch, Ordering::AcqRel);
    if was_here && last_epoch != epoch {
        context.forget_translations(td.num_l2_vms());
    }
    let back = || td.refcount[(epoch & 1) as usize].fetch_sub(1, Ordering::AcqRel);
    match find_vm(p, td, &mut context, c.regs) {
        Ok(None) => {}
        Ok(Some(gpa)) => {
            back();
            filtered_exit(c.regs, gpa, context.vm());
            return Ok(());
        }
        Err(status) => {
            back();
            return Err(status);
        }
    }
    let injected = prepare(p, td, &mut context, c.regs, hint);
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

/// Zero-step filtering, and the choice between L1 and the L2 VM that the vCPU left the TD from. A GPA is one that
/// would fault at once: the entry becomes that EPT violation.
fn find_vm(p: &Platform, td: &Td, context: &mut VcpuContext, host: &Regs) -> Leaf<Option<u64>> {
    context.rip_at_entry = context.current_rip();
    let blocked = blocked_gpa(p, td, context)?;
    if blocked.is_none() && is_notified(td, context) && left_by_private_violation(td, context) {
        context.route_to_l1();
    }
    let untranslated = if context.vm() == 0 {
        None
    } else {
        reenter(p, td, context, host).err()
    };
    let gpa = untranslated.or(blocked).or_else(|| match context.vm() {
        0 => None,
        vm => translate(p, td, context, vm).err(),
    });
    if gpa.is_some() && !matches!(context.last_exit, LastExit::PrivateEptViolation(_)) {
        context.last_exit = LastExit::Other;
    }
    Ok(gpa)
}

/// Returns true if L1 asked to be notified when zero-step filtering acts, and it has acted.
fn is_notified(td: &Td, context: &VcpuContext) -> bool {
    td.notify_enables.load(Ordering::Acquire) & NOTIFY_EPT_FAULTS != 0
        && !context.zero_step_gpas.is_empty()
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
            .is_some_and(|w| w.content.state().is_guest_writable())
    };
    Ok(context
        .zero_step_gpas
        .iter()
        .copied()
        .find(|gpa| !is_mapped(*gpa)))
}

/// Registers of the exit that replaces an entry which would fault again.
fn filtered_exit(regs: &mut Regs, gpa: u64, vm: usize) {
    *regs = Regs {
        rax: EPT_VIOLATION,
        rcx: WRITE_ACCESS | (vm as u64) << EXIT_VM_SHIFT,
        r8: gpa & !0xFFF,
        rbp: regs.rbp,
        rsp: regs.rsp,
        ..Regs::default()
    };
}

/// Sets the guest's registers and the event to deliver.
fn prepare(
    p: &Platform,
    td: &Td,
    context: &mut VcpuContext,
    host: &Regs,
    hint: bool,
) -> Option<Event> {
    let last_exit = std::mem::take(&mut context.last_exit);
    match last_exit {
        LastExit::Vmcall { mask } => context.take_vmcall_results(host, mask),
        LastExit::HostPriorityTimeout => {
            const HINT: u64 = 1 << 60;
            context.gprs.rax = context.gprs.rax & !HINT | u64::from(hint) << 60;
        }
        LastExit::Other | LastExit::PrivateEptViolation(_) => {}
    }
    context.host_rbp = host.rbp;
    if context.vm() != 0 {
        preemption::arm(p, context, context.vm());
        return pending_entry_event(context);
    }
    if let Some(event) = context.vectoring.take() {
        let cr2 = if event.is_exception(14) {
            context.cr2
        } else {
            0
        };
        return Some(Event { cr2, ..event });
    }
    match last_exit {
        LastExit::PrivateEptViolation(info)
            if is_notified(td, context) && context.ve_info.is_none() =>
        {
            context.set_ve_info(info);
            Some(Event::VE)
        }
        _ => None,
    }
}
