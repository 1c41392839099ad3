//! TDH.MEM.PAGE.DEMOTE and TDH.MEM.PAGE.PROMOTE.

use super::checks::{EntryGuard, MemOp, free_page, lock_target, state_or};
use super::mem::{split_rdx, take_operands};
use super::{Call, Leaf, busy};
use crate::l2::table;
use crate::l2::{MAX_VMS, NO_PAGE};
use crate::lock::{LockMode, Side};
use crate::pamt::{PageSize, PageType};
use crate::platform::Platform;
use crate::sept::{self, Content, SeptState, Table};
use crate::status::{Code, Operand};

fn size_of_level(level: u8) -> PageSize {
    PageSize::from_level(level).unwrap_or(PageSize::Size4K)
}

/// TDH.MEM.PAGE.DEMOTE
pub(super) fn demote(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (rcx, rdx) = take_operands(c);
    let (tdr, sparse) = split_rdx(rdx)?;
    let op = c.mem_sequence(
        rcx,
        tdr,
        (1, 2),
        LockMode::Shared,
        state_or(SeptState::is_demotable),
    )?;
    let (large, size) = op.target(p);
    c.check_tracked(&op, p.known_entry(large, size)?.bepoch())?;
    let table_pa = c.regs.r8;
    let page = free_page(p, table_pa, PageSize::Size4K, Operand::R8)?;
    let at = op.aliased(p);
    let l2_pages = [c.regs.r9, c.regs.r10, c.regs.r11];
    let mut shown = l2_pages;
    let l2_split = table::check_split(&at, l2_pages, sparse, &mut shown)?;
    if c.this.host_event_pending() {
        (c.regs.rcx, c.regs.rdx) = (rcx, rdx);
        return Err(Code::INTERRUPTED_RESTARTABLE.status());
    }
    let l2_tables = l2_split.reach(&at).map_err(|refused| c.refused(refused))?;
    let (large_entry, _large) = lock_target(p, large, size)?;
    let slot = sept::new_table(&p.tables, table_pa).ok_or(busy(Operand::R8))?;
    let table = p.tables.get(slot).ok_or(busy(Operand::R8))?;
    let small = size_of_level(op.level - 1);
    let state = op.state().unblocked();
    for (k, child) in table.entries.iter().enumerate() {
        let pa = large + k as u64 * small.bytes();
        let entry = p.known_entry(pa, small)?;
        entry.set(PageType::Reg, op.td.pa());
        entry.set_bepoch(0);
        child.set(Content::leaf(state, pa));
    }
    for l2_table in &l2_tables {
        l2_table.split(&at, large, small, state == SeptState::Mapped)?;
    }
    [c.regs.r9, c.regs.r10, c.regs.r11] = shown;
    // Children first: a reader that sees the large entry free also sees the entries below it.
    large_entry.set_nda();
    page.entry.set(PageType::Ept, op.td.pa());
    op.td.add_children(1);
    op.set(Content::table(slot));
    Ok(())
}

/// All children of a table, locked, and their common properties.
struct Children<'p> {
    state: SeptState,
    base: u64,
    _locks: Vec<EntryGuard<'p>>,
}

enum Refused {
    Busy,
    Conditions,
}

/// Locks the children in order and checks that together they are one large page.
fn lock_children<'p>(table: &'p Table, small: PageSize) -> Result<Children<'p>, Refused> {
    let mut locks = Vec::with_capacity(512);
    let mut first = Content::FREE;
    for (k, child) in table.entries.iter().enumerate() {
        if !child.word().try_lock(Side::Host) {
            return Err(Refused::Busy);
        }
        locks.push(EntryGuard(child));
        let content = child.get();
        let (state, pa) = (content.state(), content.hpa());
        let fits = if k == 0 {
            first = content;
            state.is_open_leaf() && pa % (small.bytes() * 512) == 0
        } else {
            state == first.state() && pa == first.hpa() + k as u64 * small.bytes()
        };
        if !fits {
            return Err(Refused::Conditions);
        }
    }
    Ok(Children {
        state: first.state(),
        base: first.hpa(),
        _locks: locks,
    })
}

/// TDH.MEM.PAGE.PROMOTE
pub(super) fn promote(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    if c.version != 0 {
        (c.regs.r9, c.regs.r10, c.regs.r11) = (NO_PAGE, NO_PAGE, NO_PAGE);
    }
    let (rcx, rdx) = take_operands(c);
    c.max_version(1)?;
    let op = c.mem_sequence(
        rcx,
        rdx,
        (1, 2),
        LockMode::Shared,
        state_or(SeptState::is_table),
    )?;
    let (table_pa, _) = op.target(p);
    let (table_entry, _table_page) = lock_target(p, table_pa, PageSize::Size4K)?;
    c.check_tracked(&op, table_entry.bepoch())?;
    let slot = op.content.slot();
    let table = p.tables.get(slot).ok_or(busy(Operand::RCX))?;
    let children = lock_children(table, size_of_level(op.level - 1)).map_err(|refused| {
        c.show(op.details());
        match refused {
            Refused::Busy => busy(Operand::RCX),
            Refused::Conditions => Code::EPT_INVALID_PROMOTE_CONDITIONS.on(Operand::RCX),
        }
    })?;
    if c.this.host_event_pending() {
        (c.regs.rcx, c.regs.rdx) = (rcx, rdx);
        return Err(Code::INTERRUPTED_RESTARTABLE.status());
    }
    let at = op.aliased(p);
    let l2_tables = table::merged(&at).inspect_err(|status| {
        if status.code() == Code::EPT_INVALID_PROMOTE_CONDITIONS {
            c.show(op.details());
        }
    })?;
    merge(p, &op, &children)?;
    let mut pages = [NO_PAGE; MAX_VMS];
    for l2_table in l2_tables {
        l2_table.merge(&at, &mut pages);
    }
    if c.version != 0 {
        [c.regs.r9, c.regs.r10, c.regs.r11] = pages;
    }
    drop(children);
    p.tables.free(slot);
    table_entry.set_nda();
    op.td.remove_children(1);
    c.regs.rcx = table_pa;
    Ok(())
}

fn merge(p: &Platform, op: &MemOp<'_>, children: &Children<'_>) -> Leaf {
    let (large_entry, _large) = lock_target(p, children.base, size_of_level(op.level))?;
    let small = size_of_level(op.level - 1);
    for k in 0..512 {
        p.known_entry(children.base + k * small.bytes(), small)?
            .set_nda();
    }
    large_entry.set(PageType::Reg, op.td.pa());
    op.set(Content::leaf(children.state, children.base));
    Ok(())
}
