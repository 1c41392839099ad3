//! One change of a private frame: in the RMP, in the nested page tables, and in the list of frames.

use kvm_ops::{
    Error, Field, Gfn, Host, Level, Page, PagePort, Pfn, PrivateSpte, Result, SpteChange,
};

use super::{Frame, Memory};
use crate::shared::Shared;
use crate::sp::Held;

/// The kind of RMP entry of a new page: for the guest to accept, or for SNP_LAUNCH_UPDATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Assign {
    Guest,
    Launch,
}

impl<H: Host> Shared<H> {
    /// Carries out a change that an embedder asks for, with pages that are the embedder's before and
    /// after.
    ///
    /// | old | new | is |
    /// |---|---|---|
    /// | absent | mapped | RMPUPDATE to the guest, then the mapping |
    /// | mapped | absent | no mapping, (SNP_PAGE_RECLAIM,) RMPUPDATE to the host |
    /// | mapped, 2 MiB | table | no mapping, PSMASH, 512 mappings |
    #[allow(unsafe_code)]
    pub(crate) fn change(&self, memory: &mut Memory, change: &SpteChange) -> Result<()> {
        let (gfn, level) = (change.gfn(), change.level());
        if !gfn.is_aligned(level) || !matches!(level, Level::Size4K | Level::Size2M) {
            return Err(Error::Invalid(Field::Level, level as u64));
        }
        match (change.old(), change.new_value()) {
            (PrivateSpte::Absent, PrivateSpte::Mapped(pfn)) => {
                let port = self.sp().pages.id();
                if !pfn.is_aligned(level) {
                    return Err(Error::Invalid(Field::HostAddress, pfn.get()));
                }
                // SAFETY: the maker of the change vouched that it owns the page, and hands it over.
                let page = unsafe { Page::from_raw(pfn, level, port) };
                self.account.adopt(&page);
                self.map(memory, gfn, page).map_err(|(error, page)| {
                    self.hand_out(page);
                    error
                })
            }
            (PrivateSpte::Mapped(pfn), PrivateSpte::Absent) => {
                self.expect(memory, gfn, level, pfn)?;
                let page = self.unmap(memory, gfn)?;
                self.hand_out(Some(page));
                Ok(())
            }
            (PrivateSpte::Mapped(pfn), PrivateSpte::Table(_)) if level == Level::Size2M => {
                self.expect(memory, gfn, level, pfn)?;
                self.split(memory, gfn)
            }
            _ => Err(Error::Invalid(Field::Level, level as u64)),
        }
    }

    /// A page is its embedder's again, who knows its number.
    fn hand_out(&self, page: Option<Page>) {
        if let Some(page) = page {
            self.account.hand_out(&page);
            page.into_raw();
        }
    }

    fn expect(&self, memory: &Memory, gfn: Gfn, level: Level, pfn: Pfn) -> Result<()> {
        match memory.frame(gfn) {
            Some((first, frame))
                if (first, frame.page.level(), frame.page.pfn()) == (gfn, level, pfn) =>
            {
                Ok(())
            }
            _ => Err(Error::NotFound(Field::Gfn, gfn.get())),
        }
    }

    /// Absent -> Mapped.
    ///
    /// # Errors
    /// The page comes back, unless it became a frame that the teardown tries to take back.
    pub(crate) fn map(
        &self,
        memory: &mut Memory,
        gfn: Gfn,
        page: Page,
    ) -> Result<(), (Error, Option<Page>)> {
        let held = match self.assign(memory, gfn, &page, Assign::Guest) {
            Ok(held) => held,
            Err(error) => return Err((error, Some(page))),
        };
        let (pfn, level) = (page.pfn(), page.level());
        let sev = self
            .sev()
            .and_then(|sev| sev.map_encrypted(gfn, level, Some(&page)));
        match sev {
            Err(error) if self.sp().take_back(pfn, level, held).is_ok() => Err((error, Some(page))),
            mapped => {
                memory.insert(gfn, Frame { page, held });
                mapped.map_err(|error| (error, None))
            }
        }
    }

    /// Maps a page that SNP_LAUNCH_UPDATE gave to the guest. It is a frame even if the port cannot
    /// map it: it was measured, and no command takes that back.
    pub(crate) fn enter(
        &self,
        memory: &mut Memory,
        gfn: Gfn,
        page: Page,
        held: Held,
    ) -> Result<()> {
        let mapped = self
            .sev()
            .and_then(|sev| sev.map_encrypted(gfn, page.level(), Some(&page)));
        memory.insert(gfn, Frame { page, held });
        mapped
    }

