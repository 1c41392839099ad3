//! Secure EPT: entries, tables and the walk.

use crate::arena::Arena;
use crate::lock::{AtomicU64, EntryWord, Ordering};

/// State of a Secure-EPT entry; the values are those `TDH.MEM.SEPT.RD` shows.
///
/// *Exported* pages have been sent in the current export session; of these, *dirty* ones may have changed since.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum SeptState {
    /// Nothing mapped.
    Free = 0,
    /// Leaf, blocked.
    Blocked = 1,
    /// Leaf the guest has not accepted.
    Pending = 2,
    /// Pending leaf, blocked.
    PendingBlocked = 3,
    /// Leaf the guest uses.
    Mapped = 4,
    /// Nothing mapped; a page was removed, or its import cancelled, while an import was in progress.
    Removed = 5,
    /// Leaf, blocked for writing.
    BlockedW = 8,
    /// Leaf, exported, blocked for writing.
    ExportedBlockedW = 9,
    /// Leaf, exported, writable since.
    ExportedDirty = 11,
    /// Leaf, exported, written since, blocked for writing again.
    ExportedDirtyBlockedW = 12,
    /// Pending leaf, blocked for acceptance.
    PendingBlockedW = 16,
    /// Pending leaf, exported, blocked for acceptance.
    PendingExportedBlockedW = 17,
    /// Pending leaf, exported, acceptable since.
    PendingExportedDirty = 19,
    /// Pending leaf, exported, acceptable since, blocked again.
    PendingExportedDirtyBlockedW = 20,
    /// Table, blocked.
    NlBlocked = 0x81,
    /// Table.
    NlMapped = 0x84,
}

use SeptState as S;

impl SeptState {
    /// Every state, by its number in an entry word.
    const IN_WORD: [S; 16] = [
        S::Free,
        S::Blocked,
        S::Pending,
        S::PendingBlocked,
        S::Mapped,
        S::NlBlocked,
        S::NlMapped,
        S::Removed,
        S::BlockedW,
        S::ExportedBlockedW,
        S::ExportedDirty,
        S::ExportedDirtyBlockedW,
        S::PendingBlockedW,
        S::PendingExportedBlockedW,
        S::PendingExportedDirty,
        S::PendingExportedDirtyBlockedW,
    ];

    const fn bits(self) -> u64 {
        match self {
            S::Free => 0,
            S::Blocked => 1,
            S::Pending => 2,
            S::PendingBlocked => 3,
            S::Mapped => 4,
            S::NlBlocked => 5,
            S::NlMapped => 6,
            S::Removed => 7,
            S::BlockedW => 8,
            S::ExportedBlockedW => 9,
            S::ExportedDirty => 10,
            S::ExportedDirtyBlockedW => 11,
            S::PendingBlockedW => 12,
            S::PendingExportedBlockedW => 13,
            S::PendingExportedDirty => 14,
            S::PendingExportedDirtyBlockedW => 15,
        }
    }

    /// A table in whatever condition.
    #[must_use]
    pub const fn is_table(self) -> bool {
        matches!(self, S::NlMapped | S::NlBlocked)
    }

    /// A present leaf in whatever condition.
    #[must_use]
    pub const fn is_leaf(self) -> bool {
        !matches!(self, S::Free | S::Removed) && !self.is_table()
    }

