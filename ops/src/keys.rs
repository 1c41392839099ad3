//! Pools of memory keys: TDX KeyIDs, SEV ASIDs.

use alloc::boxed::Box;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{Error, Result};

/// Numbers of keys that are leased to VMs. Shared by all of a machine's VMs; takes no lock.
///
/// A number is free, in use, or leaked: one that firmware may still hold is never leased again.
#[derive(Debug)]
pub struct KeyPool {
    first: u32,
    count: u32,
    used: Box<[AtomicU64]>,
    leaked: AtomicU32,
}

impl KeyPool {
    /// A pool of the numbers in `keys`, all free.
    pub fn new(keys: Range<u32>) -> Self {
        let count = keys.end.saturating_sub(keys.start);
        let used = (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self {
            first: keys.start,
            count,
            used,
            leaked: AtomicU32::new(0),
        }
    }

    /// Leases the lowest number that is free.
    ///
    /// # Errors
    /// [`Error::NoKeyId`] if none is.
    pub fn lease(&self) -> Result<u32> {
        for (word, index) in self.used.iter().zip((0..self.count).step_by(64)) {
            let valid = match self.count - index {
                64.. => u64::MAX,
                bits => (1 << bits) - 1,
            };
            let mut seen = word.load(Ordering::Relaxed);
            while !seen & valid != 0 {
                let bit = (!seen & valid).trailing_zeros();
                match word.compare_exchange_weak(
                    seen,
                    seen | 1 << bit,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => return Ok(self.first + index + bit),
                    Err(now) => seen = now,
                }
            }
        }
        Err(Error::NoKeyId)
    }

    /// Gives a leased number back; firmware holds nothing under it. A number that is not leased is
    /// ignored.
    pub fn give_back(&self, key: u32) {
        let Some(index) = key.checked_sub(self.first).filter(|i| *i < self.count) else {
            return;
        };
        self.used[index as usize / 64].fetch_and(!(1 << (index % 64)), Ordering::AcqRel);
    }

    /// Counts a leased number as leaked. It stays leased for ever.
    pub fn leak(&self, _key: u32) {
        self.leaked.fetch_add(1, Ordering::Relaxed);
    }

    /// How many numbers there are.
    pub const fn capacity(&self) -> u32 {
        self.count
    }

    /// How many are leased, the leaked ones among them.
    pub fn in_use(&self) -> u32 {
        self.used
            .iter()
            .map(|word| word.load(Ordering::Acquire).count_ones())
            .sum()
    }

    /// How many are leaked.
    pub fn leaked(&self) -> u32 {
        self.leaked.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    #[test]
    fn every_number_is_leased_once_and_comes_back_once() {
        for range in [0..0, 5..6, 3..67, 33..97, 1..200] {
            let pool = KeyPool::new(range.clone());
            let leased: Vec<u32> = core::iter::from_fn(|| pool.lease().ok()).collect();
            assert!(leased.iter().copied().eq(range.clone()));
            assert_eq!(pool.lease(), Err(Error::NoKeyId));
            assert_eq!(
                (pool.in_use(), pool.capacity()),
                (pool.capacity(), range.len() as u32)
            );
            for key in leased.iter().rev() {
                pool.give_back(*key);
                assert_eq!(pool.lease(), Ok(*key));
                pool.give_back(*key);
            }
            pool.give_back(range.end);
            pool.give_back(0);
            assert_eq!(pool.in_use(), 0);
        }
    }

    #[test]
    fn threads_never_hold_the_same_number() {
        let pool = KeyPool::new(10..74);
        let all: Vec<u32> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..16).map(|_| pool.lease().unwrap()).collect::<Vec<_>>()))
                .collect();
            threads
                .into_iter()
                .flat_map(|t| t.join().unwrap())
                .collect()
        });
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 64);
    }
}
