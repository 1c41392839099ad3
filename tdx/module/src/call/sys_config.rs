//! TDH.SYS.CONFIG and TDH.SYS.TDMR.INIT: the regions TDs live in.

use super::sys::{all_lps_initialised, global};
use super::{Call, Leaf, busy, invalid, shared_operand};
use crate::config::{MAX_RESERVED_AREAS, MAX_TDMRS, PlatformConfig, Range, TDMR_INFO_SIZE, Tdmr};
use crate::kot::HkidState;
use crate::lock::{LockMode, Side};
use crate::pamt::Pamt;
use crate::platform::SysState;
use crate::status::{Code, Operand, Status};
use std::sync::atomic::Ordering;

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
/// Bytes TDH.SYS.TDMR.INIT initialises the metadata of in one call.
const TDMR_INIT_STEP: u64 = 4 << 20;

/// TDH.SYS.CONFIG
pub(super) fn config(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (array, count, hkid) = (c.regs.rcx, c.regs.rdx, c.regs.r8);
    let _global = global(p, LockMode::Exclusive)?;
    if p.sys_state() != SysState::InitDone || !all_lps_initialised(p) {
        return Err(Code::SYS_CONFIG_NOT_PENDING.status());
    }
    let array = shared_operand(p, array, 512, Operand::RCX)?;
    if !(1..=MAX_TDMRS).contains(&count) {
        return Err(invalid(Operand::RDX));
    }
    let hkid = u16::try_from(hkid)
        .ok()
        .filter(|h| p.cfg.is_private_hkid(u64::from(*h)))
        .ok_or(invalid(Operand::R8))?;
    p.kot.set(hkid, HkidState::Reserved, 0);
    let mut checked = Vec::new();
    for i in 0..count {
        let entry = p.mem.host_read_u64(array + i * 8);
        let entry = shared_operand(p, entry, 512, Operand::RCX)?;
        let mut bytes = [0; TDMR_INFO_SIZE];
        p.mem.host_read(entry, &mut bytes);
        let tdmr = Check {
            cfg: &p.cfg,
            earlier: &checked,
            i: i as u32,
        }
        .tdmr(&bytes)?;
        checked.push(tdmr);
    }
    // Cannot be set already: the state allows one success only, and the global lock is held.
    let _ = p.pamt.set(Pamt::new(checked));
    p.set_sys_state(SysState::ConfigDone);
    Ok(())
}

/// The checks of one TDMR_INFO against the platform and the entries before it.
struct Check<'a> {
    cfg: &'a PlatformConfig,
    earlier: &'a [Tdmr],
    i: u32,
}

/// A raw range of a TDMR_INFO, whose sum may overflow.
#[derive(Clone, Copy)]
struct Raw {
    base: u64,
    size: u64,
}

impl Raw {
    fn end(self) -> Option<u64> {
        self.base.checked_add(self.size)
    }

    fn range(self) -> Range {
        Range::new(self.base, self.size)
    }
}

