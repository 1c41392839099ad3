//! Secure EPT: entries, tables and the walk.

use crate::arena::Arena;
use crate::lock::{AtomicU64, EntryWord, Ordering};

/// State of a Secure-EPT entry; the values are those `TDH.MEM.SEPT.RD` shows.
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
    /// Table, blocked.
    NlBlocked = 0x81,
    /// Table.
    NlMapped = 0x84,
}

impl SeptState {
    const IN_WORD: [SeptState; 8] = [
        SeptState::Free,
        SeptState::Blocked,
        SeptState::Pending,
        SeptState::PendingBlocked,
        SeptState::Mapped,
        SeptState::NlBlocked,
        SeptState::NlMapped,
        SeptState::Free,
    ];

    fn bits(self) -> u64 {
        match self {
            SeptState::NlBlocked => 5,
            SeptState::NlMapped => 6,
            leaf => leaf as u64,
        }
    }

    /// A present leaf in whatever condition.
    #[must_use]
    pub const fn is_leaf(self) -> bool {
        matches!(
            self,
            SeptState::Blocked | SeptState::Pending | SeptState::PendingBlocked | SeptState::Mapped
        )
    }

    /// Blocked, leaf or table.
    #[must_use]
    pub const fn is_blocked(self) -> bool {
        matches!(
            self,
            SeptState::Blocked | SeptState::PendingBlocked | SeptState::NlBlocked
        )
    }

    /// Mapped or pending: the two conditions a large page's parts may share.
    pub(crate) const fn is_open_leaf(self) -> bool {
        matches!(self, SeptState::Mapped | SeptState::Pending)
    }

    /// The state with blocking undone.
    #[must_use]
    pub const fn unblocked(self) -> Self {
        match self {
            SeptState::Blocked => SeptState::Mapped,
            SeptState::PendingBlocked => SeptState::Pending,
            SeptState::NlBlocked => SeptState::NlMapped,
            other => other,
        }
    }

    pub(crate) const fn blocked(self) -> Self {
        match self {
            SeptState::Mapped => SeptState::Blocked,
            SeptState::Pending => SeptState::PendingBlocked,
            SeptState::NlMapped => SeptState::NlBlocked,
            other => other,
        }
    }

    /// The name in the manuals (`SEPT_` prefix left out).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            SeptState::Free => "FREE",
            SeptState::Blocked => "BLOCKED",
            SeptState::Pending => "PENDING",
            SeptState::PendingBlocked => "PENDING_BLOCKED",
            SeptState::Mapped => "MAPPED",
            SeptState::NlBlocked => "NL_BLOCKED",
            SeptState::NlMapped => "NL_MAPPED",
        }
    }
}

const STATE_SHIFT: u32 = 2;
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
        SeptState::IN_WORD[(self.0 >> STATE_SHIFT & 7) as usize]
    }

    /// Same page or table in another state; drops the accept counter.
    pub(crate) fn with_state(self, state: SeptState) -> Self {
        Content(self.0 & ADDRESS | state.bits() << STATE_SHIFT)
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

    /// What `TDH.MEM.SEPT.RD` shows in RCX.
    pub(crate) fn architectural(self) -> u64 {
        const SUPPRESS_VE: u64 = 1 << 63;
        match self.state() {
            SeptState::Free => SUPPRESS_VE,
            SeptState::NlMapped => 7,
            SeptState::NlBlocked => 0,
            SeptState::Mapped => SUPPRESS_VE | 0xF7 | self.hpa(),
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

/// Where a walk ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walked<'a> {
    pub(crate) entry: &'a SeptEntry,
    pub(crate) content: Content,
    pub(crate) level: u8,
    /// The entry that pointed to this table, and what it said; absent in the root.
    parent: Option<(&'a SeptEntry, Content)>,
}

impl Walked<'_> {
    /// Whether the entry is still part of the tree (its table may have been freed after the walk read it).
    pub(crate) fn is_current(&self) -> bool {
        self.parent.is_none_or(|(entry, content)| {
            let now = entry.get();
            now.slot() == content.slot() && !now.state().is_leaf() && now != Content::FREE
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
