//! The lock of the staging table and the flags of moves: the real ones, or the model checker's.

#[cfg(not(loom))]
pub(super) use core::sync::atomic::{AtomicBool, Ordering};
#[cfg(loom)]
pub(super) use loom::sync::atomic::{AtomicBool, Ordering};

#[cfg(not(loom))]
pub(super) use spin::Mutex as Lock;

/// The model checker's mutex, without poisoning.
#[cfg(loom)]
pub(super) struct Lock<T>(loom::sync::Mutex<T>);

#[cfg(loom)]
impl<T> Lock<T> {
    pub(super) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(super) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        self.0.lock().expect("no thread of a model panics")
    }
}
