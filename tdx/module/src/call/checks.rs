//! Check sequences that many leaves share.

use super::{Call, Leaf, busy, invalid};
use crate::config::Range;
use crate::l2::alias::Aliased;
use crate::lock::{Guard, LockMode, Side};
use crate::op_state::{self, OpState};
use crate::pamt::{Entry, PageRef, PageSize, PageType, Pamt, WalkError};
use crate::platform::Platform;
use crate::sept::{Content, SeptState, Walked};
use crate::status::{Code, Operand};
use crate::td::{Lifecycle, Td};
use crate::vcpu::Vcpu;
use std::sync::atomic::Ordering;

/// Only bits 51:12 (less the alignment) of an address, and no key id.
pub(crate) fn private_operand(p: &Platform, pa: u64, size: u64, op: Operand) -> Leaf {
    if pa & (size - 1) != 0 || pa >> 52 != 0 || pa & p.cfg.keyid_mask() != 0 {
        return Err(invalid(op));
    }
    Ok(())
}

/// A shared buffer of `size` bytes, aligned to its size; returns its address without key id.
pub(crate) fn shared_operand(p: &Platform, pa: u64, size: u64, op: Operand) -> Leaf<u64> {
    let at = p.cfg.strip(pa);
    if pa & (size - 1) != 0
        || pa >> 52 != 0
        || p.cfg.keyid_of(pa) >= u64::from(p.cfg.private_hkids.0)
        || p.cfg.seamrr.overlaps(Range::new(at, size))
    {
        return Err(invalid(op));
    }
    Ok(at)
}

impl Platform {
    /// The metadata; absent only before the module is ready.
    pub(crate) fn pamt(&self) -> Leaf<&Pamt> {
        self.pamt.get().ok_or(Code::SYS_NOT_READY.status())
    }

    /// The entry of a page the module itself knows to exist.
    pub(crate) fn known_entry(&self, pa: u64, size: PageSize) -> Leaf<&Entry> {
        self.pamt()?
            .entry(pa, size)
            .ok_or(Code::PAGE_METADATA_INCORRECT.status())
    }
}

/// Address, range and lock of a page named by a register.
pub(crate) fn explicit_page<'p>(
    p: &'p Platform,
    pa: u64,
    size: PageSize,
    mode: LockMode,
    op: Operand,
) -> Leaf<PageRef<'p>> {
    private_operand(p, pa, size.bytes(), op)?;
    walk_page(p, pa, size, mode, op)
}

pub(crate) fn walk_page<'p>(
    p: &'p Platform,
    pa: u64,
    size: PageSize,
    mode: LockMode,
    op: Operand,
) -> Leaf<PageRef<'p>> {
    p.pamt()?.walk(pa, size, mode).map_err(|e| match e {
        WalkError::OutOfRange => Code::OPERAND_ADDR_RANGE_ERROR.on(op),
        WalkError::Busy => busy(op),
    })
}

/// An unassigned page the host gives.
pub(crate) fn free_page<'p>(
    p: &'p Platform,
    pa: u64,
    size: PageSize,
    op: Operand,
) -> Leaf<PageRef<'p>> {
    let page = explicit_page(p, pa, size, LockMode::Exclusive, op)?;
    if page.is_free(size) {
        Ok(page)
    } else {
        Err(Code::PAGE_METADATA_INCORRECT.on(op))
    }
}

fn typed_page<'p>(
    p: &'p Platform,
    pa: u64,
    mode: LockMode,
    op: Operand,
    page_type: PageType,
) -> Leaf<PageRef<'p>> {
    let page = explicit_page(p, pa, PageSize::Size4K, mode, op)?;
    if page.size == PageSize::Size4K && page.entry.page_type() == page_type {
        Ok(page)
    } else {
        Err(Code::PAGE_METADATA_INCORRECT.on(op))
    }
}

/// A TD, with its TDR page locked.
pub(crate) struct TdRef<'p> {
    pub(crate) td: &'p Td,
    pub(crate) page: PageRef<'p>,
}

/// A TD named by a register.
pub(crate) fn tdr(p: &Platform, pa: u64, mode: LockMode, op: Operand) -> Leaf<TdRef<'_>> {
    let page = typed_page(p, pa, mode, op, PageType::Tdr)?;
    let td = p
        .tds
        .get(page.entry.slot())
        .ok_or(Code::PAGE_METADATA_INCORRECT.on(op))?;
    Ok(TdRef { td, page })
}

/// A TD reached through the owner of a page, with only its 4K entry locked.
pub(crate) struct ImplicitTd<'p> {
    pub(crate) td: &'p Td,
    pub(crate) slot: u32,
    pub(crate) guard: Guard<'p>,
}

pub(crate) fn implicit_tdr(p: &Platform, pa: u64, mode: LockMode) -> Leaf<ImplicitTd<'_>> {
    let wrong = Code::PAGE_METADATA_INCORRECT.on(Operand::TDR);
    let entry = p.known_entry(pa, PageSize::Size4K)?;
    let guard = entry
        .lock
        .guard(mode, Side::Host)
        .ok_or(busy(Operand::TDR))?;
    if entry.page_type() != PageType::Tdr {
        return Err(wrong);
    }
    let slot = entry.slot();
    Ok(ImplicitTd {
        td: p.tds.get(slot).ok_or(wrong)?,
        slot,
        guard,
    })
}