    /// No page and no table.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        matches!(self, S::Free | S::Removed)
    }

    /// Blocked, leaf or table.
    #[must_use]
    pub const fn is_blocked(self) -> bool {
        matches!(self, S::Blocked | S::PendingBlocked | S::NlBlocked)
    }

    /// A leaf the guest has not accepted.
    #[must_use]
    pub const fn is_pending(self) -> bool {
        matches!(
            self,
            S::Pending
                | S::PendingBlocked
                | S::PendingBlockedW
                | S::PendingExportedBlockedW
                | S::PendingExportedDirty
                | S::PendingExportedDirtyBlockedW
        )
    }

    /// A leaf sent in the current export session.
    #[must_use]
    pub const fn is_exported(self) -> bool {
        self.is_exported_dirty() || matches!(self, S::ExportedBlockedW | S::PendingExportedBlockedW)
    }

    /// An exported leaf that may have changed since.
    #[must_use]
    pub const fn is_exported_dirty(self) -> bool {
        matches!(
            self,
            S::ExportedDirty
                | S::ExportedDirtyBlockedW
                | S::PendingExportedDirty
                | S::PendingExportedDirtyBlockedW
        )
    }

    /// A leaf blocked for writing (or for acceptance, if pending).
    #[must_use]
    pub const fn is_write_blocked(self) -> bool {
        matches!(
            self,
            S::BlockedW
                | S::ExportedBlockedW
                | S::ExportedDirtyBlockedW
                | S::PendingBlockedW
                | S::PendingExportedBlockedW
                | S::PendingExportedDirtyBlockedW
        )
    }

    /// A leaf the guest can at least read.
    #[must_use]
    pub const fn is_guest_readable(self) -> bool {
        self.is_leaf() && !self.is_pending() && !self.is_blocked()
    }

    /// A leaf the guest can read and write.
    #[must_use]
    pub const fn is_guest_writable(self) -> bool {
        matches!(self, S::Mapped | S::ExportedDirty)
    }

    /// A pending leaf that TDG.MEM.PAGE.ACCEPT takes.
    #[must_use]
    pub const fn is_acceptable(self) -> bool {
        matches!(self, S::Pending | S::PendingExportedDirty)
    }

    /// Mapped or pending: the two conditions a large page's parts may share.
    pub(crate) const fn is_open_leaf(self) -> bool {
        matches!(self, S::Mapped | S::Pending)
    }

    /// A leaf TDH.MEM.PAGE.REMOVE takes away: one that is not exported.
    pub(crate) const fn is_removable(self) -> bool {
        self.is_leaf() && !self.is_exported()
    }

    /// An entry TDH.MEM.RANGE.BLOCK blocks.
    pub(crate) const fn is_blockable(self) -> bool {
        matches!(
            self,
            S::NlMapped | S::Mapped | S::Pending | S::BlockedW | S::PendingBlockedW
        )
    }

    /// A leaf TDH.MEM.PAGE.DEMOTE splits.
    pub(crate) const fn is_demotable(self) -> bool {
        matches!(
            self,
            S::Mapped | S::Blocked | S::Pending | S::PendingBlocked
        )
    }

    /// Removing or replacing what the entry maps takes blocking and tracking while vCPUs run.
    pub(crate) const fn needs_tlb_tracking(self) -> bool {
        !self.is_empty() && !matches!(self, S::ExportedBlockedW | S::PendingExportedBlockedW)
    }

    /// The state with blocking undone.
    #[must_use]
    pub const fn unblocked(self) -> Self {
        match self {
            S::Blocked => S::Mapped,
            S::PendingBlocked => S::Pending,
            S::NlBlocked => S::NlMapped,
            other => other,
        }
    }

    pub(crate) const fn blocked(self) -> Self {
        match self {
            S::Mapped | S::BlockedW => S::Blocked,
            S::Pending | S::PendingBlockedW => S::PendingBlocked,
            S::NlMapped => S::NlBlocked,
            other => other,
        }
    }

    /// The state after acceptance by the guest.
    pub(crate) const fn accepted(self) -> Self {
        match self {
            S::Pending => S::Mapped,
            S::PendingExportedDirty => S::ExportedDirty,
            other => other,
        }
    }

    /// Mapped or pending, whichever the leaf is but for blocking and export.
    pub(crate) const fn settled(self) -> Self {
        if self.is_pending() {
            S::Pending
        } else {
            S::Mapped
        }
    }

    /// The name in the manuals (`SEPT_` prefix left out).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            S::Free => "FREE",
            S::Removed => "REMOVED",
            S::Blocked => "BLOCKED",
            S::Pending => "PENDING",
            S::PendingBlocked => "PENDING_BLOCKED",
            S::Mapped => "MAPPED",
            S::BlockedW => "BLOCKEDW",
            S::ExportedBlockedW => "EXPORTED_BLOCKEDW",
            S::ExportedDirty => "EXPORTED_DIRTY",
            S::ExportedDirtyBlockedW => "EXPORTED_DIRTY_BLOCKEDW",
            S::PendingBlockedW => "PENDING_BLOCKEDW",
            S::PendingExportedBlockedW => "PENDING_EXPORTED_BLOCKEDW",
            S::PendingExportedDirty => "PENDING_EXPORTED_DIRTY",
            S::PendingExportedDirtyBlockedW => "PENDING_EXPORTED_DIRTY_BLOCKEDW",
            S::NlBlocked => "NL_BLOCKED",
            S::NlMapped => "NL_MAPPED",
        }
    }
}

