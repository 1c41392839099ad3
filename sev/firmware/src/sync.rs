//! The locks, and their order.
//!
//! 1. the mailbox (one command at a time),
//! 2. the cores' flush record,
//! 3. the key slot of an ASID; a guest's access holds it shared, so that unbinding waits for it,
//! 4. a turn at the pages that a guest's processors have open,
//! 5. one 2 MiB region of memory with its RMP entries,
//! 6. the monitor (counters, trace, injection).
//!
//! No thread holds two slots or two regions at once, and none that has a processor's turn asks for
//! what comes before it, so the order has no cycle. Under `--cfg
//! shuttle` the locks are those of a scheduler that tries interleavings at random.

#[cfg(shuttle)]
use shuttle::sync as imp;
#[cfg(not(shuttle))]
use std::sync as imp;

/// A mutex that a panicking holder does not spoil: every holder leaves whole values behind.
pub(crate) struct Lock<T>(imp::Mutex<T>);

impl<T> Lock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> imp::MutexGuard<'_, T> {
        match self.0.lock() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

/// A reader-writer lock with the same property.
pub(crate) struct Shared<T>(imp::RwLock<T>);

impl<T> Shared<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(imp::RwLock::new(value))
    }

    pub(crate) fn read(&self) -> imp::RwLockReadGuard<'_, T> {
        match self.0.read() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    pub(crate) fn write(&self) -> imp::RwLockWriteGuard<'_, T> {
        match self.0.write() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

pub(crate) type Guard<'a, T> = imp::MutexGuard<'a, T>;

pub(crate) type SharedGuard<'a, T> = imp::RwLockReadGuard<'a, T>;
