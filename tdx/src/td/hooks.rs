//! The mirror's hooks: changes of Secure-EPT entries by transition, and TLB flushes.

use kvm_ops::{
    Error, Field, Gfn, Host, Hpa, Level, Page, Pfn, PrivateSpte, Result, SeamPort, SpteChange, Step,
};
use kvm_ops_mmu::{MirrorHooks, Removal};

use super::{LEAKED, Td, at};
use crate::Leaf;
use crate::seamcall::{EntryAt, Outcome};

impl<H: Host> Td<H> {
    /// The end of the TD's frames: where the shared bit begins.
    pub(crate) fn frames(&self) -> u64 {
        self.mask.bits() / kvm_ops::PAGE_SIZE
    }

    /// The operands of a change, once it is one that the TD can have.
    pub(crate) fn entry(&self, change: &SpteChange) -> Result<(EntryAt, Hpa)> {
        self.require_live()?;
        let (gfn, level) = (change.gfn(), change.level());
        if !gfn.is_aligned(level) || !self.has_frames(gfn, level.frames()) {
            return Err(Error::Invalid(Field::Gfn, gfn.get()));
        }
        for spte in [change.old(), change.new_value()] {
            let pfn = match spte {
                PrivateSpte::Absent => continue,
                PrivateSpte::Table(pfn)
                | PrivateSpte::BlockedTable(pfn)
                | PrivateSpte::Mapped(pfn)
                | PrivateSpte::Blocked(pfn) => pfn,
            };
            if pfn.base().is_none() {
                return Err(Error::Invalid(Field::HostAddress, pfn.get()));
            }
        }
        let entry = EntryAt::new(gfn, level).ok_or(Error::Invalid(Field::Gfn, gfn.get()))?;
        Ok((entry, self.tdr()?))
    }

    /// Returns whether these frames lie below the shared bit.
    pub(crate) fn has_frames(&self, first: Gfn, pages: u64) -> bool {
        first
            .checked_add(pages)
            .is_some_and(|end| end.get() <= self.frames())
    }

    /// Writes the lines back that the caches have of a page under the TD's key.
    fn clean(&self, page: Pfn) -> Outcome {
        let calls = self.calls_for(Leaf::PhymemPageWbinvd)?;
        let key = self.lock(&self.control).hkid();
        calls.phymem_page_wbinvd(calls.port().with_key_id(at(page), key))
    }

    /// A change that gives a page back: the call that takes it from the TD, then the write-back.
    fn remove(&self, page: Pfn, level: Level, call: impl Fn() -> Outcome) -> Removal {
        if let Err(failed) = self.without_vcpus(call) {
            return Removal::Failed(self.failed(&failed));
        }
        let frames = (0..level.frames()).filter_map(|n| page.checked_add(n));
        for frame in frames {
            if let Err(failed) = self.clean(frame) {
                let diagnosis = failed.report(&self.life, Some(LEAKED));
                if failed.poisons() {
                    self.poison_by(diagnosis);
                }
                return Removal::Dirty(failed.leak_error());
            }
        }
        Removal::Done
    }

    /// The contents of the initial page that is being added. No lock is taken once the TD runs.
    fn initial_source(&self) -> Option<Hpa> {
        match self.life.step() {
            Step::Initialized => self.lock(&self.control).source,
            _ => None,
        }
    }

    /// Refuses a change that is no transition of the Secure-EPT.
    fn no_such_change<T>(change: &SpteChange) -> Result<T> {
        Err(Error::Invalid(Field::Gfn, change.gfn().get()))
    }
}