    /// The RMP's half of mapping. Returns how the page is held.
    pub(crate) fn assign(
        &self,
        memory: &Memory,
        gfn: Gfn,
        page: &Page,
        assign: Assign,
    ) -> Result<Held> {
        let level = page.level();
        let last = gfn.checked_add(level.frames() - 1);
        self.check_frame(last.ok_or(Error::Invalid(Field::Gfn, gfn.get()))?)?;
        let mapped = memory.touching(gfn, level.frames());
        let out = memory.swap.touching(gfn, level.frames());
        let there = mapped.first().map(|(other, _)| other);
        if let Some(other) = there.or(out.first().map(|(_, other, _)| other)) {
            return Err(Error::Exists(Field::Gfn, other.get()));
        }
        if !self.is_snp() {
            return Ok(Held::Host);
        }
        let asid = self.asid()?;
        let immutable = assign == Assign::Launch;
        self.sp().assign(page, asid.0, gfn, immutable)?;
        Ok(match assign {
            Assign::Guest => Held::Assigned,
            Assign::Launch => Held::Immutable,
        })
    }

    /// Mapped -> Absent. A page that cannot be taken back is leaked and the VM poisoned, because
    /// its RMP entry is unknown from then on (Linux marks the VM bugged).
    pub(super) fn unmap(&self, memory: &mut Memory, gfn: Gfn) -> Result<Page> {
        let not_there = Error::NotFound(Field::Gfn, gfn.get());
        let (first, _) = memory.frame(gfn).ok_or(not_there)?;
        self.unmap_everywhere(memory, first)?;
        let Frame { page, held } = memory.remove(first).ok_or(not_there)?;
        let sp = self.sp();
        match sp.take_back(page.pfn(), page.level(), held) {
            Ok(()) => Ok(page),
            Err(error) => {
                sp.leak(page, error);
                self.poison(&error);
                Err(error)
            }
        }
    }

    /// Takes a frame's page out of the VM's tables and those of its mirrors. No vCPU uses it afterwards.
    pub(crate) fn unmap_everywhere(&self, memory: &mut Memory, first: Gfn) -> Result<()> {
        let Some((first, frame)) = memory.frame(first) else {
            return Ok(());
        };
        let views = memory.views.of_page(&frame.page);
        self.sev()?.map_encrypted(first, frame.page.level(), None)?;
        self.unmap_in_mirrors(memory, &views)
    }

    /// Mapped 2 MiB -> 512 of 4 KiB.
    pub(crate) fn split(&self, memory: &mut Memory, gfn: Gfn) -> Result<()> {
        let not_there = Error::NotFound(Field::Gfn, gfn.get());
        let (first, frame) = memory.frame(gfn).ok_or(not_there)?;
        if frame.page.level() != Level::Size2M {
            return Ok(());
        }
        // A mapping larger than its RMP entry faults: out before the entry changes, in after.
        self.unmap_everywhere(memory, first)?;
        let sev = self.sev()?;
        let (_, frame) = memory.frame(first).ok_or(not_there)?;
        if self.is_snp()
            && let Err(error) = self.sp().psmash(frame.page.pfn())
        {
            sev.map_encrypted(first, Level::Size2M, Some(&frame.page))?;
            return Err(error);
        }
        let Frame { page, held } = memory.remove(first).ok_or(not_there)?;
        let mut mapped = Ok(());
        for (gfn, page) in (first.get()..).map(Gfn::new).zip(pieces(page)) {
            let done = sev.map_encrypted(gfn, Level::Size4K, Some(&page));
            mapped = mapped.and(done);
            memory.insert(gfn, Frame { page, held });
        }
        mapped
    }

    /// Takes every page in a range out of the guest and frees it; a large page that is only partly
    /// in the range is split. One that is swapped out is given up.
    pub(crate) fn zap(&self, memory: &mut Memory, first: Gfn, pages: u64) -> Result<()> {
        let end = first.get().saturating_add(pages);
        self.forget_shown(memory, first, pages);
        memory.swap.give_up(first, pages)?;
        for (gfn, level) in memory.touching(first, pages) {
            if gfn < first || gfn.get() + level.frames() > end {
                self.split(memory, gfn)?;
            }
        }
        for (gfn, _) in memory.touching(first, pages) {
            let page = self.unmap(memory, gfn)?;
            self.sp().free(page);
        }
        Ok(())
    }

    /// Gives a frame a private page.
    pub(super) fn populate(&self, memory: &mut Memory, gfn: Gfn, level: Level) -> Result<()> {
        let page = self.sp().alloc(level)?;
        self.map(memory, gfn, page).map_err(|(error, page)| {
            if let Some(page) = page {
                self.sp().free(page);
            }
            error
        })
    }
}

/// The 4 KiB pages of a large page.
#[allow(unsafe_code)]
fn pieces(page: Page) -> impl Iterator<Item = Page> {
    let (frames, port) = (page.level().frames(), page.port());
    let first = page.into_raw().get();
    // SAFETY: the large page gave up its ownership, and each piece is made once.
    (first..first + frames)
        .map(move |pfn| unsafe { Page::from_raw(Pfn::new(pfn), Level::Size4K, port) })
}
