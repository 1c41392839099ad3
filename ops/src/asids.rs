//! The ASIDs of an AMD machine: which a guest may have, and how they come back.

use alloc::boxed::Box;
use core::fmt;
use core::ops::RangeInclusive;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{Asid, Error, PortId, Result, Tech};

/// The ASIDs that SNP guests use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SnpAsids {
    /// None: SNP is not initialised.
    Off,
    /// Those of SEV-ES guests, as long as there are.
    Shared,
    /// 1 to this number; SEV-ES guests have what lies above (ciphertext hiding, SNP_INIT_EX
    /// MAX_SNP_ASID).
    UpTo(u32),
}

/// The lease of an ASID: its holder is the only one that may bind the ASID or give it back.
///
/// A dropped lease is never given back, so no other guest gets the ASID.
#[must_use = "a lease that is dropped keeps the ASID in use"]
#[derive(Debug, PartialEq, Eq)]
pub struct AsidLease {
    asid: Asid,
    pool: PortId,
}

impl AsidLease {
    /// The ASID.
    #[inline]
    pub const fn asid(&self) -> Asid {
        self.asid
    }
}

/// The ASIDs of a machine: one value for all of its VMs, however many handles the port has.
///
/// An ASID is free, used, used up (its guest was deactivated, but caches and the data fabric may
/// still hold its lines), or leaked. Used-up ones become free only all at once, by WBINVD on every
/// processor and DF_FLUSH, which costs the whole machine; so that is done when nothing free is left
/// (Linux `sev_asid_new`, `__sev_recycle_asids`).
pub struct AsidPools {
    id: PortId,
    highest: u32,
    first_sev: u32,
    snp: SnpAsids,
    used: Box<[AtomicU64]>,
    reclaim: Box<[AtomicU64]>,
    leaked: AtomicU32,
    flushes: AtomicU64,
    gate: Gate,
}

impl AsidPools {
    /// The ASIDs of CPUID 8000_001F (ECX, EDX), split as SNP_INIT did.
    pub fn new(highest: u32, first_sev: u32, snp: SnpAsids) -> Self {
        let words = || (0..=highest / 64).map(|_| AtomicU64::new(0)).collect();
        Self {
            id: PortId::new(),
            highest,
            first_sev: first_sev.max(1),
            snp,
            used: words(),
            reclaim: words(),
            leaked: AtomicU32::new(0),
            flushes: AtomicU64::new(0),
            gate: Gate::default(),
        }
    }

    /// True if SNP is initialised.
    pub const fn has_snp(&self) -> bool {
        !matches!(self.snp, SnpAsids::Off)
    }

    /// The ASIDs that a guest of that technology may have; empty where it may have none. ASID 0 is
    /// the host's.
    pub fn range(&self, tech: Tech) -> RangeInclusive<u32> {
        let below = (self.first_sev - 1).min(self.highest);
        match (tech, self.snp) {
            (Tech::Sev, _) => self.first_sev..=self.highest,
            (Tech::SevEs, SnpAsids::UpTo(top)) => top.saturating_add(1)..=below,
            (Tech::SevEs, _) | (Tech::SevSnp, SnpAsids::Shared) => 1..=below,
            (Tech::SevSnp, SnpAsids::UpTo(top)) => 1..=top.min(below),
            _ => RangeInclusive::new(1, 0),
        }
    }

