//! Private memory: tables, pages, blocking and tracking.

use super::checks::{
    EntryGuard, MemOp, TOP, TdRef, free_page, lock_target, state_or, tdr, tree_gpa,
};
use super::{Call, Leaf, busy, invalid, shared_operand};
use crate::l2::table::{self, Refused};
use crate::l2::{MAX_VMS, NO_PAGE, PAGE_UNUSED};
use crate::lock::{LockMode, Side};
use crate::pamt::{PageRef, PageSize, PageType};
use crate::platform::Platform;
use crate::sept::{self, Content, SeptState, Walked};
use crate::status::{Code, Operand, Status};
use crate::td::Td;
use std::sync::atomic::Ordering;

/// RDX bits beside the TDR address: 11:1 and 63:52 must be 0, bit 0 is a flag.
const RDX_RESERVED: u64 = 0xFFF0_0000_0000_0FFE;

/// RCX and RDX, zeroed in the registers.
pub(crate) fn take_operands(c: &mut Call<'_, '_>) -> (u64, u64) {
    let operands = (c.regs.rcx, c.regs.rdx);
    (c.regs.rcx, c.regs.rdx) = (0, 0);
    operands
}

/// TDR address and flag of an RDX that may carry the flag.
pub(super) fn split_rdx(rdx: u64) -> Leaf<(u64, bool)> {
    if rdx & RDX_RESERVED != 0 {
        return Err(invalid(Operand::RDX));
    }
    Ok((rdx & !1, rdx & 1 != 0))
}

/// TDH.MEM.SEPT.ADD
pub(super) fn sept_add(c: &mut Call<'_, '_>) -> Leaf {
    let operands @ (rcx, rdx) = take_operands(c);
    c.max_version(1)?;
    let versioned = c.version == 1;
    let r8 = c.regs.r8;
    let strip = |r: u64| if r == NO_PAGE { r } else { r & !PAGE_UNUSED };
    // Version 0 knows nothing of L2 VMs.
    let l2 = match versioned {
        true => [c.regs.r9, c.regs.r10, c.regs.r11].map(strip),
        false => [NO_PAGE; MAX_VMS],
    };
    let mut shown = l2;
    if versioned {
        c.regs.r8 = strip(r8);
        [c.regs.r9, c.regs.r10, c.regs.r11] = l2;
    }
    let (tdr, allow_existing) = split_rdx(rdx)?;
    let op = c.mem_sequence(
        rcx,
        tdr,
        (1, TOP),
        LockMode::Shared,
        state_or(|s| matches!(s, SeptState::Free | SeptState::NlMapped)),
    )?;
    let page = l1_page(c, &op, r8, allow_existing)?;
    let p = c.p;
    let at = op.aliased(p);
    let l2_tables = table::check_added(&at, l2, allow_existing, &mut shown);
    if versioned {
        [c.regs.r9, c.regs.r10, c.regs.r11] = shown;
    }
    let l2_tables = l2_tables.map_err(|refused| c.refused(refused))?;
    let mut added = false;
    if let Some(page) = page {
        let slot = sept::new_table(&p.tables, strip(r8)).ok_or(busy(Operand::R8))?;
        op.set(Content::table(slot));
        page.entry.set(PageType::Ept, op.td.pa());
        page.entry.set_bepoch(0);
        op.td.add_children(1);
        added = true;
        if versioned {
            c.regs.r8 = NO_PAGE;
        }
    }
    for l2_table in l2_tables {
        if added && c.this.host_event_pending() {
            c.show(operands);
            return Err(Code::INTERRUPTED_RESUMABLE.status());
        }
        l2_table.add(&at)?;
        *c.l2_page(l2_table.vm) = NO_PAGE;
        added = true;
    }
    Ok(())
}

