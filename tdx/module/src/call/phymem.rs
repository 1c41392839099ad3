//! Physical pages and caches: reclaiming, metadata, write-back.

use super::checks::{explicit_page, implicit_tdr, private_operand, walk_page};
use super::{Call, Leaf, busy, invalid};
use crate::arena::lock;
use crate::kot::{HkidState, WbSession};
use crate::lock::{LockMode, Side};
use crate::pamt::{Entry, PageSize, PageType};
use crate::platform::Platform;
use crate::status::{Code, Operand};
use crate::td::{Lifecycle, Td};
use std::sync::atomic::Ordering;

fn zero_outputs(c: &mut Call<'_, '_>) -> u64 {
    let rcx = c.regs.rcx;
    (c.regs.rcx, c.regs.rdx) = (0, 0);
    (c.regs.r8, c.regs.r9, c.regs.r10, c.regs.r11) = (0, 0, 0, 0);
    rcx
}

/// The owner a page's metadata names: 0 for a TDR.
pub(crate) fn owner_of(p: &Platform, entry: &Entry) -> u64 {
    match entry.page_type() {
        PageType::Tdr => 0,
        PageType::Tdvpr => p
            .vcpus
            .get(entry.slot())
            .map_or(0, crate::vcpu::Vcpu::td_pa),
        _ => entry.owner_pa(),
    }
}

/// TDH.PHYMEM.PAGE.RECLAIM
pub(super) fn page_reclaim(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let pa = zero_outputs(c);
    private_operand(p, pa, 4096, Operand::RCX)?;
    let page = walk_page(p, pa, PageSize::Size4K, LockMode::Exclusive, Operand::RCX)?;
    let page_type = page.entry.page_type();
    if matches!(page_type, PageType::Nda | PageType::Rsvd) {
        return Err(Code::PAGE_METADATA_INCORRECT.on(Operand::RCX));
    }
    c.regs.rcx = page_type as u64;
    c.regs.rdx = owner_of(p, page.entry);
    c.regs.r8 = page.size as u64;
    if !pa.is_multiple_of(page.size.bytes()) {
        return Err(invalid(Operand::RCX));
    }
    if page_type == PageType::Tdr {
        let slot = page.entry.slot();
        let td = p
            .tds
            .get(slot)
            .ok_or(Code::PAGE_METADATA_INCORRECT.on(Operand::RCX))?;
        check_teardown(td)?;
        if td.chldcnt.load(Ordering::Acquire) != 0 {
            return Err(Code::TD_ASSOCIATED_PAGES_EXIST.status());
        }
        td.free_tables(&p.tables);
        page.entry.set(PageType::Nda, 0);
        p.tds.free(slot);
        return Ok(());
    }
    let owner = implicit_tdr(p, c.regs.rdx, LockMode::Shared)?;
    check_teardown(owner.td)?;
    if page_type == PageType::Tdvpr {
        let slot = page.entry.slot();
        page.entry.set(PageType::Nda, c.regs.rdx);
        p.programs.detach(pa);
        p.vcpus.free(slot);
    } else {
        page.entry.set_nda();
    }
    owner.td.remove_children(page.size.pages());
    drop(owner.guard);
    Ok(())
}

fn check_teardown(td: &Td) -> Leaf {
    match td.lifecycle() {
        Lifecycle::Teardown => Ok(()),
        _ => Err(Code::LIFECYCLE_STATE_INCORRECT.status()),
    }
}

/// TDH.PHYMEM.PAGE.RDMD
pub(super) fn page_rdmd(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let pa = zero_outputs(c);
    let page = explicit_page(p, pa, PageSize::Size4K, LockMode::Shared, Operand::RCX)?;
    let page_type = page.entry.page_type();
    c.regs.rcx = page_type as u64;
    c.regs.rdx = owner_of(p, page.entry);
    c.regs.r8 = page.size as u64;
    if matches!(page_type, PageType::Reg | PageType::Ept) {
        c.regs.r9 = page.entry.bepoch();
    }
    Ok(())
}

/// TDH.PHYMEM.PAGE.WBINVD: memory here has no caches, so only the checks remain.
pub(super) fn page_wbinvd(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let rcx = c.regs.rcx;
    if rcx >> 52 != 0 {
        return Err(invalid(Operand::RCX));
    }
    let page = explicit_page(
        p,
        p.cfg.strip(rcx),
        PageSize::Size4K,
        LockMode::Shared,
        Operand::RCX,
    )?;
    if page.size != PageSize::Size4K || page.entry.page_type() != PageType::Nda {
        return Err(Code::PAGE_METADATA_INCORRECT.on(Operand::RCX));
    }
    Ok(())
}

/// TDH.PHYMEM.CACHE.WB
pub(super) fn cache_wb(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let resume = match c.regs.rcx {
        0 => false,
        1 => true,
        _ => return Err(invalid(Operand::RCX)),
    };
    let package = &p.packages[c.this.package];
    let _wbt = package
        .wbt
        .guard(LockMode::Exclusive, Side::Host)
        .ok_or(busy(Operand::WBCACHE))?;
    let _kot = p
        .kot
        .lock
        .guard(LockMode::Shared, Side::Host)
        .ok_or(busy(Operand::KOT))?;
    let mut saved = lock(&package.session);
    let session = saved.take();
    let mut session = if resume {
        session.ok_or(Code::WBCACHE_RESUME_ERROR.status())?
    } else {
        let flushed = |h: &u16| p.kot.state(*h) == Some(HkidState::Flushed);
        let hkids: Vec<u16> = p.kot.hkids().filter(flushed).collect();
        if hkids.is_empty() {
            return Err(Code::NO_HKID_READY_TO_WBCACHE.status());
        }
        WbSession { block: 0, hkids }
    };
    loop {
        session.block += 1;
        if session.block >= p.cfg.cache_wb_blocks {
            break;
        }
        if c.this.host_event_pending() {
            *saved = Some(session);
            return Err(Code::INTERRUPTED_RESUMABLE.status());
        }
    }
    for hkid in session.hkids {
        p.kot.written_back(hkid, c.this.package);
    }
    Ok(())
}
