//! The account of the pages and keys that a VM takes from its host.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use spin::Mutex;

use crate::{Error, FreeReport, Leak, Leaked, Level, Life, Page, PagePort, Pfn, Result};

/// The account of one VM. Every page that the VM takes is held, freed, or a leak with a reason.
/// Several threads may use it at once.
#[derive(Debug, Default)]
pub struct PageAccount {
    taken: AtomicU64,
    freed: AtomicU64,
    keys_freed: AtomicU32,
    leaked: AtomicU64,
    leaks: Mutex<Vec<Leak>>,
}

/// Sums of a [`PageAccount`], in pages of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageTotals {
    /// Taken from the host.
    pub taken: u64,
    /// Given back to the host, each usable again.
    pub freed: u64,
    /// Left to firmware for good.
    pub leaked: u64,
}

impl PageTotals {
    /// The pages that the VM holds.
    pub const fn held(&self) -> u64 {
        self.taken - self.freed - self.leaked
    }
}

impl PageAccount {
    /// An account of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a page from the host.
    ///
    /// # Errors
    /// The answer of [`PagePort::alloc`].
    pub fn take<P: PagePort>(&self, port: &P, level: Level) -> Result<Page> {
        let page = port.alloc(level)?;
        self.taken.fetch_add(level.frames(), Ordering::Relaxed);
        Ok(page)
    }

    /// Gives a page back to the host. A page that the port refuses, because it is another port's, is
    /// counted as leaked.
    pub fn give_back<P: PagePort>(&self, port: &P, page: Page) {
        let frames = page.level().frames();
        match port.free(page) {
            Ok(()) => {
                self.freed.fetch_add(frames, Ordering::Relaxed);
            }
            Err(page) => {
                let error = Error::Invalid(crate::Field::Page, page.hpa().get());
                self.leak(page, "free page", error);
            }
        }
    }

    /// Counts a page that the VM got from its embedder, which took it from the port.
    pub fn adopt(&self, page: &Page) {
        let frames = page.level().frames();
        self.taken.fetch_add(frames, Ordering::Relaxed);
    }

    /// Stops counting a page that goes back to the embedder.
    pub fn hand_out(&self, page: &Page) {
        let frames = page.level().frames();
        self.taken.fetch_sub(frames, Ordering::Relaxed);
    }

    /// Counts a page as leaked: firmware may still own it, so the host never uses it again.
    pub fn leak(&self, page: Page, operation: &'static str, error: Error) {
        let level = page.level();
        self.leak_raw(page.into_raw(), level, operation, error);
    }

    /// Counts the page of a table entry as leaked. The entry gives up its ownership.
    pub fn leak_raw(&self, page: Pfn, level: Level, operation: &'static str, error: Error) {
        self.leaked.fetch_add(level.frames(), Ordering::Relaxed);
        let mut leaks = self.leaks.lock();
        let frames = (0..level.frames()).filter_map(|n| page.checked_add(n).and_then(Pfn::base));
        leaks.extend(frames.map(|hpa| Leak {
            what: Leaked::Page(hpa),
            operation,
            error,
        }));
    }

    /// Adds a leak that is no page: a key or a handle.
    pub fn leak_other(&self, what: Leaked, operation: &'static str, error: Error) {
        self.leaks.lock().push(Leak {
            what,
            operation,
            error,
        });
    }

    /// Counts a key that went back to its pool.
    pub fn key_freed(&self) {
        self.keys_freed.fetch_add(1, Ordering::Relaxed);
    }

    /// The sums.
    pub fn totals(&self) -> PageTotals {
        PageTotals {
            taken: self.taken.load(Ordering::Relaxed),
            freed: self.freed.load(Ordering::Relaxed),
            leaked: self.leaked.load(Ordering::Relaxed),
        }
    }

    /// Takes over the pages that another account holds, with the VM's encryption context. Nothing is
    /// taken, freed or leaked on `from` meanwhile.
    pub fn take_over(&self, from: &Self) {
        let held = from.totals().held();
        from.taken.fetch_sub(held, Ordering::Relaxed);
        self.taken.fetch_add(held, Ordering::Relaxed);
    }

