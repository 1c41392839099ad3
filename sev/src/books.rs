//! The account of what a VM took from its host.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_ops::{Asid, Error, FreeReport, Hpa, Leak, Leaked, Level, Pfn};
use spin::Mutex;

use crate::status::Failure;

/// How many 4 KiB frames a VM took, gave back, and lost; a 2 MiB page counts as 512.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Taken from the host, in all.
    pub allocated: u64,
    /// Given back, each usable again.
    pub freed: u64,
    /// Left to the firmware for good.
    pub leaked: u64,
}

impl Account {
    /// What the VM holds now.
    pub const fn held(&self) -> u64 {
        self.allocated - self.freed - self.leaked
    }
}

/// The books of one VM. Written from many threads.
#[derive(Debug)]
pub(crate) struct Books {
    allocated: AtomicU64,
    freed: AtomicU64,
    leaked: AtomicU64,
    keys_freed: AtomicU32,
    leaks: Mutex<Vec<Leak>>,
}

impl Books {
    pub(crate) fn new() -> Self {
        Self {
            allocated: AtomicU64::new(0),
            freed: AtomicU64::new(0),
            leaked: AtomicU64::new(0),
            keys_freed: AtomicU32::new(0),
            leaks: Mutex::new(Vec::new()),
        }
    }

    pub(crate) fn allocated(&self, level: Level) {
        self.allocated.fetch_add(level.frames(), Ordering::Relaxed);
    }

    pub(crate) fn freed(&self, level: Level) {
        self.freed.fetch_add(level.frames(), Ordering::Relaxed);
    }

    pub(crate) fn leak_page(&self, page: Pfn, level: Level, error: Error) {
        self.leaked.fetch_add(level.frames(), Ordering::Relaxed);
        let at = page.base().unwrap_or(Hpa::new(u64::MAX));
        self.leak(Leaked::Page(at), error);
    }

    pub(crate) fn leak_key(&self, asid: Asid, error: Error) {
        self.leak(Leaked::Key(asid.0), error);
    }

    pub(crate) fn leak_handle(&self, handle: u32, error: Error) {
        self.leak(Leaked::Handle(handle.into()), error);
    }

    fn leak(&self, what: Leaked, error: Error) {
        let operation = match Failure::of(&error) {
            Some(failure) => failure.operation.name(),
            None => "mailbox",
        };
        self.leaks.lock().push(Leak {
            what,
            operation,
            error,
        });
    }

    pub(crate) fn key_freed(&self) {
        self.keys_freed.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn keys_freed(&self) -> u32 {
        self.keys_freed.load(Ordering::Relaxed)
    }

    pub(crate) fn account(&self) -> Account {
        Account {
            allocated: self.allocated.load(Ordering::Relaxed),
            freed: self.freed.load(Ordering::Relaxed),
            leaked: self.leaked.load(Ordering::Relaxed),
        }
    }

    /// Takes over the pages that another account holds.
    pub(crate) fn take(&self, from: &Self) {
        let moved = from.account().held();
        from.allocated.fetch_sub(moved, Ordering::Relaxed);
        self.allocated.fetch_add(moved, Ordering::Relaxed);
    }

    /// Adds what was freed and leaked to a VM's report.
    pub(crate) fn add_to(&self, report: &mut FreeReport) {
        report.pages_freed += self.account().freed;
        report.keys_freed += self.keys_freed();
        report.leaks.extend(self.leaks());
    }

    pub(crate) fn leaks(&self) -> Vec<Leak> {
        self.leaks.lock().clone()
    }
}