const STATE_SHIFT: u32 = 2;
const STATE: u64 = 0xF;
/// The leaf's write permission was taken by TDH.EXPORT.BLOCKW. Not the same as a write-blocked state: a page
/// exported while the TD is paused becomes EXPORTED_BLOCKEDW and keeps the permission.
const READ_ONLY: u64 = 1 << 6;
const COUNTER_SHIFT: u32 = 52;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// The content of an entry, lock bits left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Content(u64);

impl Content {
    pub(crate) const FREE: Content = Content(0);

    pub(crate) fn leaf(state: SeptState, hpa: u64) -> Self {
        Content(hpa & ADDRESS | state.bits() << STATE_SHIFT)
    }

    pub(crate) fn table(slot: u32) -> Self {
        Content(u64::from(slot) << 12 | SeptState::NlMapped.bits() << STATE_SHIFT)
    }

    pub(crate) fn state(self) -> SeptState {
        SeptState::IN_WORD[(self.0 >> STATE_SHIFT & STATE) as usize]
    }

    /// Nothing mapped any more, since this migration epoch.
    pub(crate) fn removed(epoch: u32) -> Self {
        Content(u64::from(epoch) << 12 | SeptState::Removed.bits() << STATE_SHIFT)
    }

    /// The epoch of [`Content::removed`].
    pub(crate) fn removed_in(self) -> u32 {
        (self.0 >> 12) as u32
    }

    /// Same page or table in another state. Drops the accept counter, and gives the write permission back
    /// unless the new state is write-blocked too.
    pub(crate) fn with_state(self, state: SeptState) -> Self {
        let kept = if state.is_write_blocked() {
            ADDRESS | READ_ONLY
        } else {
            ADDRESS
        };
        Content(self.0 & kept | state.bits() << STATE_SHIFT)
    }

    /// Same page without write permission.
    pub(crate) fn read_only(self) -> Self {
        Content(self.0 | READ_ONLY)
    }

    /// Same state, another page.
    pub(crate) fn with_page(self, hpa: u64) -> Self {
        Content(self.0 & !ADDRESS | hpa & ADDRESS)
    }

    /// Returns true if the guest can read the page or, if `writes`, write it.
    pub(crate) fn is_accessible(self, writes: bool) -> bool {
        if writes {
            self.is_writable()
        } else {
            self.state().is_guest_readable()
        }
    }

    /// Returns true if the guest can write, by the permission in the entry, which is what the processor checks.
    pub(crate) fn is_writable(self) -> bool {
        self.state().is_guest_readable() && self.0 & READ_ONLY == 0
    }

    pub(crate) fn hpa(self) -> u64 {
        self.0 & ADDRESS
    }

    pub(crate) fn slot(self) -> u32 {
        ((self.0 & ADDRESS) >> 12) as u32
    }

    /// 4 KiB pieces of a 2 MiB pending page accepted so far.
    pub(crate) fn accepted(self) -> u64 {
        self.0 >> COUNTER_SHIFT & 0x1FF
    }

    pub(crate) fn with_accepted(self, n: u64) -> Self {
        Content(self.0 & !(0x1FF << COUNTER_SHIFT) | (n & 0x1FF) << COUNTER_SHIFT)
    }

