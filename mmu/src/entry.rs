//! The words of the mirror, and how a thread takes one for a change.

use crate::sync::{AtomicU64, Ordering};
use crate::{Pfn, PrivateSpte};

/// Nothing is there. Zero, so that fresh memory is an empty table.
pub(crate) const EMPTY: u64 = 0;
/// A thread is adding something here. It holds no frame, so it is no entry's value.
pub(crate) const FROZEN: u64 = 5;

const MAPPED: u64 = 1;
const BLOCKED: u64 = 2;
const TABLE: u64 = 3;
const BLOCKED_TABLE: u64 = 4;
const KIND: u64 = 0xfff;
const SHIFT: u32 = 12;

/// Frames that fit a word beside the kind: those whose address fits 64 bits.
pub(crate) const MAX_PFN: u64 = (1 << (64 - SHIFT)) - 1;

/// The word of a mapped page.
#[inline]
pub(crate) const fn mapped(page: u64) -> u64 {
    page << SHIFT | MAPPED
}

/// The word for an entry. Frames are at most [`MAX_PFN`]; what comes from outside is checked.
#[inline]
pub(crate) const fn encode(entry: PrivateSpte) -> u64 {
    match entry {
        PrivateSpte::Absent => EMPTY,
        PrivateSpte::Mapped(p) => mapped(p.get()),
        PrivateSpte::Blocked(p) => p.get() << SHIFT | BLOCKED,
        PrivateSpte::Table(p) => p.get() << SHIFT | TABLE,
        PrivateSpte::BlockedTable(p) => p.get() << SHIFT | BLOCKED_TABLE,
    }
}

/// The entry in a word. One that is being added is not there yet.
#[inline]
pub(crate) const fn decode(word: u64) -> PrivateSpte {
    let page = Pfn::new(word >> SHIFT);
    match word & KIND {
        MAPPED => PrivateSpte::Mapped(page),
        BLOCKED => PrivateSpte::Blocked(page),
        TABLE => PrivateSpte::Table(page),
        BLOCKED_TABLE => PrivateSpte::BlockedTable(page),
        _ => PrivateSpte::Absent,
    }
}

/// An empty entry that this thread alone may fill. Dropped, it is empty again: also when the hook
/// that runs meanwhile fails or panics.
pub(crate) struct Frozen<'a>(&'a AtomicU64);

impl<'a> Frozen<'a> {
    /// Takes an empty entry. `None` if it is not empty (any more).
    #[inline]
    pub(crate) fn take(word: &'a AtomicU64) -> Option<Self> {
        word.compare_exchange(EMPTY, FROZEN, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| Self(word))
    }

    /// Fills it: whoever sees the value sees what was done before.
    #[inline]
    pub(crate) fn publish(self, value: u64) {
        self.0.store(value, Ordering::Release);
        core::mem::forget(self);
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.store(EMPTY, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_survives_its_word_and_none_is_the_frozen_one() {
        for p in [0, 1, 0x12345, MAX_PFN].map(Pfn::new) {
            for entry in [
                PrivateSpte::Absent,
                PrivateSpte::Mapped(p),
                PrivateSpte::Blocked(p),
                PrivateSpte::Table(p),
                PrivateSpte::BlockedTable(p),
            ] {
                assert_eq!(decode(encode(entry)), entry);
                assert_ne!(encode(entry), FROZEN);
            }
        }
        assert_eq!(decode(FROZEN), PrivateSpte::Absent);
    }
}
