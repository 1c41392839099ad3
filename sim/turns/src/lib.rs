#![doc = include_str!("../README.md")]

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom), not(shuttle)))]
mod tests;

use imp::{Condvar, Mutex, MutexGuard};
#[cfg(loom)]
use loom::sync as imp;
#[cfg(shuttle)]
use shuttle::sync as imp;
#[cfg(not(any(loom, shuttle)))]
use std::sync as imp;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

/// The turns at the open pages of one guest, in the order in which they were asked for: one has a turn alone, or several
/// processors have turns together.
#[derive(Debug)]
pub struct Turns {
    queue: Mutex<Queue>,
    moved: Condvar,
    closed: AtomicU64,
    written: AtomicU64,
}

/// Tickets: the next to hand out, and the one whose turn it is.
#[derive(Debug)]
struct Queue {
    next: u64,
    serving: u64,
    /// Turns that are had together.
    inside: u32,
}

/// A turn, until it is dropped. A thread that has one and asks for another of the same [`Turns`] may wait forever: who is
/// alone for itself, who shares for somebody who waits to be alone.
#[derive(Debug)]
pub struct Turn {
    turns: Arc<Turns>,
    is_shared: bool,
}

impl Queue {
    /// Someone waits: a notification is a system call, whether a thread waits or not.
    fn is_awaited(&self) -> bool {
        self.next != self.serving
    }
}

impl Default for Turns {
    fn default() -> Self {
        Self::new()
    }
}

impl Turns {
    /// Turns that nobody has.
    #[must_use]
    pub fn new() -> Self {
        Self {
            queue: Mutex::new(Queue {
                next: 0,
                serving: 0,
                inside: 0,
            }),
            moved: Condvar::new(),
            closed: AtomicU64::new(0),
            written: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Plain values; a panic elsewhere leaves nothing half done in them.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a ticket, and waits until it is served and `ready`.
    fn queue(&self, ready: impl Fn(&Queue) -> bool) -> MutexGuard<'_, Queue> {
        let mut queue = self.lock();
        let ticket = queue.next;
        queue.next += 1;
        while queue.serving != ticket || !ready(&queue) {
            queue = self
                .moved
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue
    }

    fn turn(self: &Arc<Self>, is_shared: bool) -> Turn {
        Turn {
            turns: self.clone(),
            is_shared,
        }
    }

    /// Waits for a turn that nobody else has.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Turn {
        drop(self.queue(|queue| queue.inside == 0));
        self.turn(false)
    }

    /// Waits for a turn that others may share.
    #[must_use]
    pub fn share(self: &Arc<Self>) -> Turn {
        let mut queue = self.queue(|_| true);
        queue.inside += 1;
        // The next one may share it, too.
        queue.serving += 1;
        let awaited = queue.is_awaited();
        drop(queue);
        if awaited {
            self.moved.notify_all();
        }
        self.turn(true)
    }

    /// Takes a turn alone if no thread has or awaits one.
    #[must_use]
    pub fn try_take(self: &Arc<Self>) -> Option<Turn> {
        let mut queue = self.lock();
        let is_free = !queue.is_awaited() && queue.inside == 0;
        queue.next += u64::from(is_free);
        is_free.then(|| self.turn(false))
    }

    /// Counts a page that was taken back, in a turn alone: whoever has a pointer to it asks again.
    pub fn note_closed(&self) {
        self.closed.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts a write of the platform to an open page, in a turn alone.
    pub fn note_written(&self) {
        self.written.fetch_add(1, Ordering::AcqRel);
    }
}

impl Turn {
    /// How often a page was taken back. It does not change while the turn lasts.
    #[must_use]
    pub fn closed(&self) -> u64 {
        self.turns.closed.load(Ordering::Acquire)
    }

    /// How often the platform wrote to an open page. It does not change while the turn lasts.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.turns.written.load(Ordering::Acquire)
    }

    /// What this is a turn of.
    #[must_use]
    pub fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// True for a turn alone at these pages.
    #[must_use]
    pub fn is_alone_at(&self, turns: &Arc<Turns>) -> bool {
        Arc::ptr_eq(&self.turns, turns) && !self.is_shared
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let awaited = {
            let mut queue = self.turns.lock();
            match self.is_shared {
                true => queue.inside -= 1,
                false => queue.serving += 1,
            }
            queue.inside == 0 && queue.is_awaited()
        };
        if awaited {
            self.turns.moved.notify_all();
        }
    }
}
