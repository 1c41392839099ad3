//! What a TD knows of its migration.

use core::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use kvm_ops::{Error, Result};
use kvm_ops_mmu::Mutex;

use super::frames::Frames;

/// A TD's migrations, past and present.
#[derive(Debug, Default)]
pub(crate) struct Journey {
    /// A session is under way, out or in.
    claimed: AtomicBool,
    /// The TD is stopped for the rest of its export: vCPUs answer `Busy`.
    stopped: AtomicBool,
    /// Pages may be blocked for writing: faults look into the book.
    follows: AtomicBool,
    /// The guest runs here and its pages still come: faults wait for them.
    awaits_pages: AtomicBool,
    /// The TD was created for a guest that comes: it has no launch of its own.
    awaits: AtomicBool,
    /// The number of streams that the module has contexts for, the backward stream among them.
    pub(crate) streams: AtomicU16,
    /// Taken after `Td::private`, and held across SEAMCALLs that change what it says.
    pub(crate) book: Mutex<Book>,
}

/// The state of pages under export.
#[derive(Debug, Default)]
pub(crate) struct Book {
    /// To be sent in this round.
    pub(crate) round: Frames,
    /// To be sent in the next round, because the module takes a page once in an epoch: written since,
    /// or new.
    pub(crate) pending: Frames,
    /// Put off until the guest runs at its target: they never travelled.
    pub(crate) later: Frames,
    /// Blocked for writing.
    pub(crate) blocked: Frames,
    /// Sent at least once.
    pub(crate) exported: Frames,
    /// At the target: the guest waits for them.
    pub(crate) wanted: Frames,
    /// At the target: the source has no page for them.
    pub(crate) absent: Frames,
}

impl Book {
    /// Begins a round with everything that is to be sent.
    pub(crate) fn begin_round(&mut self) {
        self.round.append(core::mem::take(&mut self.pending));
    }

    /// Puts off all of these frames, and of those that are to be sent, that never travelled.
    pub(crate) fn put_off(&mut self, window: &mut Frames) {
        for frames in [window, &mut self.round, &mut self.pending] {
            self.later.append(frames.take_all_but(&self.exported));
        }
    }

    /// Takes up what was put off.
    pub(crate) fn take_up(&mut self) {
        self.round.append(core::mem::take(&mut self.later));
    }

    /// The number of pages that are to be sent and not put off.
    pub(crate) fn due(&self) -> u64 {
        self.round.len() + self.pending.len()
    }
}

/// A session; the TD takes no other until it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Session<'a>(&'a AtomicBool);

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Journey {
    /// Begins a session.
    pub(crate) fn claim(&self) -> Result<Session<'_>> {
        match self.claimed.swap(true, Ordering::AcqRel) {
            true => Err(Error::Busy),
            false => Ok(Session(&self.claimed)),
        }
    }

    /// Returns whether private memory may be converted, and slots changed: not while pages travel, nor
    /// while some are left in the states of an export.
    pub(crate) fn is_settled(&self) -> bool {
        !self.claimed.load(Ordering::Acquire) && !self.follows()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub(crate) fn set_stopped(&self, stopped: bool) {
        self.stopped.store(stopped, Ordering::Release);
    }

    pub(crate) fn follows(&self) -> bool {
        self.follows.load(Ordering::Acquire)
    }

    pub(crate) fn set_follows(&self, follows: bool) {
        self.follows.store(follows, Ordering::Release);
    }

    pub(crate) fn awaits_pages(&self) -> bool {
        self.awaits_pages.load(Ordering::Acquire)
    }

    pub(crate) fn set_awaits_pages(&self, awaits: bool) {
        self.awaits_pages.store(awaits, Ordering::Release);
    }

    pub(crate) fn set_awaits(&self) {
        self.awaits.store(true, Ordering::Release);
    }

    pub(crate) fn awaits(&self) -> bool {
        self.awaits.load(Ordering::Acquire)
    }
}