impl Check<'_> {
    fn fail<T>(&self, code: Code, b1: usize, b2: usize) -> Leaf<T> {
        Err(self.status(code, b1, b2))
    }

    fn status(&self, code: Code, b1: usize, b2: usize) -> Status {
        code.detail(self.i | (b1 as u32) << 8 | (b2 as u32) << 16)
    }

    /// Base and last byte are plain addresses without key id.
    fn is_plain(&self, r: Raw) -> bool {
        let plain = |a: u64| a == self.cfg.strip(a);
        plain(r.base)
            && r.end()
                .is_some_and(|e| plain(e.saturating_sub(1).max(r.base)))
    }

    fn tdmr(&self, bytes: &[u8; TDMR_INFO_SIZE]) -> Leaf<Tdmr> {
        let raw = |slot: usize| {
            let word = |at: usize| {
                let mut b = [0; 8];
                b.copy_from_slice(&bytes[at..at + 8]);
                u64::from_le_bytes(b)
            };
            Raw {
                base: word(slot * 16),
                size: word(slot * 16 + 8),
            }
        };
        let region = raw(0);
        let Some(_) = region.end() else {
            return self.fail(Code::INVALID_TDMR, 0, 0);
        };
        if self
            .earlier
            .last()
            .is_some_and(|prev| region.base < prev.range.end())
        {
            return self.fail(Code::NON_ORDERED_TDMR, 0, 0);
        }
        let multiple = region.base % GIB == 0 && region.size % GIB == 0 && region.size != 0;
        if !multiple || !self.is_plain(region) {
            return self.fail(Code::INVALID_TDMR, 0, 0);
        }
        let areas: [Raw; MAX_RESERVED_AREAS] = core::array::from_fn(|j| raw(4 + j));
        let tdmr = Tdmr {
            range: region.range(),
            pamt_1g: raw(1).range(),
            pamt_2m: raw(2).range(),
            pamt_4k: raw(3).range(),
            reserved: self.reserved(region, &areas)?,
        };
        self.pamt_ranges(&tdmr)?;
        self.pamt_overlaps(&tdmr)?;
        self.pamt_in_usable_memory(&tdmr)?;
        self.inside_cmrs(&tdmr)?;
        Ok(tdmr)
    }

    fn reserved(&self, region: Raw, areas: &[Raw]) -> Leaf<Vec<Range>> {
        let mut kept = Vec::new();
        let mut previous_end = 0;
        for (j, area) in areas.iter().enumerate() {
            if area.size == 0 {
                if areas.get(j + 1).is_some_and(|next| next.size != 0) {
                    return self.fail(Code::NON_ORDERED_RESERVED_IN_TDMR, j, 0);
                }
                continue;
            }
            let Some(end) = area.end() else {
                return self.fail(Code::INVALID_RESERVED_IN_TDMR, j, 0);
            };
            if area.base < previous_end {
                return self.fail(Code::NON_ORDERED_RESERVED_IN_TDMR, j, 0);
            }
            if area.base % PAGE != 0 || area.size % PAGE != 0 || end > region.size {
                return self.fail(Code::INVALID_RESERVED_IN_TDMR, j, 0);
            }
            previous_end = end;
            kept.push(area.range());
        }
        Ok(kept)
    }

    fn pamt_ranges(&self, t: &Tdmr) -> Leaf {
        for (size, pamt, entries) in [
            (2, t.pamt_1g, t.range.size >> 30),
            (1, t.pamt_2m, t.range.size >> 21),
            (0, t.pamt_4k, t.range.size >> 12),
        ] {
            let raw = Raw {
                base: pamt.base,
                size: pamt.size,
            };
            let aligned = pamt.base % PAGE == 0 && pamt.size % PAGE == 0;
            if !aligned || !self.is_plain(raw) || pamt.size < entries * 16 {
                return self.fail(Code::INVALID_PAMT, size, 0);
            }
        }
        Ok(())
    }

    fn pamt_overlaps(&self, t: &Tdmr) -> Leaf {
        let own = pamts(t);
        for (j, other) in self.earlier.iter().enumerate() {
            for (size, pamt) in own.iter().enumerate() {
                if pamts(other).iter().any(|o| o.overlaps(*pamt)) {
                    return self.fail(Code::PAMT_OVERLAP, size, j);
                }
            }
        }
        let i = self.i as usize;
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            if own[a].overlaps(own[b]) {
                return self.fail(Code::PAMT_OVERLAP, a, i);
            }
        }
        Ok(())
    }

    fn pamt_in_usable_memory(&self, t: &Tdmr) -> Leaf {
        for (j, region) in self.earlier.iter().chain([t]).enumerate() {
            for (size, pamt) in pamts(t).iter().enumerate() {
                if usable(region).any(|u| u.overlaps(*pamt)) {
                    return self.fail(Code::PAMT_OVERLAP, size, j);
                }
            }
            if j < self.i as usize {
                for (size, pamt) in pamts(region).iter().enumerate() {
                    if usable(t).any(|u| u.overlaps(*pamt)) {
                        let detail = j as u32 | (size as u32) << 8 | self.i << 16;
                        return Err(Code::PAMT_OVERLAP.detail(detail));
                    }
                }
            }
        }
        Ok(())
    }

    fn inside_cmrs(&self, t: &Tdmr) -> Leaf {
        let merged = merge(&self.cfg.cmrs);
        let inside = |r: Range| merged.iter().any(|cmr| cmr.contains(r));
        for size in [2, 1, 0] {
            if !inside(pamts(t)[size]) {
                return self.fail(Code::PAMT_OUTSIDE_CMRS, size, 0);
            }
        }
        if !usable(t).all(inside) {
            return self.fail(Code::TDMR_OUTSIDE_CMRS, 0, 0);
        }
        Ok(())
    }
}

/// 4K, 2M, 1G.
fn pamts(t: &Tdmr) -> [Range; 3] {
    [t.pamt_4k, t.pamt_2m, t.pamt_1g]
}

/// The parts of a region outside its reserved areas.
fn usable(t: &Tdmr) -> impl Iterator<Item = Range> + '_ {
    let starts = std::iter::once(0).chain(t.reserved.iter().map(|r| r.end()));
    let ends = t.reserved.iter().map(|r| r.base).chain([t.range.size]);
    starts
        .zip(ends)
        .filter(|(start, end)| start < end)
        .map(|(start, end)| Range::new(t.range.base + start, end - start))
}

/// Adjacent ranges as one.
fn merge(cmrs: &[Range]) -> Vec<Range> {
    let mut merged: Vec<Range> = Vec::new();
    for cmr in cmrs.iter().filter(|c| c.size != 0) {
        match merged.last_mut() {
            Some(last) if last.end() == cmr.base => last.size += cmr.size,
            _ => merged.push(*cmr),
        }
    }
    merged
}

/// TDH.SYS.TDMR.INIT
pub(super) fn tdmr_init(c: &mut Call<'_, '_>) -> Leaf {
    c.regs.rdx = 0;
    let rcx = c.regs.rcx;
    let tdmr =
        c.p.pamt()?
            .tdmrs
            .iter()
            .find(|t| t.tdmr.range.base == rcx)
            .ok_or(invalid(Operand::RCX))?;
    let _lock = tdmr
        .lock
        .guard(LockMode::Exclusive, Side::Host)
        .ok_or(busy(Operand::RCX))?;
    let done = tdmr.initialised.load(Ordering::Acquire);
    if done >= tdmr.tdmr.range.size {
        return Err(Code::TDMR_ALREADY_INITIALIZED.status());
    }
    let next = done + TDMR_INIT_STEP;
    tdmr.initialised.store(next, Ordering::Release);
    c.regs.rdx = (rcx + next) / GIB * GIB;
    Ok(())
}
