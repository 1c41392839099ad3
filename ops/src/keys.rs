//! Pools of memory keys, and the lease of one key.

use alloc::boxed::Box;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{Error, Hkid, PortId, Result};

/// The lease of a key: its holder is the only one that may use the key or give it back.
///
/// A dropped lease is never given back, so no other VM gets the key.
#[must_use = "a lease that is dropped keeps the key in use"]
#[derive(Debug, PartialEq, Eq)]
pub struct KeyLease {
    number: u32,
    pool: PortId,
}

impl KeyLease {
    /// The number of the key.
    #[inline]
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// The number as a KeyID. TDX has 16 bits for it, so a pool of KeyIDs holds no larger number.
    #[inline]
    pub const fn hkid(&self) -> Hkid {
        Hkid(self.number as u16)
    }
}

/// The numbers of the keys of a machine, leased to its VMs. All VMs share the pool; it takes no lock.
///
/// A number is free, in use, or leaked: one that firmware may still hold is never leased again.
#[derive(Debug)]
pub struct KeyPool {
    id: PortId,
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
            id: PortId::new(),
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
    pub fn lease(&self) -> Result<KeyLease> {
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
                    Ok(_) => {
                        return Ok(KeyLease {
                            number: self.first + index + bit,
                            pool: self.id,
                        });
                    }
                    Err(now) => seen = now,
                }
            }
        }
        Err(Error::NoKeyId)
    }

    /// Takes a key back; firmware holds nothing under it.
    ///
    /// # Errors
    /// The lease itself, if it is of another pool.
    pub fn give_back(&self, key: KeyLease) -> Result<(), KeyLease> {
        if key.pool != self.id {
            return Err(key);
        }
        let index = key.number - self.first;
        self.used[index as usize / 64].fetch_and(!(1 << (index % 64)), Ordering::AcqRel);
        Ok(())
    }

    /// Counts a key as leaked. It is never leased again.
    ///
    /// # Errors
    /// The lease itself, if it is of another pool.
    pub fn leak(&self, key: KeyLease) -> Result<(), KeyLease> {
        if key.pool != self.id {
            return Err(key);
        }
        self.leaked.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The number of keys.
    pub const fn capacity(&self) -> u32 {
        self.count
    }

    /// The number of keys that are leased, with the leaked ones.
    pub fn in_use(&self) -> u32 {
        self.used
            .iter()
            .map(|word| word.load(Ordering::Acquire).count_ones())
            .sum()
    }

    /// The number that is leaked.
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
            let leases: Vec<KeyLease> = core::iter::from_fn(|| pool.lease().ok()).collect();
            assert!(leases.iter().map(KeyLease::number).eq(range.clone()));
            assert_eq!(pool.lease(), Err(Error::NoKeyId));
            assert_eq!(
                (pool.in_use(), pool.capacity()),
                (pool.capacity(), range.len() as u32)
            );
            for lease in leases.into_iter().rev() {
                let number = lease.number();
                pool.give_back(lease).unwrap();
                let again = pool.lease().unwrap();
                assert_eq!(again.number(), number);
                pool.give_back(again).unwrap();
            }
            assert_eq!(pool.in_use(), 0);
        }
    }

    #[test]
    fn a_lease_of_another_pool_is_refused_and_comes_back() {
        let (a, b) = (KeyPool::new(1..3), KeyPool::new(1..3));
        let (mine, other) = (a.lease().unwrap(), b.lease().unwrap());
        let other = a.give_back(other).unwrap_err();
        let other = a.leak(other).unwrap_err();
        assert_eq!((a.in_use(), a.leaked()), (1, 0));
        b.give_back(other).unwrap();
        a.leak(mine).unwrap();
        assert_eq!((a.in_use(), a.leaked(), b.in_use()), (1, 1, 0));
    }

    #[test]
    fn threads_never_hold_the_same_number() {
        let pool = KeyPool::new(10..74);
        let lease = || pool.lease().unwrap().number();
        let all: Vec<u32> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..16).map(|_| lease()).collect::<Vec<_>>()))
                .collect();
            threads
                .into_iter()
                .flat_map(|t| t.join().unwrap())
                .collect()
        });
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 64);
    }
}
