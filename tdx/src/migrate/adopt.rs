//! Pages that came: from the module's tables into the mirror.
#![allow(unsafe_code)]

use alloc::vec::Vec;

use kvm_ops::{Error, Field, Gfn, Host, Level, Page, PrivateSpte, Result, SpteChange};
use kvm_ops_mmu::{Mapped, MirrorHooks, Removal};

use super::bundle::Bundle;
use super::entry::{Entry, NO_PAGE, Operation};
use super::lane::Lane;
use crate::Leaf;
use crate::seamcall::Failed;
use crate::td::{PATIENCE, Private, Td};

/// Changes of the Secure-EPT that TDH.IMPORT.MEM has made already: pages come in, nothing else does.
struct Adopted<'a, H: Host>(&'a Td<H>);

// SAFETY: it is given to `Mirror::map` only for entries that TDH.IMPORT.MEM has just filled with the page
// in question, so the change is made. The module fills an entry for one call only, and until the guest is
// this TD's no other thread maps or removes pages: neither vCPUs nor conversions run. While the rest of its
// pages come, its faults wait for them. Everything else is the TD's hooks.
unsafe impl<H: Host> MirrorHooks for Adopted<'_, H> {
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        match (change.old(), change.new_value()) {
            (PrivateSpte::Absent, PrivateSpte::Mapped(_)) => Ok(()),
            _ => self.0.set_private_spte(change),
        }
    }

    fn remove_private_spte(&self, change: &SpteChange) -> Removal {
        self.0.remove_private_spte(change)
    }

    fn flush_private_tlb(&self) -> Result<()> {
        self.0.flush_private_tlb()
    }

    fn alloc_table(&self) -> Result<Page> {
        self.0.alloc_table()
    }

    fn free_page(&self, page: Page) {
        // The module has it: it must not be used again.
        self.leak(page, Error::Poisoned);
    }

    fn leak(&self, page: Page, error: Error) {
        self.0.account.leak(page, Leaf::ImportMem.name(), error);
    }
}

/// Says that no page is given, where only the tables above it are wanted.
const TABLES_ONLY: Error = Error::NotFound(Field::Bundle, 0);

