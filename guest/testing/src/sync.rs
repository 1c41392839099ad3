//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A lock whose holder's panic is the test's own failure.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
