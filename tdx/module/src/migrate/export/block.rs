//! TDH.EXPORT.BLOCKW, UNBLOCKW and RESTORE: states of pages under export.

use crate::call::{Call, Leaf, busy, mem_operands, state_or, tdr};
use crate::lock::{LockMode, Side};
use crate::migrate::entries::{GpaList, LockedLeaf};
use crate::migrate::lists::Outcome;
use crate::sept::SeptState as S;
use crate::status::Operand;
use crate::td::Td;

/// TDH.EXPORT.BLOCKW
pub(crate) fn blockw(c: &mut Call<'_, '_>) -> Leaf {
    change_listed(c, |td, leaf| {
        let to = match leaf.content.state() {
            S::Mapped => S::BlockedW,
            S::ExportedDirty => S::ExportedDirtyBlockedW,
            S::Pending => S::PendingBlockedW,
            S::PendingExportedDirty => S::PendingExportedDirtyBlockedW,
            _ => return Err(Outcome::StateIncorrect),
        };
        leaf.set(leaf.content.with_state(to).read_only());
        td.migration().bw_epoch = td.current_epoch();
        Ok(())
    })
}

/// TDH.EXPORT.RESTORE
pub(crate) fn restore(c: &mut Call<'_, '_>) -> Leaf {
    change_listed(c, |td, leaf| {
        let state = leaf.content.state();
        if !state.is_exported() {
            return Err(Outcome::StateIncorrect);
        }
        leaf.set(leaf.content.with_state(state.settled()));
        let mut m = td.migration();
        m.mig_count = m.mig_count.wrapping_sub(1);
        Ok(())
    })
}

/// Changes the entry of each page of the GPA list in RCX, of the TD in RDX.
fn change_listed(
    c: &mut Call<'_, '_>,
    mut change: impl FnMut(&Td, &LockedLeaf<'_>) -> Result<(), Outcome>,
) -> Leaf {
    let p = c.p;
    let tdr = tdr(p, c.regs.rdx, LockMode::Shared, Operand::RDX)?;
    let td = tdr.td;
    let _op_state = c.td_state(td, true)?;
    let _tree = td
        .tree
        .guard(LockMode::Shared, Side::Host)
        .ok_or(busy(Operand::SEPT_TREE))?;
    let list = GpaList::parse(p, c.regs.rcx)?;
    c.for_each_page(td, list, |leaf| change(td, leaf))
}

/// TDH.EXPORT.UNBLOCKW
pub(crate) fn unblockw(c: &mut Call<'_, '_>) -> Leaf {
    let (rcx, rdx) = mem_operands(c);
    let op = c.mem_sequence(
        rcx,
        rdx,
        (0, 0),
        LockMode::Shared,
        state_or(S::is_write_blocked),
    )?;
    let state = op.state();
    let to = match (state.is_pending(), state.is_exported()) {
        (false, false) => S::Mapped,
        (false, true) => S::ExportedDirty,
        (true, false) => S::Pending,
        (true, true) => S::PendingExportedDirty,
    };
    op.set(op.content.with_state(to));
    if state.is_exported() && !state.is_exported_dirty() {
        op.td.migration().dirty_count += 1;
    }
    Ok(())
}
