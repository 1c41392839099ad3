//! Memory that will hold encrypted data and must not move (`KVM_MEMORY_ENCRYPT_REG_REGION`).

use alloc::vec::Vec;

use kvm_ops::{EncRegion, Error, Field, PAGE_SIZE, Result};

/// The most pages that one region may span (Linux `sev_pin_memory`: INT_MAX).
pub const MAX_REGION_PAGES: u64 = i32::MAX as u64;

/// The regions of a VM, with their account: as in Linux, a region counts the pages that it touches,
/// and a page that two regions touch counts twice.
#[derive(Clone, Debug)]
pub(crate) struct Regions {
    list: Vec<EncRegion>,
    pages: u64,
    limit: u64,
}

impl Default for Regions {
    fn default() -> Self {
        Self {
            list: Vec::new(),
            pages: 0,
            limit: u64::MAX,
        }
    }
}

/// The number of pages that a region touches: it need not be aligned.
fn span(region: EncRegion) -> Result<u64> {
    let bad = Error::Invalid(Field::Size, region.bytes);
    let last = region.bytes.checked_sub(1).ok_or(bad)?;
    let last = region.address.checked_add(last).ok_or(bad)?;
    let pages = last / PAGE_SIZE - region.address / PAGE_SIZE + 1;
    if pages > MAX_REGION_PAGES {
        return Err(bad);
    }
    Ok(pages)
}

impl Regions {
    /// As RLIMIT_MEMLOCK limits what Linux pins.
    pub(crate) fn set_limit(&mut self, pages: u64) {
        self.limit = pages;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// True if a region touches the page at an address.
    pub(crate) fn has(&self, page: u64) -> bool {
        self.list.iter().any(|region| {
            // A region has a last byte: it was checked when it came.
            let last = region.address.saturating_add(region.bytes - 1);
            (region.address / PAGE_SIZE..=last / PAGE_SIZE).contains(&(page / PAGE_SIZE))
        })
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn register(&mut self, region: EncRegion) -> Result<()> {
        let pages = self.pages.saturating_add(span(region)?);
        if pages > self.limit {
            return Err(Error::NoMemory);
        }
        self.list.push(region);
        self.pages = pages;
        Ok(())
    }

    /// Takes another VM's regions over. They stay pinned all the time: the limit is for new ones.
    pub(crate) fn take(&mut self, from: &mut Self) {
        self.list.append(&mut from.list);
        self.pages += core::mem::take(&mut from.pages);
    }

    /// Of equal regions the one that came last goes.
    pub(crate) fn unregister(&mut self, region: EncRegion) -> Result<()> {
        let at = self.list.iter().rposition(|known| *known == region);
        let at = at.ok_or(Error::Invalid(Field::HostAddress, region.address))?;
        self.list.remove(at);
        self.pages -= span(region)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    fn region(address: u64, bytes: u64) -> EncRegion {
        EncRegion { address, bytes }
    }

    #[test]
    fn what_linux_refuses_is_refused() {
        let mut regions = Regions::default();
        let size = |bytes| Err(Error::Invalid(Field::Size, bytes));
        assert_eq!(regions.register(region(0, 0)), size(0));
        assert_eq!(regions.register(region(u64::MAX, 2)), size(2));
        assert_eq!(regions.register(region(1, u64::MAX)), size(u64::MAX));
        let most = MAX_REGION_PAGES * PAGE_SIZE;
        assert_eq!(regions.register(region(0, most + 1)), size(most + 1));
        assert_eq!(regions.register(region(0, most)), Ok(()));
        let unknown = Err(Error::Invalid(Field::HostAddress, 0));
        assert_eq!(regions.unregister(region(0, most - 1)), unknown);
        assert_eq!(regions.unregister(region(0, most)), Ok(()));
        assert_eq!(regions.unregister(region(0, most)), unknown);
        regions.set_limit(2);
        assert_eq!(
            regions.register(region(0xfff, 0x1002)),
            Err(Error::NoMemory)
        );
        assert_eq!(regions.register(region(0xfff, 2)), Ok(()));
        assert_eq!((regions.pages(), regions.list.len()), (2, 1));
    }

    #[test]
    fn a_region_may_end_with_the_last_byte_there_is() {
        let mut regions = Regions::default();
        let last_page = u64::MAX - (PAGE_SIZE - 1);
        assert_eq!(regions.register(region(last_page, PAGE_SIZE)), Ok(()));
        assert!(regions.has(last_page));
        assert!(!regions.has(last_page - PAGE_SIZE));
    }

    proptest! {
        #[test]
        fn the_account_is_the_sum_of_the_spans(
            history in proptest::collection::vec((any::<bool>(), 0..4u64, 0..4u64), 0..60),
        ) {
            let mut regions = Regions::default();
            let mut model: Vec<EncRegion> = Vec::new();
            for (add, address, bytes) in history {
                let region = region(address * 0x800, bytes * 0x900);
                let known = model.iter().position(|r| *r == region);
                if add {
                    prop_assert_eq!(regions.register(region).is_ok(), bytes != 0);
                    model.extend((bytes != 0).then_some(region));
                } else {
                    prop_assert_eq!(regions.unregister(region).is_ok(), known.is_some());
                    known.map(|at| model.remove(at));
                }
                let pages: u64 = model
                    .iter()
                    .map(|r| (r.address + r.bytes).div_ceil(PAGE_SIZE) - r.address / PAGE_SIZE)
                    .sum();
                prop_assert_eq!(regions.pages(), pages);
            }
        }
    }
}