    /// Leases the lowest free ASID of the technology. Where none is free but some are used up,
    /// calls `flush`, which writes back all caches and flushes the data fabric; nothing is
    /// deactivated meanwhile. All used-up ASIDs are free then, of every technology.
    ///
    /// `relax` is called in every turn of waiting for another thread.
    ///
    /// # Errors
    /// [`Error::NoKeyId`] if all are in use, or the technology has none; what `flush` answers,
    /// and nothing is recycled then.
    pub fn lease(
        &self,
        tech: Tech,
        relax: impl Fn(),
        flush: impl FnOnce() -> Result<()>,
    ) -> Result<AsidLease> {
        let range = self.range(tech);
        if let Some(lease) = self.take(&range) {
            return Ok(lease);
        }
        let _alone = self.gate.alone(&relax);
        // Another thread may have flushed while this one waited.
        if let Some(lease) = self.take(&range) {
            return Ok(lease);
        }
        if !range.clone().any(|asid| self.is_used_up(asid)) {
            return Err(Error::NoKeyId);
        }
        flush()?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        for (used, reclaim) in self.used.iter().zip(&self.reclaim) {
            used.fetch_and(!reclaim.swap(0, Ordering::AcqRel), Ordering::AcqRel);
        }
        self.take(&range).ok_or(Error::NoKeyId)
    }

    fn take(&self, range: &RangeInclusive<u32>) -> Option<AsidLease> {
        range.clone().find_map(|asid| {
            let (word, bit) = self.bit(asid)?;
            let before = self.used[word].fetch_or(bit, Ordering::AcqRel);
            (before & bit == 0).then_some(AsidLease {
                asid: Asid(asid),
                pool: self.id,
            })
        })
    }

    fn is_used_up(&self, asid: u32) -> bool {
        self.bit(asid)
            .is_some_and(|(word, bit)| self.reclaim[word].load(Ordering::Acquire) & bit != 0)
    }

    fn bit(&self, asid: u32) -> Option<(usize, u64)> {
        (1..=self.highest)
            .contains(&asid)
            .then(|| (asid as usize / 64, 1 << (asid % 64)))
    }

    /// Does what clears the firmware's record that caches were written back (DEACTIVATE,
    /// SNP_DECOMMISSION), while no thread flushes: between WBINVD and DF_FLUSH it would make the
    /// flush fail (Linux `sev_deactivate_lock`).
    pub fn deactivating<T>(&self, relax: impl Fn(), body: impl FnOnce() -> T) -> T {
        let _shared = self.gate.shared(&relax);
        body()
    }

    /// Takes an ASID back whose guest was deactivated: it is used up until the next flush.
    ///
    /// # Errors
    /// The lease itself, if it is of other pools.
    pub fn retire(&self, lease: AsidLease) -> Result<(), AsidLease> {
        let (word, bit) = self.leased_bit(lease)?;
        self.reclaim[word].fetch_or(bit, Ordering::AcqRel);
        Ok(())
    }

    /// Takes an ASID back to which no guest was bound since it was leased.
    ///
    /// # Errors
    /// The lease itself, if it is of other pools.
    pub fn give_back(&self, lease: AsidLease) -> Result<(), AsidLease> {
        let (word, bit) = self.leased_bit(lease)?;
        self.used[word].fetch_and(!bit, Ordering::AcqRel);
        Ok(())
    }

    /// Counts a leased ASID as leaked. It is never leased again.
    ///
    /// # Errors
    /// The lease itself, if it is of other pools.
    pub fn leak(&self, lease: AsidLease) -> Result<(), AsidLease> {
        self.leased_bit(lease)?;
        self.leaked.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The place of a leased ASID in the bitmaps.
    fn leased_bit(&self, lease: AsidLease) -> Result<(usize, u64), AsidLease> {
        match self.bit(lease.asid.0) {
            Some(place) if lease.pool == self.id => Ok(place),
            _ => Err(lease),
        }
    }

    /// The number of ASIDs that guests have, with the leaked ones and without the used-up ones.
    pub fn in_use(&self) -> u32 {
        let count = |words: &[AtomicU64]| -> u32 {
            words
                .iter()
                .map(|word| word.load(Ordering::Acquire).count_ones())
                .sum()
        };
        count(&self.used).saturating_sub(count(&self.reclaim))
    }

    /// The number of ASIDs that are used up and wait for a flush.
    pub fn used_up(&self) -> u32 {
        self.reclaim
            .iter()
            .map(|word| word.load(Ordering::Acquire).count_ones())
            .sum()
    }

    /// The number that is leaked.
    pub fn leaked(&self) -> u32 {
        self.leaked.load(Ordering::Relaxed)
    }

    /// The number of flushes that leases had to make.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for AsidPools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsidPools")
            .field("highest", &self.highest)
            .field("first_sev", &self.first_sev)
            .field("snp", &self.snp)
            .field("in_use", &self.in_use())
            .field("used_up", &self.used_up())
            .field("leaked", &self.leaked())
            .finish_non_exhaustive()
    }
}

