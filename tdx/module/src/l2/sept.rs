//! Secure EPT of an L2 VM: entries and the walk.

use super::attr::Attributes;
use crate::sept::{SeptEntry, Tables};

/// State of an entry in an L2 VM's tree; the values are those the details of a failed SEPT leaf show.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum L2SeptState {
    /// Nothing.
    Free = 64,
    /// An alias out of use.
    Blocked = 65,
    /// An alias.
    Mapped = 68,
    /// Table, blocked.
    NlBlocked = 193,
    /// Table.
    NlMapped = 196,
}

impl L2SeptState {
    const IN_WORD: [L2SeptState; 8] = [
        L2SeptState::Free,
        L2SeptState::Blocked,
        L2SeptState::Mapped,
        L2SeptState::NlBlocked,
        L2SeptState::NlMapped,
        L2SeptState::Free,
        L2SeptState::Free,
        L2SeptState::Free,
    ];

    const fn bits(self) -> u64 {
        match self {
            L2SeptState::Free => 0,
            L2SeptState::Blocked => 1,
            L2SeptState::Mapped => 2,
            L2SeptState::NlBlocked => 3,
            L2SeptState::NlMapped => 4,
        }
    }

    pub(crate) const fn is_leaf(self) -> bool {
        matches!(self, L2SeptState::Blocked | L2SeptState::Mapped)
    }

    pub(crate) const fn is_table(self) -> bool {
        matches!(self, L2SeptState::NlBlocked | L2SeptState::NlMapped)
    }
}

const STATE_SHIFT: u32 = 2;
const ATTRIBUTES_SHIFT: u32 = 52;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// The content of an entry: state, page or table slot, and an alias' attributes, which blocking keeps.
/// Free is 0, as in L1's tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct L2Content(u64);

impl L2Content {
    pub(crate) const FREE: L2Content = L2Content(0);

    pub(crate) const fn alias(hpa: u64, attributes: Attributes, blocked: bool) -> Self {
        let state = if blocked {
            L2SeptState::Blocked
        } else {
            L2SeptState::Mapped
        };
        L2Content(
            hpa & ADDRESS
                | state.bits() << STATE_SHIFT
                | (attributes.bits() as u64) << ATTRIBUTES_SHIFT,
        )
    }

    pub(crate) const fn table(slot: u32) -> Self {
        L2Content((slot as u64) << 12 | L2SeptState::NlMapped.bits() << STATE_SHIFT)
    }

    pub(crate) const fn state(self) -> L2SeptState {
        L2SeptState::IN_WORD[(self.0 >> STATE_SHIFT & 7) as usize]
    }

    pub(crate) const fn slot(self) -> u32 {
        ((self.0 & ADDRESS) >> 12) as u32
    }

    pub(crate) const fn hpa(self) -> u64 {
        self.0 & ADDRESS
    }

    pub(crate) const fn with_hpa(self, hpa: u64) -> Self {
        L2Content(self.0 & !ADDRESS | hpa & ADDRESS)
    }

    const fn with_state(self, state: L2SeptState) -> Self {
        L2Content(self.0 & !(7 << STATE_SHIFT) | state.bits() << STATE_SHIFT)
    }

    pub(crate) const fn blocked(self) -> Self {
        match self.state() {
            L2SeptState::Mapped => self.with_state(L2SeptState::Blocked),
            L2SeptState::NlMapped => self.with_state(L2SeptState::NlBlocked),
            _ => self,
        }
    }

    pub(crate) const fn unblocked(self) -> Self {
        match self.state() {
            L2SeptState::Blocked => self.with_state(L2SeptState::Mapped),
            L2SeptState::NlBlocked => self.with_state(L2SeptState::NlMapped),
            _ => self,
        }
    }

    pub(crate) const fn with_attributes(self, attributes: Attributes) -> Self {
        const FIELD: u64 = 0xFF << ATTRIBUTES_SHIFT;
        L2Content(self.0 & !FIELD | (attributes.bits() as u64) << ATTRIBUTES_SHIFT)
    }

