//! A mutex whose waits call back: the lock for state that one thread at a time uses.

use core::fmt;

/// A value that one thread at a time may use. For many readers take [`ReaderLock`](crate::ReaderLock).
///
/// Waits call a `relax` of the caller's: a pause, a yield, or the turn of an emulated machine. The
/// guard releases the lock when it is dropped. A thread that locks twice waits for itself.
///
/// ```
/// # use kvm_ops_mmu::Mutex;
/// let pages = Mutex::new(vec![1, 2]);
/// pages.lock(std::thread::yield_now).push(3);
/// assert_eq!(pages.into_inner(), [1, 2, 3]);
/// ```
#[derive(Default)]
pub struct Mutex<T>(spin::Mutex<T>);

/// Access to the value of a [`Mutex`].
pub type MutexGuard<'a, T> = spin::MutexGuard<'a, T>;

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub const fn new(value: T) -> Self {
        Self(spin::Mutex::new(value))
    }

    /// Locks if no other thread holds the lock.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock()
    }

    /// Locks; calls `relax` in each turn of the wait.
    pub fn lock(&self, mut relax: impl FnMut()) -> MutexGuard<'_, T> {
        loop {
            match self.0.try_lock() {
                Some(guard) => return guard,
                None => relax(),
            }
        }
    }

    /// The value, without locking: `&mut self` excludes every other user.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }

    /// Ends the lock and returns the value.
    pub fn into_inner(self) -> T {
        self.0.into_inner()
    }
}

impl<T: fmt::Debug> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
