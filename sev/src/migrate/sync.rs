//! The lock of the staging table and the flags of moves: the real ones, or the model checker's.

#[cfg(not(loom))]
pub(super) use core::sync::atomic::{AtomicBool, Ordering};
#[cfg(loom)]
pub(super) use loom::sync::atomic::{AtomicBool, Ordering};

/// A lock whose sections are a few instructions long.
#[cfg(not(loom))]
pub(super) struct Lock<T>(kvm_ops_mmu::ReaderLock<T>);

#[cfg(not(loom))]
impl<T> Lock<T> {
    pub(super) fn new(value: T) -> Self {
        Self(kvm_ops_mmu::ReaderLock::new(1, value))
    }

    pub(super) fn lock(&self) -> kvm_ops_mmu::WriteGuard<'_, T> {
        self.0.write(core::hint::spin_loop)
    }
}

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