// SAFETY: a change is done when its SEAMCALL succeeded, and the module changes nothing when it fails.
// A page is handed back after TDH.MEM.PAGE.REMOVE or TDH.MEM.SEPT.REMOVE, which the module does only
// to entries that are blocked and tracked, and after the write-back of its cache lines. The flush is
// TDH.MEM.TRACK and an exit of every vCPU that was inside.
#[allow(unsafe_code)]
unsafe impl<H: Host> MirrorHooks for Td<H> {
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        use PrivateSpte as P;
        let (entry, tdr) = self.entry(change)?;
        let calls = self.calls()?;
        let done = match (change.old(), change.new_value()) {
            (P::Absent, P::Table(table)) => calls.mem_sept_add(entry, tdr, at(table)),
            (P::Absent, P::Mapped(page)) => match self.initial_source() {
                Some(source) => calls.mem_page_add(entry, tdr, at(page), source),
                None => calls.mem_page_aug(entry, tdr, at(page)),
            },
            (P::Mapped(old), P::Blocked(new)) | (P::Table(old), P::BlockedTable(new))
                if old == new =>
            {
                self.without_vcpus(|| calls.mem_range_block(entry, tdr))
            }
            (P::Blocked(old), P::Mapped(new)) | (P::BlockedTable(old), P::Table(new))
                if old == new =>
            {
                self.without_vcpus(|| calls.mem_range_unblock(entry, tdr))
            }
            (P::Blocked(_), P::Table(table)) => {
                self.without_vcpus(|| calls.mem_page_demote(entry, tdr, at(table)))
            }
            _ => return Self::no_such_change(change),
        };
        done.map_err(|failed| self.failed(&failed))
    }

    fn remove_private_spte(&self, change: &SpteChange) -> Removal {
        use PrivateSpte as P;
        let (entry, tdr) = match self.entry(change) {
            Ok(operands) => operands,
            Err(error) => return Removal::Failed(error),
        };
        let calls = match self.calls() {
            Ok(calls) => calls,
            Err(error) => return Removal::Failed(error),
        };
        match (change.old(), change.new_value()) {
            (P::Blocked(page), P::Absent) => {
                self.remove(page, change.level(), || calls.mem_page_remove(entry, tdr))
            }
            (P::BlockedTable(table), P::Absent) => {
                self.remove(table, Level::Size4K, || calls.mem_sept_remove(entry, tdr))
            }
            (P::BlockedTable(table), P::Mapped(_)) => {
                self.remove(table, Level::Size4K, || calls.mem_page_promote(entry, tdr))
            }
            _ => match Self::no_such_change::<()>(change) {
                Ok(()) => Removal::Done,
                Err(error) => Removal::Failed(error),
            },
        }
    }

    /// TDH.MEM.TRACK, then a kick of every vCPU that is inside and the wait for them. Before the TD
    /// runs there is no TLB to flush, and the module demands none.
    fn flush_private_tlb(&self) -> Result<()> {
        if self.require_live()? != Step::Runnable {
            return Ok(());
        }
        let (calls, tdr) = (self.calls()?, self.tdr()?);
        self.without_vcpus(|| calls.mem_track(tdr))
            .map_err(|failed| self.failed(&failed))?;
        self.empty_epoch();
        Ok(())
    }

    fn alloc_table(&self) -> Result<Page> {
        self.take_page(Level::Size4K)
    }

    fn free_page(&self, page: Page) {
        self.give_page_back(page);
    }

    /// Only a page that is out of the TD and could not be written back comes here.
    fn leak(&self, page: Page, error: Error) {
        self.account
            .leak(page, Leaf::PhymemPageWbinvd.name(), error);
    }
}

impl<H: Host> Td<H> {
    /// A change from outside of the mirror, for embedders that keep separate tables.
    pub(crate) fn change_entry(&self, change: &SpteChange) -> Result<()> {
        use PrivateSpte as P;
        self.require_settled()?;
        let removes = matches!(
            (change.old(), change.new_value()),
            (P::Blocked(_), P::Absent) | (P::BlockedTable(_), P::Absent | P::Mapped(_))
        );
        if !removes {
            return self.set_private_spte(change);
        }
        match self.remove_private_spte(change) {
            Removal::Done => Ok(()),
            Removal::Dirty(error) | Removal::Failed(error) => Err(error),
        }
    }
}