/// TDH.MEM.SEPT.ADD: the page for L1's table, unless one exists and may. R8 shows that the page is not used.
fn l1_page<'p>(
    c: &mut Call<'p, '_>,
    op: &MemOp<'_>,
    r8: u64,
    allow_existing: bool,
) -> Leaf<Option<PageRef<'p>>> {
    let exists = op.state() == SeptState::NlMapped;
    let given = r8 != NO_PAGE;
    if !given && c.version == 0 {
        return Err(invalid(Operand::R8));
    }
    match (exists, given) {
        (false, true) => {
            let pa = r8 & !PAGE_UNUSED;
            return free_page(c.p, pa, PageSize::Size4K, Operand::R8).map(Some);
        }
        (true, false) => {}
        (true, true) if allow_existing && c.version == 1 => c.regs.r8 |= PAGE_UNUSED,
        (true, true) if allow_existing => {}
        _ => {
            c.show(op.details());
            return Err(Code::EPT_ENTRY_STATE_INCORRECT.on(Operand::RCX));
        }
    }
    Ok(None)
}

impl Call<'_, '_> {
    /// The register that names the page for an L2 VM's tree.
    fn l2_page(&mut self, vm: usize) -> &mut u64 {
        match vm {
            1 => &mut self.regs.r9,
            2 => &mut self.regs.r10,
            _ => &mut self.regs.r11,
        }
    }

    /// Shows the details, if there are any.
    pub(super) fn refused(&mut self, refused: Refused) -> Status {
        if let Some(details) = refused.details {
            self.show(details);
        }
        refused.status
    }
}

/// TDH.MEM.PAGE.ADD
pub(super) fn page_add(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (rcx, rdx) = take_operands(c);
    let (target, source) = (c.regs.r8, c.regs.r9);
    let TdRef { td, page: _tdr } = tdr(p, rdx, LockMode::Exclusive, Operand::RDX)?;
    c.td_state(td, false)?;
    let (gpa, level) = tree_gpa(td, rcx, 0..=0)?;
    let walked = walk(p, td, gpa, level)?;
    if walked.level != level {
        c.show(walked.details());
        return Err(Code::EPT_WALK_FAILED.on(Operand::RCX));
    }
    if walked.content.state() != SeptState::Free {
        c.show(walked.details());
        return Err(Code::EPT_ENTRY_STATE_INCORRECT.on(Operand::RCX));
    }
    let source = shared_operand(p, source, 4096, Operand::R9)?;
    let page = free_page(p, target, PageSize::Size4K, Operand::R8)?;
    let mut bytes = [0; 4096];
    p.mem.host_read(source, &mut bytes);
    // A write of whole lines does not depend on the old contents.
    let _ = p.mem.private_write(target, &bytes, td.key().as_deref());
    page.entry.set(PageType::Reg, td.pa());
    page.entry.set_bepoch(0);
    td.add_children(1);
    walked.entry.set(Content::leaf(SeptState::Mapped, target));
    td.measurement().page_add(gpa);
    Ok(())
}

pub(super) fn walk<'p>(p: &'p Platform, td: &Td, gpa: u64, level: u8) -> Leaf<Walked<'p>> {
    td.walk(&p.tables, gpa, level)
        .ok_or(Code::EPT_WALK_FAILED.on(Operand::RCX))
}

/// TDH.MEM.PAGE.AUG
pub(super) fn page_aug(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (rcx, rdx) = take_operands(c);
    let op = c.mem_sequence(
        rcx,
        rdx,
        (0, 1),
        LockMode::Shared,
        state_or(SeptState::is_empty),
    )?;
    let pa = c.regs.r8;
    let size = PageSize::from_level(op.level).unwrap_or(PageSize::Size4K);
    let page = free_page(p, pa, size, Operand::R8)?;
    page.entry.set(PageType::Reg, op.td.pa());
    page.entry.set_bepoch(0);
    op.td.add_children(size.pages());
    op.set(Content::leaf(SeptState::Pending, pa));
    Ok(())
}

/// TDH.MEM.RANGE.BLOCK
pub(super) fn range_block(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (rcx, rdx) = take_operands(c);
    let op = c.mem_sequence(rcx, rdx, (0, TOP), LockMode::Exclusive, |s| match s {
        s if s.is_blocked() => Err(Code::GPA_RANGE_ALREADY_BLOCKED),
        s if s.is_blockable() => Ok(()),
        _ => Err(Code::EPT_ENTRY_STATE_INCORRECT),
    })?;
    let (pa, size) = op.target(p);
    p.known_entry(pa, size)?.set_bepoch(op.td.current_epoch());
    op.aliased(p).block();
    op.set(op.content.with_state(op.state().blocked()));
    Ok(())
}

