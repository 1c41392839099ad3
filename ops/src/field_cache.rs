//! A cache of values that firmware never changes while it runs.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Room for every field that a back end asks for (TDX: 9, and 3 for each of 32 CPUID rows), half
/// empty, so that a search is short.
const SLOTS: usize = 256;

/// Values of read-only metadata fields, kept for all VMs of a machine. Takes no lock.
///
/// A field that finds no room is not kept, and asked for again.
#[derive(Debug)]
pub struct FieldCache {
    slots: Box<[Slot]>,
}

#[derive(Debug, Default)]
struct Slot {
    /// 0 while the slot is free.
    id: AtomicU64,
    value: AtomicU64,
    /// Set after the value.
    ready: AtomicBool,
}

impl Default for FieldCache {
    fn default() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
        }
    }
}

impl FieldCache {
    /// The value of a field that somebody kept.
    pub fn get(&self, id: u64) -> Option<u64> {
        for slot in self.places(id) {
            match slot.id.load(Ordering::Acquire) {
                0 => return None,
                held if held == id => {
                    let ready = slot.ready.load(Ordering::Acquire);
                    return ready.then(|| slot.value.load(Ordering::Relaxed));
                }
                _ => {}
            }
        }
        None
    }

    /// Keeps the value of a field, the same that any other caller keeps for it. Field 0 is not
    /// kept.
    pub fn keep(&self, id: u64, value: u64) {
        if id == 0 {
            return;
        }
        for slot in self.places(id) {
            match slot
                .id
                .compare_exchange(0, id, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => {
                    slot.value.store(value, Ordering::Relaxed);
                    slot.ready.store(true, Ordering::Release);
                    return;
                }
                Err(held) if held == id => return,
                Err(_) => {}
            }
        }
    }

    /// The slots that may hold a field, in the order of the search.
    fn places(&self, id: u64) -> impl Iterator<Item = &Slot> {
        // Fibonacci hashing: ids differ in few bits at both ends.
        let first = (id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize;
        (0..SLOTS).map(move |step| &self.slots[(first + step) % SLOTS])
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn what_was_kept_is_found_until_there_is_no_room() {
        let cache = FieldCache::default();
        for id in 1..=300 {
            assert_eq!(cache.get(id), None);
            cache.keep(id, id * 7);
        }
        cache.keep(0, 1);
        assert_eq!(cache.get(0), None);
        let found = (1..=300)
            .filter(|id| cache.get(*id) == Some(id * 7))
            .count();
        assert_eq!(found, SLOTS);
        assert!((1..=300).all(|id| cache.get(id).is_none_or(|value| value == id * 7)));
    }

    #[test]
    fn threads_see_nothing_or_the_value() {
        let cache = FieldCache::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for id in 1..=200 {
                        assert!(cache.get(id).is_none_or(|value| value == !id));
                        cache.keep(id, !id);
                    }
                });
            }
        });
        assert!((1..=200).all(|id| cache.get(id) == Some(!id)));
    }
}