/// A vCPU named by a register, with its TDVPR page locked.
pub(crate) struct VcpuRef<'p> {
    pub(crate) vcpu: &'p Vcpu,
    pub(crate) slot: u32,
    pub(crate) page: PageRef<'p>,
}

pub(crate) fn tdvpr(p: &Platform, pa: u64, mode: LockMode, op: Operand) -> Leaf<VcpuRef<'_>> {
    let page = typed_page(p, pa, mode, op, PageType::Tdvpr)?;
    let slot = page.entry.slot();
    let vcpu = p
        .vcpus
        .get(slot)
        .ok_or(Code::PAGE_METADATA_INCORRECT.on(op))?;
    Ok(VcpuRef { vcpu, slot, page })
}

impl Call<'_, '_> {
    /// The TD can be worked with by this leaf; `lock` says whether the leaf shares the op_state lock.
    pub(crate) fn td_state<'t>(&self, td: &'t Td, lock: bool) -> Leaf<Option<Guard<'t>>> {
        self.td_state_in(td, lock.then_some(LockMode::Shared))
    }

    /// The same for leaves that may take the op_state lock alone.
    pub(crate) fn td_state_in<'t>(
        &self,
        td: &'t Td,
        lock: Option<LockMode>,
    ) -> Leaf<Option<Guard<'t>>> {
        let lock = lock.map(|mode| (mode, Side::Host));
        td_in_state(td, lock, |state| op_state::allows(self.leaf, state))
    }
}

/// The TD can be worked with, and is in one of some states; `lock` says how the op_state lock is taken.
pub(crate) fn td_in_state(
    td: &Td,
    lock: Option<(LockMode, Side)>,
    allowed: impl Fn(OpState) -> bool,
) -> Leaf<Option<Guard<'_>>> {
    if td.is_fatal() {
        return Err(Code::TD_FATAL.status());
    }
    if td.lifecycle() != Lifecycle::KeysConfigured {
        return Err(Code::TD_KEYS_NOT_CONFIGURED.status());
    }
    if td.num_tdcx.load(Ordering::Acquire) < crate::config::TDCS_BASE_PAGES {
        return Err(Code::TDCS_NOT_ALLOCATED.status());
    }
    let guard = match lock {
        Some((mode, side)) => {
            let guard = td.op_state_lock.guard(mode, side);
            Some(guard.ok_or(busy(Operand::OP_STATE))?)
        }
        None => None,
    };
    if !allowed(td.op_state()) {
        return Err(Code::OP_STATE_INCORRECT.status());
    }
    Ok(guard)
}

/// GPA and level of an operand, syntactically: level and reserved bits, alignment to the level.
pub(crate) fn gpa_operand(rcx: u64, levels: core::ops::RangeInclusive<u8>) -> Option<(u64, u8)> {
    let level = (rcx & 7) as u8;
    let gpa = rcx & 0x000F_FFFF_FFFF_F000;
    let reserved = rcx & !(0x000F_FFFF_FFFF_F000 | 7);
    let aligned = || gpa & ((1u64 << (12 + 9 * u32::from(level))) - 1) == 0;
    (reserved == 0 && levels.contains(&level) && aligned()).then_some((gpa, level))
}

/// GPA and level of a register, checked for the TD.
pub(crate) fn tree_gpa(
    td: &Td,
    rcx: u64,
    levels: core::ops::RangeInclusive<u8>,
) -> Leaf<(u64, u8)> {
    gpa_operand(rcx, levels)
        .filter(|(gpa, _)| td.is_valid_private_gpa(*gpa))
        .ok_or(invalid(Operand::RCX))
}

/// A locked Secure-EPT entry.
pub(crate) struct EntryGuard<'p>(pub(crate) &'p crate::sept::SeptEntry);

impl Drop for EntryGuard<'_> {
    fn drop(&mut self) {
        self.0.word().unlock();
    }
}

/// Operands and locks of a memory leaf after its common checks.
pub(crate) struct MemOp<'p> {
    pub(crate) td: &'p Td,
    pub(crate) gpa: u64,
    pub(crate) level: u8,
    pub(crate) walked: Walked<'p>,
    pub(crate) content: Content,
    // Released in this order.
    _entry: EntryGuard<'p>,
    _tree: Guard<'p>,
    _op_state: Option<Guard<'p>>,
    _tdr: TdRef<'p>,
}

impl<'p> MemOp<'p> {
    /// The entry's counterparts in the trees of L2 VMs.
    pub(crate) fn aliased(&self, p: &'p Platform) -> Aliased<'p> {
        Aliased {
            p,
            td: self.td,
            gpa: self.gpa,
            level: self.level,
        }
    }
}

impl MemOp<'_> {
    pub(crate) fn state(&self) -> SeptState {
        self.content.state()
    }

