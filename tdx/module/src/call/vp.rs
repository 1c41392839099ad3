//! Building, flushing and inspecting vCPUs.

use super::checks::{TdRef, VcpuRef, free_page, implicit_tdr, tdr, tdvpr};
use super::{Call, Leaf, busy, invalid};
use crate::arena::lock;
use crate::config::{TDVPS_BASE_PAGES, TDVPS_MAX_PAGES, TDVPS_PAGES_PER_L2};
use crate::lock::LockMode;
use crate::meta;
use crate::meta::place::is_null;
use crate::meta::vcpu::VcpuFields;
use crate::meta::vcpu_initial::{self, RESET_RIP};
use crate::pamt::{PageSize, PageType};
use crate::regs::Regs;
use crate::status::{Code, Operand};
use crate::td::{Lifecycle, Td};
use crate::vcpu::{Vcpu, VcpuState};
use std::sync::atomic::Ordering;

/// TDH.VP.CREATE
pub(super) fn create(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let TdRef { td, page: tdr_page } = tdr(p, c.regs.rdx, LockMode::Shared, Operand::RDX)?;
    let _op_state = c.td_state(td, true)?;
    let page = free_page(p, c.regs.rcx, PageSize::Size4K, Operand::RCX)?;
    let slot = p.vcpus.alloc().ok_or(busy(Operand::RCX))?;
    let vcpu = p.vcpus.get(slot).ok_or(busy(Operand::RCX))?;
    vcpu.create(c.regs.rcx, tdr_page.entry.slot(), td.pa());
    td.add_children(1);
    page.entry.set_slot(PageType::Tdvpr, slot);
    Ok(())
}

/// TDH.VP.ADDCX
pub(super) fn addcx(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let VcpuRef {
        vcpu, page: _tdvpr, ..
    } = tdvpr(p, c.regs.rdx, LockMode::Exclusive, Operand::RDX)?;
    let owner = implicit_tdr(p, vcpu.td_pa(), LockMode::Shared)?;
    let _op_state = c.td_state(owner.td, true)?;
    if vcpu.state() != VcpuState::Uninitialized {
        return Err(Code::VCPU_STATE_INCORRECT.status());
    }
    if vcpu.pages.load(Ordering::Acquire) >= TDVPS_MAX_PAGES {
        return Err(Code::TDCX_NUM_INCORRECT.status());
    }
    let page = free_page(p, c.regs.rcx, PageSize::Size4K, Operand::RCX)?;
    vcpu.add_page(c.regs.rcx);
    owner.td.add_children(1);
    page.entry.set(PageType::Tdcx, owner.td.pa());
    drop(owner.guard);
    Ok(())
}

/// The vCPU has all the pages its TD's number of L2 VMs asks for.
pub(crate) fn check_pages(td: &Td, vcpu: &Vcpu) -> Leaf {
    let needed =
        TDVPS_BASE_PAGES + TDVPS_PAGES_PER_L2 * u32::from(td.l2_vms.load(Ordering::Acquire));
    if vcpu.pages.load(Ordering::Acquire) < needed {
        return Err(Code::TDCX_NUM_INCORRECT.status());
    }
    Ok(())
}

/// Binds the vCPU to this processor if it is free.
pub(crate) fn associate(c: &Call<'_, '_>, td: &Td, vcpu: &Vcpu) -> Leaf {
    let lp = c.lp as i32;
    match vcpu
        .assoc_lp
        .compare_exchange(-1, lp, Ordering::AcqRel, Ordering::Acquire)
    {
        Ok(_) => {
            td.num_assoc.fetch_add(1, Ordering::AcqRel);
            Ok(())
        }
        Err(at) if at == lp => Ok(()),
        Err(_) => Err(Code::VCPU_ASSOCIATED.status()),
    }
}

/// TDH.VP.INIT
pub(super) fn init(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    c.max_version(1)?;
    let VcpuRef {
        vcpu, page: _tdvpr, ..
    } = tdvpr(p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    let mode = if c.version == 1 {
        LockMode::Exclusive
    } else {
        LockMode::Shared
    };
    let owner = implicit_tdr(p, vcpu.td_pa(), mode)?;
    let td = owner.td;
    let _op_state = c.td_state(td, true)?;
    check_pages(td, vcpu)?;
    if vcpu.state() != VcpuState::Uninitialized {
        return Err(Code::VCPU_STATE_INCORRECT.status());
    }
    let max = u32::from(td.config().max_vcpus);
    // Several processors may initialise vCPUs of one TD at once; each gets a different index.
    let index = td
        .num_vcpus
        .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| {
            (n < max).then_some(n + 1)
        })
        .map_err(|_| Code::MAX_VCPUS_EXCEEDED.status())?;
    vcpu.index.store(index, Ordering::Release);
    if c.version == 1 {
        claim_x2apic_id(td, index, c.regs.r8)?;
    } else {
        td.topology_configured.store(false, Ordering::Release);
    }
    c.check_tsc_adjust()?;
    let mut context = vcpu.context();
    let initial = c.regs.rdx;
    context.gprs = Regs {
        rcx: initial,
        r8: initial,
        rbx: u64::from(td.gpa_width()),
        rdx: u64::from(p.cfg.fms),
        rsi: u64::from(index),
        ..Regs::default()
    };
    context.tsc_at_exit = p.machine.tsc();
    context.rip = RESET_RIP;
    vcpu_initial::initialise(p, td, vcpu, &mut context.store);
    drop(context);
    associate(c, td, vcpu)?;
    vcpu.set_state(VcpuState::Ready);
    drop(owner.guard);
    Ok(())
}