    /// As TDG.MEM.PAGE.ATTR.RD and TDH.MEM.SEPT.RD show it; zero for a free entry.
    pub(crate) const fn attributes(self) -> Attributes {
        match self.state() {
            L2SeptState::Free => Attributes::ZERO,
            L2SeptState::NlBlocked | L2SeptState::NlMapped => Attributes::TABLE,
            L2SeptState::Blocked | L2SeptState::Mapped => {
                Attributes::from_bits((self.0 >> ATTRIBUTES_SHIFT) as u8)
            }
        }
    }

    /// Value that RCX of "L2 details" shows: an alias has all permissions unless the TD is a debug TD.
    fn architectural(self, debug: bool) -> u64 {
        const SUPPRESS_VE: u64 = 1 << 63;
        const PERMISSIONS: u64 = 0x407;
        const LEAF: u64 = 0xF0;
        match self.state() {
            L2SeptState::Free => SUPPRESS_VE,
            L2SeptState::NlMapped => PERMISSIONS,
            L2SeptState::NlBlocked => 0,
            L2SeptState::Mapped if !debug => LEAF | PERMISSIONS | self.hpa(),
            L2SeptState::Blocked if !debug => LEAF | self.hpa(),
            L2SeptState::Mapped | L2SeptState::Blocked => {
                LEAF | self.hpa() | permission_bits(self.attributes().bits())
            }
        }
    }

    /// R, W, X and Xu in the lowest four bits.
    pub(crate) const fn permissions(self) -> u64 {
        match self.state() {
            L2SeptState::NlMapped => 0xF,
            L2SeptState::Mapped => (self.attributes().bits() & 0xF) as u64,
            _ => 0,
        }
    }
}

/// Bits of an EPT entry for the attributes R, W, Xs, Xu, VGP, PWA, SSS, SVE.
fn permission_bits(attributes: u8) -> u64 {
    const PLACES: [u32; 8] = [0, 1, 2, 10, 57, 58, 60, 63];
    PLACES
        .iter()
        .enumerate()
        .map(|(n, place)| u64::from(attributes >> n & 1) << place)
        .sum()
}

/// Entry at which a walk ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct L2Walked<'a> {
    entry: &'a SeptEntry,
    pub(crate) content: L2Content,
    pub(crate) level: u8,
}

impl L2Walked<'_> {
    pub(crate) fn set(&self, content: L2Content) {
        self.entry.word().store(content.0);
    }

    /// RCX and RDX of "L2 details".
    pub(crate) fn details(&self, vm: usize, debug: bool) -> (u64, u64) {
        (
            self.content.architectural(debug),
            u64::from(self.level) | (self.content.state() as u64) << 8 | (vm as u64) << 16,
        )
    }
}

/// Contents of a table's entries in order.
pub(crate) fn contents(table: &crate::sept::Table) -> impl Iterator<Item = L2Content> + '_ {
    table.entries.iter().map(|e| L2Content(e.word().load()))
}

/// Sets an entry of a table that is not part of a tree yet.
pub(crate) fn fill(table: &crate::sept::Table, content: impl Fn(u64) -> L2Content) {
    for (k, entry) in table.entries.iter().enumerate() {
        entry.word().store(content(k as u64).0);
    }
}

/// Walks from the root (at `top`) towards `level`; stops there or at the first entry that is not a mapped
/// table.
pub(crate) fn walk(
    tables: &Tables,
    root: u32,
    top: u8,
    gpa: u64,
    level: u8,
) -> Option<L2Walked<'_>> {
    let mut table = tables.get(root)?;
    let mut at = top;
    loop {
        let entry = &table.entries[(gpa >> (12 + 9 * u32::from(at))) as usize & 511];
        let content = L2Content(entry.word().load());
        if at <= level || content.state() != L2SeptState::NlMapped {
            return Some(L2Walked {
                entry,
                content,
                level: at,
            });
        }
        table = tables.get(content.slot())?;
        at -= 1;
    }
}

/// Gives the slots of a tree back. `level` bounds the depth.
pub(crate) fn free_tree(tables: &Tables, slot: u32, level: u8) {
    if let Some(table) = tables.get(slot).filter(|_| level > 0) {
        for content in contents(table).filter(|c| c.state().is_table()) {
            free_tree(tables, content.slot(), level - 1);
        }
    }
    tables.free(slot);
}