    pub(crate) fn details(&self) -> (u64, u64) {
        crate::sept::details(self.content, self.level)
    }

    /// The page (or table page) the entry points to, and its size.
    pub(crate) fn target(&self, p: &Platform) -> (u64, PageSize) {
        target(p, self.content, self.level)
    }

    pub(crate) fn set(&self, content: Content) {
        self.walked.entry.set(content);
    }

    /// Tracking applies: vCPUs may have run.
    pub(crate) fn needs_tlb_tracking(&self) -> bool {
        self.td.op_state().needs_tlb_tracking()
    }
}

/// The page (or table page) an entry points to, and its size.
pub(crate) fn target(p: &Platform, content: Content, level: u8) -> (u64, PageSize) {
    match content.state() {
        SeptState::NlMapped | SeptState::NlBlocked => (
            p.tables
                .get(content.slot())
                .map_or(0, crate::sept::Table::hpa),
            PageSize::Size4K,
        ),
        _ => (
            content.hpa(),
            PageSize::from_level(level).unwrap_or(PageSize::Size4K),
        ),
    }
}

/// Levels a leaf takes: from the first to the second, the latter bounded by the TD's own.
pub(crate) type Levels = (u8, u8);

/// Up to the TD's uppermost level.
pub(crate) const TOP: u8 = u8::MAX;

impl<'p> Call<'p, '_> {
    /// Puts "S-EPT details" in RCX and RDX.
    pub(crate) fn show(&mut self, (rcx, rdx): (u64, u64)) {
        self.regs.rcx = rcx;
        self.regs.rdx = rdx;
    }

    /// The sequence of checks common to memory leaves. RCX and RDX have been saved by the caller and are 0.
    pub(crate) fn mem_sequence(
        &mut self,
        rcx: u64,
        rdx: u64,
        (first, last): Levels,
        tree: LockMode,
        accepts: impl Fn(SeptState) -> Result<(), Code>,
    ) -> Leaf<MemOp<'p>> {
        let p = self.p;
        let tdr = tdr(p, rdx, LockMode::Shared, Operand::RDX)?;
        let td = tdr.td;
        let op_state = self.td_state(td, true)?;
        let (gpa, level) = tree_gpa(td, rcx, first..=last.min(td.levels().saturating_sub(1)))?;
        let tree = td
            .tree
            .guard(tree, Side::Host)
            .ok_or(busy(Operand::SEPT_TREE))?;
        loop {
            let Some(walked) = td.walk(&p.tables, gpa, level) else {
                return Err(self.without_root(gpa, level, |state| {
                    accepts(state).map_err(|code| code.on(Operand::RCX))
                }));
            };
            if walked.level != level {
                self.show(walked.details());
                return Err(Code::EPT_WALK_FAILED.on(Operand::RCX));
            }
            if !walked.entry.word().try_lock(Side::Host) {
                self.show(walked.details());
                return Err(busy(Operand::RCX));
            }
            let entry = EntryGuard(walked.entry);
            if !walked.is_current() {
                continue;
            }
            let content = walked.entry.get();
            if let Err(code) = accepts(content.state()) {
                self.show(crate::sept::details(content, level));
                return Err(code.on(Operand::RCX));
            }
            return Ok(MemOp {
                td,
                gpa,
                level,
                walked,
                content,
                _entry: entry,
                _tree: tree,
                _op_state: op_state,
                _tdr: tdr,
            });
        }
    }

    /// In a TD that runs the entry must be blocked and no vCPU may still use it.
    pub(crate) fn check_tracked(&mut self, op: &MemOp<'_>, bepoch: u64) -> Leaf {
        if !op.needs_tlb_tracking() || !op.state().needs_tlb_tracking() {
            return Ok(());
        }
        if !op.state().is_blocked() {
            // The accept counter is not shown here, unlike in the details of other errors.
            self.show(crate::sept::details(op.content.with_accepted(0), op.level));
            return Err(Code::GPA_RANGE_NOT_BLOCKED.on(Operand::RCX));
        }
        if !op.td.is_tracked(bepoch) {
            return Err(Code::TLB_TRACKING_NOT_DONE.on(Operand::RCX));
        }
        Ok(())
    }
}

/// `OPERAND_BUSY` of the exclusive lock on a page the entry points to.
pub(crate) fn lock_target(p: &Platform, pa: u64, size: PageSize) -> Leaf<(&Entry, Guard<'_>)> {
    let entry = p.known_entry(pa, size)?;
    let guard = entry
        .lock
        .guard(LockMode::Exclusive, Side::Host)
        .ok_or(busy(Operand::RCX))?;
    Ok((entry, guard))
}

/// Maps a state predicate to the usual status.
pub(crate) fn state_or(
    accepted: impl Fn(SeptState) -> bool,
) -> impl Fn(SeptState) -> Result<(), Code> {
    move |s| {
        if accepted(s) {
            Ok(())
        } else {
            Err(Code::EPT_ENTRY_STATE_INCORRECT)
        }
    }
}
