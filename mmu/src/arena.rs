//! Nodes, handed out under `&self` to one thread at a time.

use core::cell::UnsafeCell;

use crate::Level;
use crate::Result;
#[cfg(not(loom))]
use crate::chunks::Nodes;
#[cfg(loom)]
use crate::model_nodes::Nodes;
use crate::node::Owned;
use crate::sync::{AtomicBool, Ordering, pause};

/// The mirror's nodes. Those that are out are the mirror's until it gives them back or drops the arena.
pub(crate) struct Arena {
    busy: AtomicBool,
    nodes: UnsafeCell<Nodes>,
}

// SAFETY: the arena owns its nodes; nothing in them is bound to a thread.
unsafe impl Send for Arena {}
// SAFETY: `nodes` is reached only by the thread that turned `busy` from false to true, or through
// `&mut self`.
unsafe impl Sync for Arena {}

/// The right to `nodes`.
struct Hold<'a>(&'a Arena);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
    }
}

impl Hold<'_> {
    fn nodes(&mut self) -> &mut Nodes {
        // SAFETY: `busy` is ours until this is dropped, and the borrow of `self` keeps the
        // reference alone.
        unsafe { &mut *self.0.nodes.get() }
    }
}

impl Arena {
    pub(crate) fn new() -> Self {
        Self {
            busy: AtomicBool::new(false),
            nodes: UnsafeCell::new(Nodes::new()),
        }
    }

    fn try_hold(&self) -> Option<Hold<'_>> {
        self.busy
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| Hold(self))
    }

    /// Waits for a thread that is taking a node, which is only a moment.
    fn hold(&self) -> Hold<'_> {
        loop {
            match self.try_hold() {
                Some(hold) => return hold,
                None => pause(),
            }
        }
    }

    /// An empty node to go below an entry of `level`.
    pub(crate) fn take(&self, level: Level) -> Result<Owned> {
        self.hold().nodes().take(level)
    }

    /// An empty node to go below an entry of `level`, or `None` if another thread is taking one.
    pub(crate) fn try_take(&self, level: Level) -> Result<Option<Owned>> {
        match self.try_hold() {
            Some(mut hold) => hold.nodes().take(level).map(Some),
            None => Ok(None),
        }
    }

    /// Gives back an empty node that no entry points to, and that no other thread can have a
    /// reference to: it was never linked, or the caller has the mirror to itself.
    pub(crate) fn give_back(&self, node: Owned) {
        self.hold().nodes().free(node);
    }

    /// Bytes that were asked of the allocator.
    pub(crate) fn reserved(&self) -> usize {
        self.hold().nodes().reserved()
    }
}
