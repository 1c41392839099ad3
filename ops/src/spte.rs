//! Changes of private table entries, as the mirror hands them to a back end.

use crate::{Gfn, Level, Pfn};

/// The value of a private table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrivateSpte {
    /// Nothing.
    Absent,
    /// The page of a lower table, which the firmware owns.
    Table(Pfn),
    /// A page of the guest.
    Mapped(Pfn),
    /// A page of the guest that no new translation may reach (TDH.MEM.RANGE.BLOCK).
    Blocked(Pfn),
    /// The page of a lower table below which no new translation may go.
    BlockedTable(Pfn),
}

/// One change of one entry. The back end derives from the old value, the new value and the level
/// which firmware calls it means; the MMU knows no rule of any technology.
///
/// Only the owner of the pages can make one, because it hands pages to firmware and takes them back:
///
/// ```compile_fail,E0133
/// # use kvm_ops_core::{Gfn, Level, Pfn, PrivateSpte, SpteChange};
/// let (absent, mapped) = (PrivateSpte::Absent, PrivateSpte::Mapped(Pfn::new(7)));
/// let change = SpteChange::new(Gfn::new(1), Level::Size4K, absent, mapped);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpteChange {
    gfn: Gfn,
    level: Level,
    old: PrivateSpte,
    new: PrivateSpte,
}

impl SpteChange {
    /// Names a change of the entry at `level` whose first frame is `gfn`.
    ///
    /// # Safety
    /// The caller owns the pages that `old` and `new` name: a page in `new` is used for nothing else
    /// until a later change removes it, and `old` is the value that the caller's tables hold.
    #[inline]
    pub const unsafe fn new(gfn: Gfn, level: Level, old: PrivateSpte, new: PrivateSpte) -> Self {
        Self {
            gfn,
            level,
            old,
            new,
        }
    }

    /// The first frame that the entry covers.
    #[inline]
    pub const fn gfn(&self) -> Gfn {
        self.gfn
    }

    /// The level of the entry.
    #[inline]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// The value that the entry had.
    #[inline]
    pub const fn old(&self) -> PrivateSpte {
        self.old
    }

    /// The value that the entry will have.
    #[inline]
    pub const fn new_value(&self) -> PrivateSpte {
        self.new
    }
}
