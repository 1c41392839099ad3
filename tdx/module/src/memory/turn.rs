//! Turns at the memory that the processors of a TD have open.

use crate::arena::lock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// The turns at the open pages of one key, in the order in which they were asked for.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    queue: Mutex<Queue>,
    moved: Condvar,
    closed: AtomicU64,
    written: AtomicU64,
}

/// Tickets: the next to hand out, and the one whose turn it is.
#[derive(Debug, Default)]
struct Queue {
    next: u64,
    serving: u64,
}

/// The right to use the bytes of [`GuestFrame`](super::GuestFrame)s of a TD by their pointers, until it is dropped. The
/// module itself takes a turn when it touches such a page, on any thread: a thread that has one must not call
/// the module, but for [`Platform::guest_page`](crate::Platform::guest_page) and accesses to pages that are
/// no frames.
#[derive(Debug)]
pub struct GuestTurn(Arc<Turns>);

impl Turns {
    /// Waits for a turn.
    pub(crate) fn take(self: &Arc<Self>) -> GuestTurn {
        let mut queue = lock(&self.queue);
        let ticket = queue.next;
        queue.next += 1;
        while queue.serving != ticket {
            queue = self
                .moved
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        GuestTurn(self.clone())
    }

    /// Takes a turn if no thread has or awaits one.
    pub(super) fn try_take(self: &Arc<Self>) -> Option<GuestTurn> {
        let mut queue = lock(&self.queue);
        let is_free = queue.next == queue.serving;
        queue.next += u64::from(is_free);
        is_free.then(|| GuestTurn(self.clone()))
    }

    /// A page was closed: whoever has a pointer to it asks again.
    pub(super) fn note_closed(&self) {
        self.closed.fetch_add(1, Ordering::AcqRel);
    }

    /// The module wrote to an open page.
    pub(super) fn note_written(&self) {
        self.written.fetch_add(1, Ordering::AcqRel);
    }
}

impl GuestTurn {
    /// How often a frame of the TD was taken back. It does not change while the turn lasts.
    #[must_use]
    pub fn closed(&self) -> u64 {
        self.0.closed.load(Ordering::Acquire)
    }

    /// How often the module wrote to a frame of the TD: a report, zeros, what a debugger writes. A processor that keeps
    /// decoded code compares it with memory when this is another number. It does not change while the turn lasts.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.0.written.load(Ordering::Acquire)
    }

    pub(super) fn is_at(&self, turns: &Arc<Turns>) -> bool {
        Arc::ptr_eq(&self.0, turns)
    }
}

impl Drop for GuestTurn {
    fn drop(&mut self) {
        let awaited = {
            let mut queue = lock(&self.0.queue);
            queue.serving += 1;
            queue.next > queue.serving
        };
        // A notification is a system call, whether a thread waits or not.
        if awaited {
            self.0.moved.notify_all();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn one_thread_at_a_time_has_a_turn_and_each_gets_one() {
        let turns = Arc::<Turns>::default();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for n in 0..4 {
                let (turns, inside) = (&turns, &inside);
                scope.spawn(move || {
                    for _ in 0..500 {
                        let taken = if n == 0 { turns.try_take() } else { None };
                        let turn = taken.unwrap_or_else(|| turns.take());
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
        });
        assert!(turns.try_take().is_some());
    }

    #[test]
    fn a_turn_that_is_held_is_not_taken_twice() {
        let turns = Arc::<Turns>::default();
        let turn = turns.take();
        assert!(turns.try_take().is_none());
        assert!(turn.is_at(&turns) && !turn.is_at(&Arc::default()));
        drop(turn);
        assert!(turns.try_take().is_some());
    }
}