    /// Exchanges the pages that two accounts hold. Nothing is taken, freed or leaked on them
    /// meanwhile.
    pub fn exchange(&self, other: &Self) {
        let (mine, others) = (self.totals().held(), other.totals().held());
        for (account, gone, come) in [(self, mine, others), (other, others, mine)] {
            account.taken.fetch_add(come, Ordering::Relaxed);
            account.taken.fetch_sub(gone, Ordering::Relaxed);
        }
    }

    /// True if nothing is leaked so far.
    pub fn is_clean(&self) -> bool {
        self.leaks.lock().is_empty()
    }

    /// The report of the VM's end. A page that is still held counts as neither freed nor leaked, so
    /// the caller frees or leaks every page first.
    pub fn report(&self, life: &Life) -> FreeReport {
        FreeReport {
            vm: life.id(),
            tech: life.tech(),
            pages_freed: self.freed.load(Ordering::Relaxed),
            keys_freed: self.keys_freed.load(Ordering::Relaxed),
            leaks: self.leaks.lock().clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::{Hpa, PortId, Tech, VmId};

    struct Pages(PortId, AtomicU64);

    impl PagePort for Pages {
        fn id(&self) -> PortId {
            self.0
        }

        fn alloc(&self, level: Level) -> Result<Page> {
            let pfn = self.1.fetch_add(level.frames(), Ordering::Relaxed);
            // SAFETY: the counter gives each frame once, and the frames are numbers only.
            Ok(unsafe { Page::from_raw(Pfn::new(pfn), level, self.0) })
        }

        fn free(&self, page: Page) -> Result<(), Page> {
            if page.port() == self.0 {
                Ok(())
            } else {
                Err(page)
            }
        }

        fn write(&self, _: Hpa, _: &[u8]) -> Result<()> {
            Ok(())
        }

        fn read(&self, _: Hpa, _: &mut [u8]) -> Result<()> {
            Ok(())
        }
    }

    fn pages() -> Pages {
        Pages(PortId::new(), AtomicU64::new(512))
    }

    #[test]
    fn every_page_is_held_freed_or_leaked() {
        let (port, account) = (pages(), PageAccount::new());
        let small = account.take(&port, Level::Size4K).unwrap();
        let large = account.take(&port, Level::Size2M).unwrap();
        assert_eq!(account.totals().held(), 513);
        account.give_back(&port, small);
        account.leak(large, "test", Error::Busy);
        let totals = account.totals();
        assert_eq!((totals.taken, totals.freed, totals.leaked), (513, 1, 512));
        assert_eq!(totals.held(), 0);
        let report = account.report(&Life::new(VmId(1), Tech::Tdx));
        assert_eq!((report.pages_freed, report.leaks.len()), (1, 512));
    }

    #[test]
    fn accounts_that_exchange_what_they_hold_keep_what_they_freed_and_lost() {
        let (port, a, b) = (pages(), PageAccount::new(), PageAccount::new());
        let (page, large) = (a.take(&port, Level::Size4K), a.take(&port, Level::Size2M));
        let other = b.take(&port, Level::Size4K).unwrap();
        a.give_back(&port, page.unwrap());
        a.exchange(&b);
        assert_eq!((a.totals().held(), b.totals().held()), (1, 512));
        assert_eq!((a.totals().freed, b.totals().freed), (1, 0));
        b.give_back(&port, large.unwrap());
        a.give_back(&port, other);
        assert_eq!((a.totals().held(), b.totals().held()), (0, 0));
    }

    #[test]
    fn a_page_of_another_port_is_not_freed_but_reported() {
        let (mine, other, account) = (pages(), pages(), PageAccount::new());
        let page = account.take(&other, Level::Size4K).unwrap();
        account.give_back(&mine, page);
        assert_eq!((account.totals().freed, account.totals().leaked), (0, 1));
        assert!(!account.is_clean());
    }

    #[test]
    fn a_context_takes_its_pages_along() {
        let (port, from, to) = (pages(), PageAccount::new(), PageAccount::new());
        let page = from.take(&port, Level::Size4K).unwrap();
        to.take_over(&from);
        assert_eq!((from.totals().held(), to.totals().held()), (0, 1));
        to.give_back(&port, page);
        assert_eq!(to.totals().held(), 0);
    }
}