/// Many may deactivate at once, one may flush alone. Who wants to be alone goes first.
#[derive(Default)]
struct Gate(AtomicU32);

/// Set while somebody is alone, or waits to be.
const ALONE: u32 = 1 << 31;

impl Gate {
    fn alone(&self, relax: &impl Fn()) -> Alone<'_> {
        while self.0.fetch_or(ALONE, Ordering::AcqRel) & ALONE != 0 {
            relax();
        }
        while self.0.load(Ordering::Acquire) != ALONE {
            relax();
        }
        Alone(&self.0)
    }

    fn shared(&self, relax: &impl Fn()) -> Shared<'_> {
        loop {
            let seen = self.0.load(Ordering::Relaxed);
            let free = seen & ALONE == 0;
            if free
                && self
                    .0
                    .compare_exchange_weak(seen, seen + 1, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            {
                return Shared(&self.0);
            }
            relax();
        }
    }
}

struct Alone<'a>(&'a AtomicU32);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.fetch_and(!ALONE, Ordering::AcqRel);
    }
}

struct Shared<'a>(&'a AtomicU32);

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use core::cell::Cell;
    use core::sync::atomic::AtomicBool;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    const TECHS: [Tech; 3] = [Tech::Sev, Tech::SevEs, Tech::SevSnp];

    fn never() -> Result<()> {
        panic!("flushed without need")
    }

    fn drained(pools: &AsidPools, tech: Tech) -> Vec<u32> {
        leases(pools, tech)
            .iter()
            .map(|lease| lease.asid().0)
            .collect()
    }

    fn leases(pools: &AsidPools, tech: Tech) -> Vec<AsidLease> {
        core::iter::from_fn(|| pools.lease(tech, || (), never).ok()).collect()
    }

    #[test]
    fn every_split_gives_each_technology_the_range_that_cpuid_and_snp_init_say() {
        // (highest, first SEV, SNP) -> SEV, ES, SNP
        type Range = RangeInclusive<u32>;
        let none = || RangeInclusive::new(1, 0);
        let table: [(u32, u32, SnpAsids, [Range; 3]); 7] = [
            (9, 4, SnpAsids::Off, [4..=9, 1..=3, none()]),
            (9, 4, SnpAsids::Shared, [4..=9, 1..=3, 1..=3]),
            (9, 4, SnpAsids::UpTo(2), [4..=9, 3..=3, 1..=2]),
            (9, 4, SnpAsids::UpTo(3), [4..=9, none(), 1..=3]),
            (9, 4, SnpAsids::UpTo(7), [4..=9, none(), 1..=3]),
            (9, 1, SnpAsids::Shared, [1..=9, none(), none()]),
            (9, 10, SnpAsids::Shared, [none(), 1..=9, 1..=9]),
        ];
        for (highest, first_sev, snp, ranges) in table {
            for (tech, range) in TECHS.into_iter().zip(ranges) {
                let pools = AsidPools::new(highest, first_sev, snp);
                let leased = drained(&pools, tech);
                let wanted: Vec<u32> = range.collect();
                assert_eq!(leased, wanted, "{highest} {first_sev} {snp:?} {tech}");
                assert_eq!(pools.in_use() as usize, wanted.len());
            }
            let pools = AsidPools::new(highest, first_sev, snp);
            assert!(drained(&pools, Tech::Svm).is_empty());
        }
    }

    #[test]
    fn used_up_asids_come_back_all_at_once_by_one_flush() {
        let pools = AsidPools::new(200, 70, SnpAsids::Shared);
        let (sev, es) = (leases(&pools, Tech::Sev), leases(&pools, Tech::SevEs));
        let of_sev = sev.len();
        for lease in sev.into_iter().chain(es) {
            pools.retire(lease).unwrap();
        }
        assert_eq!((pools.in_use(), pools.used_up()), (0, 200));
        let flushes = Cell::new(0);
        let mut again = BTreeSet::new();
        for _ in 0..200 {
            let tech = if again.len() < of_sev {
                Tech::Sev
            } else {
                Tech::SevSnp
            };
            let asid = pools.lease(
                tech,
                || (),
                || {
                    flushes.set(flushes.get() + 1);
                    Ok(())
                },
            );
            assert!(again.insert(asid.unwrap().asid().0));
        }
        assert_eq!(
            (flushes.get(), pools.flushes(), pools.in_use()),
            (1, 1, 200)
        );
        assert_eq!(pools.lease(Tech::Sev, || (), never), Err(Error::NoKeyId));
    }

    #[test]
    fn a_failed_flush_recycles_nothing_and_the_next_may_succeed() {
        let pools = AsidPools::new(1, 1, SnpAsids::Off);
        let lease = pools.lease(Tech::Sev, || (), never).unwrap();
        let asid = lease.asid();
        pools.retire(lease).unwrap();
        let failed = pools.lease(Tech::Sev, || (), || Err(Error::Firmware(0xe)));
        assert_eq!((failed, pools.used_up()), (Err(Error::Firmware(0xe)), 1));
        let lease = pools.lease(Tech::Sev, || (), || Ok(())).unwrap();
        assert_eq!(lease.asid(), asid);
        pools.give_back(lease).unwrap();
        let lease = pools.lease(Tech::Sev, || (), never).unwrap();
        assert_eq!(lease.asid(), asid);
        pools.leak(lease).unwrap();
        assert_eq!((pools.leaked(), pools.in_use()), (1, 1));
    }

    #[test]
    fn a_lease_of_other_pools_is_refused_and_comes_back() {
        let new = || AsidPools::new(9, 4, SnpAsids::Shared);
        let (mine, others) = (new(), new());
        let lease = others.lease(Tech::Sev, || (), never).unwrap();
        let lease = mine.retire(lease).unwrap_err();
        let lease = mine.give_back(lease).unwrap_err();
        let lease = mine.leak(lease).unwrap_err();
        assert_eq!((mine.in_use(), mine.used_up(), mine.leaked()), (0, 0, 0));
        others.give_back(lease).unwrap();
        assert_eq!(others.in_use(), 0);
    }

    #[test]
    fn nothing_is_deactivated_during_a_flush_and_no_asid_is_had_twice() {
        let pools = AsidPools::new(6, 1, SnpAsids::Off);
        let held: Vec<AtomicBool> = (0..7).map(|_| AtomicBool::new(false)).collect();
        let (flushing, deactivating) = (AtomicBool::new(false), AtomicU32::new(0));
        let relax = std::thread::yield_now;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let leased = pools.lease(Tech::Sev, relax, || {
                            flushing.store(true, Ordering::SeqCst);
                            relax();
                            assert_eq!(deactivating.load(Ordering::SeqCst), 0);
                            flushing.store(false, Ordering::SeqCst);
                            Ok(())
                        });
                        let Ok(lease) = leased else { continue };
                        let asid = lease.asid();
                        assert!(!held[asid.0 as usize].swap(true, Ordering::SeqCst));
                        relax();
                        held[asid.0 as usize].store(false, Ordering::SeqCst);
                        pools.deactivating(relax, || {
                            deactivating.fetch_add(1, Ordering::SeqCst);
                            assert!(!flushing.load(Ordering::SeqCst));
                            deactivating.fetch_sub(1, Ordering::SeqCst);
                        });
                        pools.retire(lease).unwrap();
                    }
                });
            }
        });
        assert_eq!(pools.in_use(), 0);
        assert!(pools.flushes() > 0);
    }
}
