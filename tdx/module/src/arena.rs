//! Slots for control structures.
//!
//! Hardware keeps TDR, TDVPS and Secure-EPT tables in the pages the host gives; here they live in slots of an
//! arena and the page's metadata names the slot. A slot is never deallocated, only reused, so a reference
//! can be had without counting, and a stale one reads another structure's atomics at worst: what may be
//! *used* is decided by the architecture's locks.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

const FANOUT: usize = 1024;

type Segment<T> = OnceLock<Box<[T]>>;
type Directory<T> = OnceLock<Box<[Segment<T>]>>;

/// A grow-only store of `T`, `SEG` to an allocation.
#[derive(Debug)]
pub(crate) struct Arena<T, const SEG: usize> {
    top: Box<[Directory<T>]>,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    list: Vec<u32>,
    fresh: u32,
}

/// Locks a mutex of this crate. None of them guards an invariant that a panic could break half-way, and no
/// caller may be made to panic by another's.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: Default, const SEG: usize> Arena<T, SEG> {
    pub(crate) fn new() -> Self {
        Arena {
            top: (0..FANOUT).map(|_| OnceLock::new()).collect(),
            free: Mutex::default(),
        }
    }

    pub(crate) fn get(&self, slot: u32) -> Option<&T> {
        let slot = slot as usize;
        let (segment, i) = (slot / SEG, slot % SEG);
        self.top.get(segment / FANOUT)?.get()?[segment % FANOUT]
            .get()?
            .get(i)
    }

    /// A free slot, or `None` once the arena's (very large) capacity is used.
    pub(crate) fn alloc(&self) -> Option<u32> {
        let mut free = lock(&self.free);
        if let Some(slot) = free.list.pop() {
            return Some(slot);
        }
        let slot = free.fresh;
        let segment = slot as usize / SEG;
        let dir = self
            .top
            .get(segment / FANOUT)?
            .get_or_init(|| (0..FANOUT).map(|_| OnceLock::new()).collect());
        dir[segment % FANOUT].get_or_init(|| (0..SEG).map(|_| T::default()).collect());
        free.fresh += 1;
        Some(slot)
    }

    pub(crate) fn free(&self, slot: u32) {
        lock(&self.free).list.push(slot);
    }

    /// Slots in use.
    pub(crate) fn in_use(&self) -> usize {
        let free = lock(&self.free);
        free.fresh as usize - free.list.len()
    }
}
