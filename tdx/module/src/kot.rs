//! Key ownership table, key configuration and cache write-back state.

use crate::lock::Sharex;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// State of a private key id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum HkidState {
    /// May be assigned.
    Free = 0,
    /// A TD has it.
    Assigned = 1,
    /// Its TD is being torn down; caches are to be written back.
    Flushed = 2,
    /// The module's own.
    Reserved = 3,
}

impl HkidState {
    /// The name in the manuals.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            HkidState::Free => "FREE",
            HkidState::Assigned => "ASSIGNED",
            HkidState::Flushed => "FLUSHED",
            HkidState::Reserved => "RESERVED",
        }
    }
}

/// One key id: its state, and the packages that have caches to write back.
#[derive(Debug, Default)]
struct Entry {
    state: AtomicU64,
    wbinvd_bitmap: AtomicU64,
}

/// The table and its lock. Writers hold the lock exclusively, or (bits of the bitmap) the package's
/// write-back mutex.
#[derive(Debug)]
pub(crate) struct Kot {
    pub(crate) lock: Sharex,
    first: u16,
    entries: Box<[Entry]>,
}

impl Kot {
    pub(crate) fn new(first: u16, last: u16) -> Self {
        Kot {
            lock: Sharex::default(),
            first,
            entries: (first..=last).map(|_| Entry::default()).collect(),
        }
    }

    fn entry(&self, hkid: u16) -> Option<&Entry> {
        self.entries.get(usize::from(hkid.checked_sub(self.first)?))
    }

    pub(crate) fn state(&self, hkid: u16) -> Option<HkidState> {
        Some(match self.entry(hkid)?.state.load(Ordering::Acquire) {
            0 => HkidState::Free,
            1 => HkidState::Assigned,
            2 => HkidState::Flushed,
            _ => HkidState::Reserved,
        })
    }

    pub(crate) fn wbinvd_bitmap(&self, hkid: u16) -> u64 {
        self.entry(hkid)
            .map_or(0, |e| e.wbinvd_bitmap.load(Ordering::Acquire))
    }

    pub(crate) fn set(&self, hkid: u16, state: HkidState, wbinvd_bitmap: u64) {
        if let Some(e) = self.entry(hkid) {
            e.wbinvd_bitmap.store(wbinvd_bitmap, Ordering::Release);
            e.state.store(state as u64, Ordering::Release);
        }
    }

    pub(crate) fn written_back(&self, hkid: u16, package: usize) {
        if let Some(e) = self.entry(hkid) {
            e.wbinvd_bitmap.fetch_and(!(1 << package), Ordering::AcqRel);
        }
    }

    pub(crate) fn hkids(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.entries.len()).map(|i| self.first + i as u16)
    }
}

/// An interrupted TDH.PHYMEM.CACHE.WB.
#[derive(Debug)]
pub(crate) struct WbSession {
    /// Next block.
    pub(crate) block: u32,
    /// Key ids that were FLUSHED at the start; later ones need another write-back.
    pub(crate) hkids: Vec<u16>,
}

/// A package: its write-back state (WBT) and whether the global key is configured on it.
#[derive(Debug, Default)]
pub(crate) struct Package {
    pub(crate) wbt: Sharex,
    /// Used with `wbt` held.
    pub(crate) session: Mutex<Option<WbSession>>,
}