    /// Value that `TDH.MEM.SEPT.RD` shows in RCX.
    pub(crate) fn architectural(self) -> u64 {
        const SUPPRESS_VE: u64 = 1 << 63;
        match self.state() {
            SeptState::Free => SUPPRESS_VE,
            SeptState::NlMapped => 7,
            SeptState::NlBlocked | SeptState::Removed => 0,
            _ if self.is_writable() => SUPPRESS_VE | 0xF7 | self.hpa(),
            state if state.is_guest_readable() => SUPPRESS_VE | 0xF5 | self.hpa(),
            _ => SUPPRESS_VE | 0xF0 | self.hpa() | self.accepted() << 12,
        }
    }
}

/// An entry in a table.
#[derive(Debug, Default)]
pub(crate) struct SeptEntry(EntryWord);

impl SeptEntry {
    pub(crate) fn get(&self) -> Content {
        Content(self.0.load())
    }

    pub(crate) fn set(&self, content: Content) {
        self.0.store(content.0);
    }

    pub(crate) fn word(&self) -> &EntryWord {
        &self.0
    }
}

/// A table of 512 entries and the page that holds it.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) entries: [SeptEntry; 512],
    hpa: AtomicU64,
}

impl Default for Table {
    fn default() -> Self {
        Table {
            entries: core::array::from_fn(|_| SeptEntry::default()),
            hpa: AtomicU64::new(0),
        }
    }
}

impl Table {
    /// The page; 0 for a root, which is part of TDCS.
    pub(crate) fn hpa(&self) -> u64 {
        self.hpa.load(Ordering::Acquire)
    }

    pub(crate) fn all_free(&self) -> bool {
        self.entries.iter().all(|e| e.get() == Content::FREE)
    }
}

/// The tables of all TDs of a platform.
pub(crate) type Tables = Arena<Table, 16>;

/// Takes a table with 512 free entries.
pub(crate) fn new_table(tables: &Tables, hpa: u64) -> Option<u32> {
    let slot = tables.alloc()?;
    let table = tables.get(slot)?;
    table.entries.iter().for_each(|e| e.word().reset());
    table.hpa.store(hpa, Ordering::Release);
    Some(slot)
}

/// Entry at which a walk ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walked<'a> {
    pub(crate) entry: &'a SeptEntry,
    pub(crate) content: Content,
    pub(crate) level: u8,
    /// The entry that pointed to this table, and what it said; absent in the root.
    parent: Option<(&'a SeptEntry, Content)>,
}

impl Walked<'_> {
    /// Returns true if the entry is still part of the tree (its table may have been freed after the walk read it).
    pub(crate) fn is_current(&self) -> bool {
        self.parent.is_none_or(|(entry, content)| {
            let now = entry.get();
            now.slot() == content.slot() && now.state().is_table()
        })
    }

    /// RCX and RDX of "S-EPT details".
    pub(crate) fn details(&self) -> (u64, u64) {
        details(self.content, self.level)
    }
}

/// RCX and RDX of "S-EPT details".
pub(crate) fn details(content: Content, level: u8) -> (u64, u64) {
    (
        content.architectural(),
        u64::from(level) | (content.state() as u64) << 8,
    )
}

/// Walks from the root (at `top`) towards `level`; stops there or at the first entry that is not a mapped
/// table.
pub(crate) fn walk(tables: &Tables, root: u32, top: u8, gpa: u64, level: u8) -> Option<Walked<'_>> {
    // Bits above those the levels translate select nothing; a processor faults on them.
    if gpa >> (12 + 9 * (u32::from(top) + 1)) != 0 {
        return None;
    }
    let mut table = tables.get(root)?;
    let mut at = top;
    let mut parent = None;
    loop {
        let entry = &table.entries[(gpa >> (12 + 9 * u32::from(at))) as usize & 511];
        let content = entry.get();
        if at <= level || content.state() != SeptState::NlMapped {
            return Some(Walked {
                entry,
                content,
                level: at,
                parent,
            });
        }
        table = tables.get(content.slot())?;
        parent = Some((entry, content));
        at -= 1;
    }
}