/// TDH.MEM.RANGE.UNBLOCK
pub(super) fn range_unblock(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (rcx, rdx) = take_operands(c);
    let op = c.mem_sequence(
        rcx,
        rdx,
        (0, TOP),
        LockMode::Exclusive,
        state_or(SeptState::is_blocked),
    )?;
    let (pa, size) = op.target(p);
    c.check_tracked(&op, p.known_entry(pa, size)?.bepoch())?;
    let state = op.state().unblocked();
    // An alias of a page that is still pending stays blocked until the page is accepted.
    if state != SeptState::Pending {
        op.aliased(p).unblock();
    }
    op.set(op.content.with_state(state));
    Ok(())
}

/// TDH.MEM.PAGE.REMOVE
pub(super) fn page_remove(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (rcx, rdx) = take_operands(c);
    let op = c.mem_sequence(
        rcx,
        rdx,
        (0, 2),
        LockMode::Shared,
        state_or(SeptState::is_removable),
    )?;
    let (pa, size) = op.target(p);
    let (entry, _page) = lock_target(p, pa, size)?;
    c.check_tracked(&op, entry.bepoch())?;
    op.aliased(p).free();
    op.set(op.td.emptied());
    entry.set_nda();
    op.td.remove_children(size.pages());
    c.regs.rcx = pa;
    Ok(())
}

/// TDH.MEM.SEPT.REMOVE
pub(super) fn sept_remove(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    if c.version != 0 {
        (c.regs.r9, c.regs.r10, c.regs.r11) = (NO_PAGE, NO_PAGE, NO_PAGE);
    }
    let (rcx, rdx) = take_operands(c);
    c.max_version(1)?;
    let op = c.mem_sequence(
        rcx,
        rdx,
        (1, TOP),
        LockMode::Exclusive,
        state_or(SeptState::is_table),
    )?;
    let (pa, size) = op.target(p);
    let (entry, _page) = lock_target(p, pa, size)?;
    c.check_tracked(&op, entry.bepoch())?;
    let slot = op.content.slot();
    if !p.tables.get(slot).is_some_and(sept::Table::all_free) {
        c.show(op.details());
        return Err(Code::EPT_PAGE_NOT_FREE.on(Operand::RCX));
    }
    let at = op.aliased(p);
    let l2_tables = table::removed(&at)?;
    let mut pages = [NO_PAGE; MAX_VMS];
    for l2_table in l2_tables {
        l2_table.remove(&at, &mut pages);
    }
    if c.version != 0 {
        [c.regs.r9, c.regs.r10, c.regs.r11] = pages;
    }
    op.set(Content::FREE);
    p.tables.free(slot);
    entry.set_nda();
    op.td.remove_children(1);
    c.regs.rcx = pa;
    Ok(())
}

/// TDH.MEM.SEPT.RD
pub(super) fn sept_rd(c: &mut Call<'_, '_>) -> Leaf {
    let (rcx, rdx) = take_operands(c);
    let (tdr_pa, l2_attributes) = split_rdx(rdx)?;
    if l2_attributes {
        // Checked between the TD's state and the GPA.
        let TdRef { td, page: _page } = tdr(c.p, tdr_pa, LockMode::Shared, Operand::RDX)?;
        c.td_state(td, true)?;
        if !td.is_debug() {
            return Err(invalid(Operand::RDX));
        }
    }
    let op = c.mem_sequence(rcx, tdr_pa, (0, TOP), LockMode::Shared, |_| Ok(()))?;
    if l2_attributes {
        c.regs.r8 = op.aliased(c.p).attributes().0;
    }
    c.show(op.details());
    Ok(())
}

/// TDH.MEM.TRACK
pub(super) fn track(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let TdRef { td, page: _page } = tdr(p, c.regs.rcx, LockMode::Shared, Operand::RCX)?;
    let _op_state = c.td_state(td, true)?;
    let _epoch = td
        .epoch_lock
        .guard(LockMode::Exclusive, Side::Host)
        .ok_or(busy(Operand::TD_EPOCH))?;
    let epoch = td.current_epoch();
    if td.refcount[1 - (epoch & 1) as usize].load(Ordering::Acquire) != 0 {
        return Err(Code::PREVIOUS_TLB_EPOCH_BUSY.status());
    }
    td.epoch.store(epoch + 1, Ordering::Release);
    Ok(())
}