/// Gives the vCPU an x2APIC id; the id must differ from those of all lower indices.
fn claim_x2apic_id(td: &Td, index: u32, id: u64) -> Leaf {
    let Ok(id) = u32::try_from(id) else {
        td.num_vcpus.fetch_sub(1, Ordering::AcqRel);
        return Err(invalid(Operand::R8));
    };
    let mut ids = lock(&td.x2apic_ids);
    let index = index as usize;
    let of_lower = |i: usize| ids.get(i).copied().unwrap_or(0);
    if (0..index).any(|i| of_lower(i) == id) {
        return Err(Code::X2APIC_ID_NOT_UNIQUE.detail(id));
    }
    if ids.len() <= index {
        ids.resize(index + 1, 0);
    }
    ids[index] = id;
    Ok(())
}

/// TDH.VP.FLUSH
pub(super) fn flush(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let VcpuRef {
        vcpu, page: _tdvpr, ..
    } = tdvpr(p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    let owner = implicit_tdr(p, vcpu.td_pa(), LockMode::Shared)?;
    if owner.td.lifecycle() != Lifecycle::KeysConfigured {
        return Err(Code::TD_KEYS_NOT_CONFIGURED.status());
    }
    check_pages(owner.td, vcpu)?;
    vcpu.assoc_lp
        .compare_exchange(c.lp as i32, -1, Ordering::AcqRel, Ordering::Acquire)
        .map_err(|_| Code::VCPU_NOT_ASSOCIATED.status())?;
    vcpu.context().forget_translations(owner.td.num_l2_vms());
    owner.td.num_assoc.fetch_sub(1, Ordering::AcqRel);
    drop(owner.guard);
    Ok(())
}

/// The common part of TDH.VP.RD and TDH.VP.WR; runs `then` with TD and vCPU.
fn access(
    c: &mut Call<'_, '_>,
    may_be_disabled: bool,
    then: impl FnOnce(&mut Call<'_, '_>, &Td, &Vcpu) -> Leaf,
) -> Leaf {
    let p = c.p;
    let VcpuRef {
        vcpu, page: _tdvpr, ..
    } = tdvpr(p, c.regs.rcx, LockMode::Shared, Operand::RCX)?;
    let owner = implicit_tdr(p, vcpu.td_pa(), LockMode::Shared)?;
    let _op_state = c.td_state(owner.td, true)?;
    check_pages(owner.td, vcpu)?;
    let state = vcpu.state();
    if state != VcpuState::Ready && !(may_be_disabled && state == VcpuState::Disabled) {
        return Err(Code::VCPU_STATE_INCORRECT.status());
    }
    associate(c, owner.td, vcpu)?;
    let result = then(c, owner.td, vcpu);
    drop(owner.guard);
    result
}

/// TDH.VP.RD
pub(super) fn rd(c: &mut Call<'_, '_>) -> Leaf {
    let id = c.regs.rdx;
    c.regs.r8 = 0;
    if c.version != 0 {
        c.regs.rdx = u64::MAX;
    }
    c.max_version(1)?;
    access(c, true, |c, td, vcpu| {
        let agent = meta::td::host(td);
        if c.version == 1 && is_null(id) {
            c.regs.rdx = meta::first_id(meta::vcpu::context(td), agent);
            return Err(Code::METADATA_FIRST_FIELD_ID_IN_CONTEXT.status());
        }
        let fields = VcpuFields {
            p: c.p,
            td,
            vcpu,
            ctx: &mut vcpu.context(),
            agent,
        };
        let read = fields.read(id)?;
        c.regs.r8 = read.value;
        if c.version == 1 {
            c.regs.rdx = read.next();
        }
        Ok(())
    })
}

/// TDH.VP.WR
pub(super) fn wr(c: &mut Call<'_, '_>) -> Leaf {
    let write = meta::Write {
        id: c.regs.rdx,
        value: c.regs.r8,
        mask: c.regs.r9,
    };
    c.regs.r8 = 0;
    access(c, false, |c, td, vcpu| {
        let mut fields = VcpuFields {
            p: c.p,
            td,
            vcpu,
            ctx: &mut vcpu.context(),
            agent: meta::td::host(td),
        };
        c.regs.r8 = fields.write(write)?;
        Ok(())
    })
}
