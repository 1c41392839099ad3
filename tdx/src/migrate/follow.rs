//! The guest's writes while its pages travel.

use kvm_ops::{Error, Field, Gfn, Host, Level, PrivateSpte, Result, Step};

use crate::seamcall::EntryAt;
use crate::td::{Private, Td};

impl<H: Host> Td<H> {
    /// A page was mapped: an export that is under way must send it too.
    pub(crate) fn page_came(&self, gfn: Gfn) {
        if self.journey.follows() {
            self.lock(&self.journey.book).pending.insert(gfn);
        }
    }

    /// The guest faulted at a page that is mapped. If the page is blocked for writing, it may be
    /// written from now on, and is to be sent again.
    pub(crate) fn allow_writes(&self, gfn: Gfn) -> Result<()> {
        if !self.journey.follows() {
            return Ok(());
        }
        let mut book = self.lock(&self.journey.book);
        if !book.blocked.contains(gfn) {
            return Ok(());
        }
        self.unblock_writes(gfn)?;
        book.blocked.remove(gfn);
        book.pending.insert(gfn);
        Ok(())
    }

    /// The guest touched a page while its pages still come from another host. Returns whether it must wait
    /// for that one.
    pub(crate) fn waits_for_page(&self, private: &Private, gfn: Gfn) -> bool {
        if !self.journey.awaits_pages() || private.mirror.lookup(gfn).entry != PrivateSpte::Absent {
            return false;
        }
        let mut book = self.lock(&self.journey.book);
        let waits = !book.absent.contains(gfn);
        if waits {
            book.wanted.insert(gfn);
        }
        waits
    }

    /// TDH.EXPORT.UNBLOCKW of a page that is blocked for writing.
    pub(super) fn unblock_writes(&self, gfn: Gfn) -> Result<()> {
        let at = EntryAt::new(gfn, Level::Size4K).ok_or(Error::Invalid(Field::Gfn, gfn.get()))?;
        let (calls, tdr) = (self.calls()?, self.tdr()?);
        self.without_vcpus(|| calls.export_unblockw(at, tdr))
            .map_err(|failed| self.failed(&failed))
    }

    /// `Ok` where private memory may change its kind: not while pages travel.
    pub(crate) fn require_settled(&self) -> Result<()> {
        match self.journey.is_settled() {
            true => Ok(()),
            false => Err(Error::Busy),
        }
    }

    /// `Ok` for a TD that is launched here; one that waits for a guest has no launch.
    pub(crate) fn require_launch(&self) -> Result<()> {
        match self.journey.awaits() {
            false => Ok(()),
            true => Err(Error::WrongState(Step::Initialized)),
        }
    }
}
