//! Changes of private table entries, as the mirror hands them to a back end.

use crate::{Gfn, Level, Pfn};

/// What a private table entry holds.
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

/// One change of one entry. The back end derives from (old, new, level) which firmware calls it
/// means; the MMU knows no rule of any technology.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpteChange {
    /// The first frame that the entry covers.
    pub gfn: Gfn,
    /// The entry's level.
    pub level: Level,
    /// What it held.
    pub old: PrivateSpte,
    /// What it will hold.
    pub new: PrivateSpte,
}
