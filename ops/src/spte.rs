//! Changes of private table entries, as the mirror hands them to a back end.

use crate::{Gfn, Hpa, Level, Pfn};

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

/// The root of an embedder's tables of shared memory.
///
/// ```compile_fail,E0133
/// # use kvm_ops_core::{Hpa, TableRoot};
/// let any_page = TableRoot::new(Hpa::new(0x1000), 4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRoot {
    root: Hpa,
    levels: u8,
}

impl TableRoot {
    /// Names the page of the root, and the number of levels: 4 or 5.
    ///
    /// # Safety
    /// The page is the root of tables that map only memory that the guest may use, for as long as a
    /// vCPU uses the root.
    #[inline]
    pub const unsafe fn new(root: Hpa, levels: u8) -> Self {
        Self { root, levels }
    }

    /// The address of the root.
    #[inline]
    pub const fn address(&self) -> Hpa {
        self.root
    }

    /// The number of levels.
    #[inline]
    pub const fn levels(&self) -> u8 {
        self.levels
    }
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