impl<H: Host> Td<H> {
    /// Takes the pages of a memory bundle: tables for them, TDH.IMPORT.MEM, then the mirror. After an
    /// error the pages that the module took are in the mirror, the others are the host's.
    pub(super) fn import_pages(
        &self,
        lane: &Lane<'_, H>,
        bundle: &Bundle,
    ) -> Result<u64, ImportError> {
        self.make_room(bundle)?;
        let mut pages = Vec::with_capacity(bundle.entries.len());
        for entry in &bundle.entries {
            let wanted = entry.succeeded() && entry.operation() == Operation::Migrate;
            let page = match wanted {
                true => self.take_page(Level::Size4K).map(Some),
                false => Ok(None),
            };
            match page {
                Ok(page) => pages.push(page),
                Err(error) => {
                    self.give_back_all(pages);
                    return Err(error.into());
                }
            }
        }
        let addresses = pages
            .iter()
            .map(|page| page.as_ref().map_or(NO_PAGE, |p| p.hpa().get()));
        let addresses: Vec<u64> = addresses.collect();
        let prepared = lane
            .put_memory(bundle, &addresses)
            .and_then(|at| Ok((at, self.tdr()?, self.calls()?)));
        let (at, tdr, calls) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.give_back_all(pages);
                return Err(error.into());
            }
        };
        let (reached, done) = calls.import_mem(tdr, at, lane.new_pages());
        let outcomes = lane.outcomes(bundle.entries.len());
        let taken = self.adopt(bundle, &outcomes, pages, reached);
        match done {
            Ok(()) => Ok(taken),
            Err(failed) => Err(ImportError::Call(failed)),
        }
    }

    /// The tables above the pages that come. They are added with the memory locked for writing, because
    /// TDH.MEM.SEPT.ADD excludes the calls of other streams.
    fn make_room(&self, bundle: &Bundle) -> Result<()> {
        let mut without_tables = Vec::new();
        {
            let private = self.read_private();
            for entry in &bundle.entries {
                if !self.has_tables(&private, *entry)? {
                    without_tables.push(entry.gfn());
                }
            }
        }
        if without_tables.is_empty() {
            return Ok(());
        }
        let private = self.write_private();
        let mut each = without_tables.into_iter();
        each.try_for_each(|gfn| self.add_tables(&private, gfn))
    }

    /// Returns whether the tables above the page of an entry are there. An entry that takes a page that
    /// must be there, or must not be, is refused if it is otherwise.
    fn has_tables(&self, private: &Private, entry: Entry) -> Result<bool> {
        let gfn = entry.gfn();
        let foreign = Err(Error::Invalid(Field::Gfn, gfn.get()));
        if !entry.succeeded() {
            return Ok(true);
        }
        if gfn.get() >= self.frames() || !private.may_be_private(gfn) {
            return foreign;
        }
        let found = private.mirror.lookup(gfn);
        match (entry.operation(), found.entry) {
            (Operation::Migrate, PrivateSpte::Absent) => Ok(found.level == Level::Size4K),
            (Operation::Remigrate, PrivateSpte::Mapped(_)) if found.level == Level::Size4K => {
                Ok(true)
            }
            // A guest that waited for it had it sent before its turn.
            (Operation::Migrate, PrivateSpte::Mapped(_)) if self.journey.awaits_pages() => Ok(true),
            // Sources here take no page back; a page that comes twice is the module's to refuse.
            (Operation::Nop, _) => Ok(true),
            _ => foreign,
        }
    }

    /// Adds the tables above a frame that is not mapped. Unlike a fault it has no guest that would try
    /// again, so it waits for locks.
    fn add_tables(&self, private: &Private, gfn: Gfn) -> Result<()> {
        for tries in 0..PATIENCE {
            let no_page = || Err(TABLES_ONLY);
            match private.mirror.map(self, gfn, Level::Size4K, no_page) {
                Err(TABLES_ONLY) => return Ok(()),
                Err(Error::Busy | Error::Again) | Ok(Mapped::Retry) => {}
                Err(error) => return Err(error),
                Ok(_) => return Err(Error::Invalid(Field::Gfn, gfn.get())),
            }
            (0..1u32 << tries).for_each(|_| self.relax());
        }
        Err(Error::Busy)
    }

    /// Puts the pages of the first `reached` entries into the mirror, but those of entries that failed alone,
    /// as entries of a post-copy may, and gives the others back. Returns the number of entries that were
    /// imported.
    fn adopt(
        &self,
        bundle: &Bundle,
        outcomes: &[Entry],
        pages: Vec<Option<Page>>,
        reached: u16,
    ) -> u64 {
        let private = self.read_private();
        let mut taken = 0;
        for (n, (entry, page)) in bundle.entries.iter().zip(pages).enumerate() {
            let sent = n < usize::from(reached) && entry.succeeded();
            let failed_alone = outcomes.get(n).is_some_and(|entry| !entry.succeeded());
            let imported = sent && !failed_alone;
            if sent && failed_alone && self.journey.awaits_pages() {
                // To be asked for again, unless it had come before.
                self.lock(&self.journey.book).wanted.insert(entry.gfn());
            }
            taken += u64::from(imported && entry.operation() != Operation::Nop);
            let Some(page) = page else { continue };
            if !imported {
                self.give_page_back(page);
                continue;
            }
            let (gfn, mut page) = (entry.gfn(), Some(page));
            let give = || page.take().ok_or(TABLES_ONLY);
            // The tables are there and no other thread is at the entry. If it fails all the same, the page
            // is leaked: the module has it.
            let _ = private.mirror.map(&Adopted(self), gfn, Level::Size4K, give);
            if let Some(page) = page {
                self.account
                    .leak(page, Leaf::ImportMem.name(), Error::Poisoned);
            }
        }
        taken
    }

    fn give_back_all(&self, pages: Vec<Option<Page>>) {
        pages
            .into_iter()
            .flatten()
            .for_each(|page| self.give_page_back(page));
    }
}

/// The reason why a bundle did not come in.
pub(super) enum ImportError {
    Call(Failed),
    Host(Error),
}

impl From<Error> for ImportError {
    fn from(error: Error) -> Self {
        Self::Host(error)
    }
}
