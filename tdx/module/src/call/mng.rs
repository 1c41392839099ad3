//! Creation, key and teardown of a TD; its fields.

use super::checks::{TdRef, free_page, tdr};
use super::sys::pconfig;
use super::{Call, Leaf, busy, invalid};
use crate::arena::lock;
use crate::config::{TDCS_BASE_PAGES, TDCS_MAX_PAGES};
use crate::kot::HkidState;
use crate::lock::{Guard, LockMode, Side};
use crate::meta;
use crate::meta::place::is_null;
use crate::op_state::OpState;
use crate::pamt::{PageSize, PageType};
use crate::platform::Platform;
use crate::status::{Code, Operand};
use crate::td::{Lifecycle, Td};
use std::sync::atomic::Ordering;

fn kot(p: &Platform) -> Leaf<Guard<'_>> {
    p.kot
        .lock
        .guard(LockMode::Exclusive, Side::Host)
        .ok_or(busy(Operand::KOT))
}

/// TDH.MNG.CREATE
pub(super) fn create(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let hkid = u16::try_from(c.regs.rdx)
        .ok()
        .filter(|h| p.cfg.is_private_hkid(u64::from(*h)))
        .ok_or(invalid(Operand::RDX))?;
    let pa = c.regs.rcx;
    let page = free_page(p, pa, PageSize::Size4K, Operand::RCX)?;
    let _kot = kot(p)?;
    if p.kot.state(hkid) != Some(HkidState::Free) {
        return Err(Code::HKID_NOT_FREE.status());
    }
    let uuid = random_words(p)?;
    let slot = p.tds.alloc().ok_or(busy(Operand::RCX))?;
    let td = p.tds.get(slot).ok_or(busy(Operand::RCX))?;
    td.create(pa, hkid, uuid);
    p.kot.set(hkid, HkidState::Assigned, 0);
    page.entry.set_slot(PageType::Tdr, slot);
    Ok(())
}

/// A UUID or a key.
fn random_words(p: &Platform) -> Leaf<[u64; 4]> {
    p.machine
        .rdseed_four(p.cfg.rdseed_tries)
        .ok_or(Code::RND_NO_ENTROPY.status())
}

fn check_fatal(td: &Td) -> Leaf {
    if td.is_fatal() {
        Err(Code::TD_FATAL.status())
    } else {
        Ok(())
    }
}

/// TDH.MNG.KEY.CONFIG
pub(super) fn key_config(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let TdRef { td, page: _page } = tdr(p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    check_fatal(td)?;
    if td.lifecycle() != Lifecycle::HkidAssigned {
        return Err(Code::LIFECYCLE_STATE_INCORRECT.status());
    }
    let bit = 1 << c.this.package;
    if td.pkg_bitmap.load(Ordering::Acquire) & bit != 0 {
        return Err(Code::KEY_CONFIGURED.status());
    }
    pconfig(p)?;
    let done = td.pkg_bitmap.fetch_or(bit, Ordering::AcqRel) | bit;
    if done.count_ones() as usize == p.packages.len() {
        *lock(&td.key) = p.mem.keys.generate();
        td.set_lifecycle(Lifecycle::KeysConfigured);
    }
    Ok(())
}

/// TDH.MNG.ADDCX
pub(super) fn addcx(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let TdRef { td, page: _page } = tdr(p, c.regs.rdx, LockMode::Exclusive, Operand::RDX)?;
    check_fatal(td)?;
    if td.lifecycle() != Lifecycle::KeysConfigured {
        return Err(Code::TD_KEYS_NOT_CONFIGURED.status());
    }
    let have = td.num_tdcx.load(Ordering::Acquire);
    if have >= TDCS_MAX_PAGES {
        return Err(Code::TDCX_NUM_INCORRECT.status());
    }
    let page = free_page(p, c.regs.rcx, PageSize::Size4K, Operand::RCX)?;
    if have + 1 == TDCS_BASE_PAGES {
        td.migration().enc_key = random_words(p)?;
    }
    if have >= TDCS_BASE_PAGES && td.op_state() != OpState::Uninitialized {
        return Err(Code::OP_STATE_INCORRECT.status());
    }
    if let Some(slot) = td.tdcx.get(have as usize) {
        slot.store(c.regs.rcx, Ordering::Release);
    }
    td.num_tdcx.store(have + 1, Ordering::Release);
    td.add_children(1);
    page.entry.set(PageType::Tdcx, td.pa());
    Ok(())
}

/// TDH.MNG.VPFLUSHDONE
pub(super) fn vpflushdone(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let TdRef { td, page: _page } = tdr(p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    let _kot = kot(p)?;
    if !matches!(
        td.lifecycle(),
        Lifecycle::KeysConfigured | Lifecycle::HkidAssigned
    ) {
        return Err(Code::LIFECYCLE_STATE_INCORRECT.status());
    }
    // Without an initialised TDCS no vCPU exists; the count is then 0.
    if td.num_assoc.load(Ordering::Acquire) != 0 {
        return Err(Code::FLUSHVP_NOT_DONE.status());
    }
    let all = u64::MAX >> (64 - p.packages.len());
    p.kot.set(td.hkid(), HkidState::Flushed, all);
    td.set_lifecycle(Lifecycle::Blocked);
    Ok(())
}

/// TDH.MNG.KEY.FREEID
pub(super) fn key_freeid(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let TdRef { td, page: _page } = tdr(p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    if td.lifecycle() != Lifecycle::Blocked {
        return Err(Code::LIFECYCLE_STATE_INCORRECT.status());
    }
    let _kot = kot(p)?;
    if p.kot.wbinvd_bitmap(td.hkid()) != 0 {
        return Err(Code::WBCACHE_NOT_COMPLETE.status());
    }
    if let Some(key) = lock(&td.key).take() {
        p.mem.keys.destroy(&key);
    }
    p.kot.set(td.hkid(), HkidState::Free, 0);
    td.set_lifecycle(Lifecycle::Teardown);
    Ok(())
}

/// TDH.MNG.RD
pub(super) fn rd(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let id = c.regs.rdx;
    c.regs.r8 = 0;
    if c.version != 0 {
        c.regs.rdx = u64::MAX;
    }
    c.max_version(1)?;
    let TdRef { td, page: _page } = tdr(p, c.regs.rcx, LockMode::Shared, Operand::RCX)?;
    let _op_state = c.td_state(td, true)?;
    let host = meta::td::host(td);
    if c.version == 1 && is_null(id) {
        c.regs.rdx = meta::first_id(meta::td::context(td), host);
        return Err(Code::METADATA_FIRST_FIELD_ID_IN_CONTEXT.status());
    }
    let read = meta::td::read(p, td, host, id)?;
    c.regs.r8 = read.value;
    if c.version == 1 {
        c.regs.rdx = read.next();
    }
    Ok(())
}

/// TDH.MNG.WR
pub(super) fn wr(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let write = meta::Write {
        id: c.regs.rdx,
        value: c.regs.r8,
        mask: c.regs.r9,
    };
    c.regs.r8 = 0;
    let TdRef { td, page: _page } = tdr(p, c.regs.rcx, LockMode::Shared, Operand::RCX)?;
    let _op_state = c.td_state(td, true)?;
    c.regs.r8 = meta::td_write::write(p, td, meta::td::host(td), write)?;
    Ok(())
}
