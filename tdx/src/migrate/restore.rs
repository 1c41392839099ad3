//! After an export that was aborted: pages back from its states (TDH.EXPORT.RESTORE and
//! TDH.EXPORT.UNBLOCKW), which the module demands before the next export.

use alloc::vec::Vec;

use kvm_ops::{Error, Gfn, Host, Result};

use super::journey::Book;
use super::lane::Scratch;
use crate::td::Td;

/// Entries of a list.
const MOST: usize = 512;

/// Tries of a page whose entry another thread holds.
const TRIES: u32 = 16;

impl<H: Host> Td<H> {
    /// Brings every page back that an export left in one of its states. vCPUs may run meanwhile.
    pub(super) fn settle(&self) -> Result<()> {
        if !self.journey.follows() {
            return Ok(());
        }
        let scratch = Scratch::new(self)?;
        for _ in 0..TRIES {
            if self.lock(&self.journey.book).exported.is_empty() {
                return self.unblock_all();
            }
            self.restore_all(&scratch)?;
        }
        Err(Error::Busy)
    }

    fn restore_all(&self, scratch: &Scratch<'_, H>) -> Result<()> {
        let mut busy = Vec::new();
        loop {
            // Held across the call, so that no fault finds the book ahead of the module or behind it.
            let mut book = self.lock(&self.journey.book);
            let frames = book.exported.take_first(MOST);
            if frames.is_empty() {
                busy.into_iter().for_each(|gfn| book.exported.insert(gfn));
                return Ok(());
            }
            if let Err(error) = self.restore(scratch, &frames, &mut book, &mut busy) {
                let left = frames.into_iter().chain(busy);
                left.for_each(|gfn| book.exported.insert(gfn));
                return Err(error);
            }
        }
    }

    fn restore(
        &self,
        scratch: &Scratch<'_, H>,
        frames: &[Gfn],
        book: &mut Book,
        busy: &mut Vec<Gfn>,
    ) -> Result<()> {
        let (calls, tdr) = (self.calls()?, self.tdr()?);
        let list = scratch.list(frames)?;
        calls
            .export_restore(tdr, list)
            .map_err(|failed| self.failed(&failed))?;
        for (gfn, entry) in frames.iter().zip(scratch.entries(frames.len())?) {
            if entry.is_busy() {
                busy.push(*gfn);
            } else if entry.succeeded() {
                book.blocked.remove(*gfn);
            }
            // Any other is not exported: it may be blocked for writing all the same.
        }
        Ok(())
    }

    /// What is left is blocked for writing, or was before a call that failed half-way.
    fn unblock_all(&self) -> Result<()> {
        loop {
            let mut book = self.lock(&self.journey.book);
            let Some(gfn) = book.blocked.first() else {
                *book = Book::default();
                self.journey.set_follows(false);
                return Ok(());
            };
            self.unblock_writes(gfn)?;
            book.blocked.remove(gfn);
        }
    }
}
