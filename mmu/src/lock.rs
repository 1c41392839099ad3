//! A reader-writer lock whose readers do not touch each other's cache lines.
//!
//! Linux faults private memory under `mmu_lock` held for reading. A plain reader-writer lock makes
//! all vCPUs write one word for each fault, which costs more than the fault's walk and scales
//! backwards; here each vCPU has a slot on a separate cache line.

use alloc::boxed::Box;
use core::cell::UnsafeCell;
use core::fmt;
use core::ops::{Deref, DerefMut};

use crate::sync::{AtomicBool, Ordering, total_order};

/// A flag alone on two cache lines: processors fetch lines in pairs.
#[repr(align(128))]
struct Flag(AtomicBool);

/// A value that many read at once and one changes alone.
///
/// A reader raises the flag of its slot and looks for a writer; a writer raises its flag and waits
/// until every slot's is down. So a read costs one locked instruction on a line that no other
/// reader writes, and a write costs a look at every slot. A waiting writer goes before new readers.
///
/// The waits call a `relax` of the caller's: a pause, a yield, or an emulated machine's turn.
/// Neither side may be taken again by a thread that holds it: it would wait for itself.
///
/// ```
/// # use kvm_ops_mmu::ReaderLock;
/// let lock = ReaderLock::new(4, 7); // as many slots as vCPUs
/// assert_eq!(*lock.read(2, std::thread::yield_now), 7);
/// *lock.write(std::thread::yield_now) += 1;
/// assert_eq!(lock.into_inner(), 8);
/// ```
pub struct ReaderLock<T> {
    writer: Flag,
    slots: Box<[Flag]>,
    value: UnsafeCell<T>,
}

// SAFETY: the lock owns the value and gives it away whole in `into_inner`; that needs `T: Send`.
unsafe impl<T: Send> Send for ReaderLock<T> {}
// SAFETY: readers share `&T` between threads (`T: Sync`), and a writer in any thread has `&mut T`,
// with which it may move the value out (`T: Send`).
unsafe impl<T: Send + Sync> Sync for ReaderLock<T> {}

impl<T> ReaderLock<T> {
    /// A lock with `slots` slots (at least one), usually one for each vCPU and one for all others.
    pub fn new(slots: usize, value: T) -> Self {
        let slot = || Flag(AtomicBool::new(false));
        Self {
            writer: slot(),
            slots: (0..slots.max(1)).map(|_| slot()).collect(),
            value: UnsafeCell::new(value),
        }
    }

    /// The number of slots.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Reads if no writer holds or awaits the lock and no other thread holds the slot.
    ///
    /// Slots are counted round: any number is right, and threads that share one take turns.
    #[inline]
    pub fn try_read(&self, slot: usize) -> Option<ReadGuard<'_, T>> {
        // One vCPU's slot is in range; a division would cost more than the rest of the walk.
        let slot = match self.slots.get(slot) {
            Some(slot) => slot,
            None => &self.slots[slot % self.slots.len()],
        };
        // The flag goes up before the writer's is looked at, and the writer does it the other way
        // round, all SeqCst: at least one of the two sees the other.
        slot.0
            .compare_exchange(false, true, Ordering::SeqCst, Ordering::Relaxed)
            .ok()?;
        total_order();
        if self.writer.0.load(Ordering::SeqCst) {
            slot.0.store(false, Ordering::Release);
            return None;
        }
        Some(ReadGuard { lock: self, slot })
    }

    /// Reads; waits while a writer holds or awaits the lock, or another thread the slot.
    #[inline]
    pub fn read(&self, slot: usize, mut relax: impl FnMut()) -> ReadGuard<'_, T> {
        loop {
            if let Some(guard) = self.try_read(slot) {
                return guard;
            }
            // Without the slot's flag, which the writer waits for: once it is seen down it stays so.
            relax();
            while self.writer.0.load(Ordering::Relaxed) {
                relax();
            }
        }
    }

    /// Writes; waits for every reader and writer before it.
    pub fn write(&self, mut relax: impl FnMut()) -> WriteGuard<'_, T> {
        while self
            .writer
            .0
            .compare_exchange(false, true, Ordering::SeqCst, Ordering::Relaxed)
            .is_err()
        {
            relax();
        }
        // From here on the guard's drop takes the flag back, even if `relax` panics.
        let guard = WriteGuard { lock: self };
        total_order();
        for slot in &self.slots {
            while slot.0.load(Ordering::SeqCst) {
                relax();
            }
        }
        guard
    }

    /// The value, without locking: `&mut self` excludes every other user.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    /// The value, at the lock's end.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

impl<T> fmt::Debug for ReaderLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReaderLock")
            .field("slots", &self.slots.len())
            .finish_non_exhaustive()
    }
}

/// The right to read.
#[must_use = "the lock is held until it is dropped"]
pub struct ReadGuard<'a, T> {
    lock: &'a ReaderLock<T>,
    slot: &'a Flag,
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: this guard's slot is up and was so before the writer's flag was seen down, so a
        // writer that raised its flag later waits for the slot: no `&mut T` exists.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // Only this guard lowers the slot, so a plain store does; Release puts the reads before it.
        self.slot.0.store(false, Ordering::Release);
    }
}

/// The right to write.
#[must_use = "the lock is held until it is dropped"]
pub struct WriteGuard<'a, T> {
    lock: &'a ReaderLock<T>,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: as in `deref_mut`; the guard is borrowed shared, so there is no `&mut T`.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: `write` returned, so this guard's flag is the one writer's and every slot was
        // seen down after it went up; a reader that raised a slot since saw the flag and left.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.writer.0.store(false, Ordering::SeqCst);
    }
}
