//! Turns at the pages that the processors of a guest have open.

use super::Owner;
use crate::cipher::MemoryKey;
use crate::sync::{Guard, Lock, Signal};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The turns at the open pages of one ASID's guest, in the order in which they were asked for: one has a turn alone, or
/// several processors have turns together.
pub(crate) struct Turns {
    queue: Lock<Queue>,
    moved: Signal,
    closed: AtomicU64,
}

/// Tickets: the next to hand out, and the one whose turn it is.
struct Queue {
    next: u64,
    serving: u64,
    /// Turns that are had together.
    inside: u32,
}

/// A turn without the guest's key.
pub(crate) struct Ticket {
    turns: Arc<Turns>,
    is_shared: bool,
}

impl Queue {
    /// Someone waits: a notification is a system call, whether a thread waits or not.
    fn is_awaited(&self) -> bool {
        self.next != self.serving
    }
}

impl Turns {
    pub(crate) fn new() -> Self {
        Self {
            queue: Lock::new(Queue {
                next: 0,
                serving: 0,
                inside: 0,
            }),
            moved: Signal::new(),
            closed: AtomicU64::new(0),
        }
    }

    /// Takes a ticket, and waits until it is served and `ready`.
    fn queue(&self, ready: impl Fn(&Queue) -> bool) -> Guard<'_, Queue> {
        let mut queue = self.queue.lock();
        let ticket = queue.next;
        queue.next += 1;
        while queue.serving != ticket || !ready(&queue) {
            queue = self.moved.wait(queue);
        }
        queue
    }

    fn ticket(self: &Arc<Self>, is_shared: bool) -> Ticket {
        Ticket {
            turns: Arc::clone(self),
            is_shared,
        }
    }

    /// Waits for a turn that nobody else has.
    pub(crate) fn take(self: &Arc<Self>) -> Ticket {
        drop(self.queue(|queue| queue.inside == 0));
        self.ticket(false)
    }

    /// Waits for a turn that others may share.
    pub(crate) fn share(self: &Arc<Self>) -> Ticket {
        let mut queue = self.queue(|_| true);
        queue.inside += 1;
        // The next one may share it, too.
        queue.serving += 1;
        let awaited = queue.is_awaited();
        drop(queue);
        if awaited {
            self.moved.notify_all();
        }
        self.ticket(true)
    }

    /// Takes a turn alone if no thread has or awaits one.
    pub(crate) fn try_take(self: &Arc<Self>) -> Option<Ticket> {
        let mut queue = self.queue.lock();
        let is_free = !queue.is_awaited() && queue.inside == 0;
        queue.next += u64::from(is_free);
        is_free.then(|| self.ticket(false))
    }

    /// A page was closed: whoever has a pointer to it asks again.
    pub(crate) fn note_closed(&self) {
        self.closed.fetch_add(1, Ordering::AcqRel);
    }
}

impl Ticket {
    /// True for a turn alone at these pages.
    pub(crate) fn is_at(&self, turns: &Arc<Turns>) -> bool {
        Arc::ptr_eq(&self.turns, turns) && !self.is_shared
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let awaited = {
            let mut queue = self.turns.queue.lock();
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

/// The right to use the bytes of a guest's [`GuestFrame`](crate::GuestFrame)s by their pointers, until it is
/// dropped. The platform waits for a turn alone wherever it touches such a page, so a thread that has one
/// calls nothing of the platform but [`Platform::guest_frame`](crate::Platform::guest_frame).
pub struct GuestTurn {
    ticket: Ticket,
    pub(crate) asid: u32,
    pub(crate) key: Arc<MemoryKey>,
    pub(crate) owner: Owner,
}

impl GuestTurn {
    /// A turn of the guest with that key.
    pub(crate) fn new(ticket: Ticket, asid: u32, key: Arc<MemoryKey>, owner: Owner) -> GuestTurn {
        GuestTurn {
            ticket,
            asid,
            key,
            owner,
        }
    }

    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.ticket.turns
    }

    /// A number that grows when a page of the guest is closed: all its frames are asked for again then. It does not
    /// change while the turn lasts.
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