/// TDH.MEM.PAGE.RELOCATE
pub(super) fn page_relocate(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (rcx, rdx) = take_operands(c);
    let op = c.mem_sequence(
        rcx,
        rdx,
        (0, 0),
        LockMode::Shared,
        state_or(SeptState::is_leaf),
    )?;
    let new = c.regs.r8;
    let (old, size) = op.target(p);
    if new == old {
        return Err(invalid(Operand::R8));
    }
    let (entry, _page) = lock_target(p, old, size)?;
    c.check_tracked(&op, entry.bepoch())?;
    let page = free_page(p, new, size, Operand::R8)?;
    let state = op.state().unblocked();
    if !state.is_pending() {
        copy_private(p, &op, old, new)?;
    }
    op.aliased(p).relocate(new, !state.is_pending());
    op.set(op.content.with_state(state).with_page(new));
    page.entry.set(PageType::Reg, op.td.pa());
    page.entry.set_bepoch(0);
    entry.set_nda();
    c.regs.rcx = old;
    Ok(())
}

fn copy_private(p: &Platform, op: &MemOp<'_>, from: u64, to: u64) -> Leaf {
    let key = op.td.key();
    let mut bytes = [0; 4096];
    p.mem
        .private_read(from, &mut bytes, key.as_deref())
        .and_then(|()| p.mem.private_write(to, &bytes, key.as_deref()))
        .map_err(|_| poison(op.td))
}

/// The module met corrupted private memory. Hardware takes a machine check in SEAM mode; here the TD is lost
/// and the module lives on.
pub(crate) fn poison(td: &Td) -> crate::status::Status {
    td.fatal.store(true, Ordering::Release);
    Code::TD_FATAL.status()
}

/// A mapped page the module itself is to read or write.
pub(super) fn mapped_address(
    walked: &Walked<'_>,
    content: Content,
    gpa: u64,
    write: bool,
) -> Option<u64> {
    let state = content.state();
    let accessible = if write {
        state.is_guest_writable()
    } else {
        state.is_guest_readable()
    };
    let size = PageSize::from_level(walked.level)?;
    accessible.then(|| content.hpa() + (gpa & (size.bytes() - 1)))
}

/// TDH.MEM.RD and TDH.MEM.WR
pub(super) fn rd_wr(c: &mut Call<'_, '_>, write: bool) -> Leaf {
    let p = c.p;
    let (gpa, rdx) = take_operands(c);
    let value = c.regs.r8;
    c.regs.r8 = 0;
    let TdRef { td, page: _page } = tdr(p, rdx, LockMode::Shared, Operand::RDX)?;
    let _op_state = c.td_state(td, true)?;
    if !td.is_debug() {
        return Err(Code::TD_NON_DEBUG.status());
    }
    if gpa & 7 != 0 {
        return Err(invalid(Operand::RCX));
    }
    let _tree = td
        .tree
        .guard(LockMode::Shared, Side::Host)
        .ok_or(busy(Operand::SEPT_TREE))?;
    if !td.is_valid_private_gpa(gpa) {
        return Err(invalid(Operand::RCX));
    }
    let not_present = Code::EPT_ENTRY_NOT_PRESENT.on(Operand::RCX);
    let walked = walk(p, td, gpa, 0)?;
    if mapped_address(&walked, walked.content, gpa, write).is_none() {
        c.show(walked.details());
        return Err(not_present);
    }
    if !walked.entry.word().try_lock(Side::Host) {
        c.show(walked.details());
        return Err(busy(Operand::RCX));
    }
    let _entry = EntryGuard(walked.entry);
    let now = walked.entry.get();
    let at = mapped_address(&walked, now, gpa, write).filter(|_| walked.is_current());
    let Some(at) = at else {
        c.show(sept::details(now, walked.level));
        return Err(not_present);
    };
    let key = td.key();
    let mut old = [0; 8];
    p.mem
        .private_read(at, &mut old, key.as_deref())
        .map_err(|_| poison(td))?;
    if write {
        p.mem
            .private_write(at, &value.to_le_bytes(), key.as_deref())
            .map_err(|_| poison(td))?;
    }
    c.regs.r8 = u64::from_le_bytes(old);
    Ok(())
}
