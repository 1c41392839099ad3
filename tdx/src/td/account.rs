//! The account of pages: every page ever taken is freed, in use, or a leak with a reason.

use alloc::vec::Vec;

use kvm_ops::{Error, Leak, Leaked, Level, Pfn};

use crate::seamcall::{Failed, Leaf};

/// Counts in units of 4 KiB.
#[derive(Debug, Default)]
pub(crate) struct Account {
    pub(crate) taken: u64,
    pub(crate) freed: u64,
    pub(crate) leaks: Vec<Leak>,
    /// The first failure that left a page with the module, which then keeps the TDR too.
    pub(crate) kept: Option<Failed>,
}

impl Account {
    /// Counts a page as leaked: one entry for each 4 KiB of it.
    pub(crate) fn leak(&mut self, page: Pfn, level: Level, operation: &'static str, error: Error) {
        for n in 0..level.frames() {
            let Some(hpa) = page.checked_add(n).and_then(Pfn::base) else {
                return;
            };
            self.leaks.push(Leak {
                what: Leaked::Page(hpa),
                operation,
                error,
            });
        }
    }

    /// Counts a page as leaked because of a failed call.
    pub(crate) fn leak_after(&mut self, page: Pfn, level: Level, failed: &Failed) {
        self.leak(page, level, failed.leaf.name(), failed.leak_error());
        if failed.leaf != Leaf::PhymemPageWbinvd {
            self.kept.get_or_insert(*failed);
        }
    }
}
