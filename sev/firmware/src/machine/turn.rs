//! Turns at the pages that the processors of a guest have open.

use super::Owner;
use crate::cipher::MemoryKey;
use crate::sync::{Lock, Signal};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The turns at the open pages of one ASID's guest, in the order in which they were asked for.
pub(crate) struct Turns {
    queue: Lock<Queue>,
    moved: Signal,
    closed: AtomicU64,
}

/// Tickets: the next to hand out, and the one whose turn it is.
struct Queue {
    next: u64,
    serving: u64,
}

/// A turn without the guest's key.
pub(crate) struct Ticket(Arc<Turns>);

impl Turns {
    pub(crate) fn new() -> Self {
        Self {
            queue: Lock::new(Queue {
                next: 0,
                serving: 0,
            }),
            moved: Signal::new(),
            closed: AtomicU64::new(0),
        }
    }

    /// Waits for a turn.
    pub(crate) fn take(self: &Arc<Self>) -> Ticket {
        let mut queue = self.queue.lock();
        let ticket = queue.next;
        queue.next += 1;
        while queue.serving != ticket {
            queue = self.moved.wait(queue);
        }
        Ticket(Arc::clone(self))
    }

    /// Takes a turn if no thread has or awaits one.
    pub(crate) fn try_take(self: &Arc<Self>) -> Option<Ticket> {
        let mut queue = self.queue.lock();
        let is_free = queue.next == queue.serving;
        queue.next += u64::from(is_free);
        is_free.then(|| Ticket(Arc::clone(self)))
    }

    /// A page was closed: whoever has a pointer to it asks again.
    pub(crate) fn note_closed(&self) {
        self.closed.fetch_add(1, Ordering::AcqRel);
    }
}

impl Ticket {
    pub(crate) fn is_at(&self, turns: &Arc<Turns>) -> bool {
        Arc::ptr_eq(&self.0, turns)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let awaited = {
            let mut queue = self.0.queue.lock();
            queue.serving += 1;
            queue.next > queue.serving
        };
        // A notification is a system call, whether a thread waits or not.
        if awaited {
            self.0.moved.notify_all();
        }
    }
}

/// The right to use the bytes of a guest's [`GuestFrame`](crate::GuestFrame)s by their pointers, until it is
/// dropped. The platform waits for a turn wherever it touches such a page, so a thread that has one
/// calls nothing of the platform but [`Platform::guest_frame`](crate::Platform::guest_frame).
pub struct GuestTurn {
    ticket: Ticket,
    pub(crate) asid: u32,
    pub(crate) key: Arc<MemoryKey>,
    pub(crate) owner: Owner,
}

impl GuestTurn {
    /// Waits for a turn of the guest with that key.
    pub(crate) fn take(
        asid: u32,
        key: Arc<MemoryKey>,
        owner: Owner,
        turns: &Arc<Turns>,
    ) -> GuestTurn {
        GuestTurn {
            ticket: turns.take(),
            asid,
            key,
            owner,
        }
    }

    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.ticket.0
    }

    /// A number that grows when a page of the guest is closed: all its frames are asked for again then.
    pub fn closed(&self) -> u64 {
        self.turns().closed.load(Ordering::Acquire)
    }
}

impl fmt::Debug for GuestTurn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestTurn")
            .field("asid", &self.asid)
            .finish_non_exhaustive()
    }
}
