//! One change of a private frame: in the RMP, in the nested page tables, and in the list of frames.

use kvm_ops::{Error, Field, Gfn, Host, Level, Pfn, PrivateSpte, Result, SpteChange, VmPort};

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
    /// Carries out a change that an embedder asks for. Pages are neither taken nor freed here.
    ///
    /// | old | new | is |
    /// |---|---|---|
    /// | absent | mapped | RMPUPDATE to the guest, then the mapping |
    /// | mapped | absent | no mapping, (SNP_PAGE_RECLAIM,) RMPUPDATE to the host |
    /// | mapped, 2 MiB | table | no mapping, PSMASH, 512 mappings |
    pub(crate) fn change(&self, memory: &mut Memory, change: &SpteChange) -> Result<()> {
        let SpteChange {
            gfn,
            level,
            old,
            new,
        } = *change;
        if !gfn.is_aligned(level) || !matches!(level, Level::Size4K | Level::Size2M) {
            return Err(Error::Invalid(Field::Level, level as u64));
        }
        match (old, new) {
            (PrivateSpte::Absent, PrivateSpte::Mapped(page)) => {
                self.map(memory, gfn, level, page, Assign::Guest)
            }
            (PrivateSpte::Mapped(page), PrivateSpte::Absent) => {
                self.expect(memory, gfn, level, page)?;
                self.unmap(memory, gfn)
            }
            (PrivateSpte::Mapped(page), PrivateSpte::Table(_)) if level == Level::Size2M => {
                self.expect(memory, gfn, level, page)?;
                self.split(memory, gfn)
            }
            _ => Err(Error::Invalid(Field::Level, level as u64)),
        }
    }

    fn expect(&self, memory: &Memory, gfn: Gfn, level: Level, page: Pfn) -> Result<()> {
        match memory.frame(gfn) {
            Some((first, frame)) if (first, frame.level, frame.page) == (gfn, level, page) => {
                Ok(())
            }
            _ => Err(Error::NotFound(Field::Gfn, gfn.get())),
        }
    }

    /// Absent -> Mapped.
    pub(crate) fn map(
        &self,
        memory: &mut Memory,
        gfn: Gfn,
        level: Level,
        page: Pfn,
        assign: Assign,
    ) -> Result<()> {
        let held = self.assign(memory, gfn, level, page, assign)?;
        let mapped = self.port.map_encrypted(gfn, level, Some(page));
        // A page that cannot be taken back stays a frame, and the teardown tries again.
        if mapped.is_ok() || self.sp().take_back(page, level, held).is_err() {
            memory.insert(gfn, Frame { page, level, held });
        }
        mapped
    }

    /// Maps a page that SNP_LAUNCH_UPDATE gave to the guest. It is a frame even if the port cannot
    /// map it: it was measured, and no command takes that back.
    pub(crate) fn enter(&self, memory: &mut Memory, gfn: Gfn, page: Pfn, held: Held) -> Result<()> {
        let level = Level::Size4K;
        memory.insert(gfn, Frame { page, level, held });
        self.port.map_encrypted(gfn, level, Some(page))
    }

    /// The RMP's half of mapping. Returns how the page is held.
    pub(crate) fn assign(
        &self,
        memory: &Memory,
        gfn: Gfn,
        level: Level,
        page: Pfn,
        assign: Assign,
    ) -> Result<Held> {
        if !page.is_aligned(level) {
            return Err(Error::Invalid(Field::HostAddress, page.get()));
        }
        let last = gfn.checked_add(level.frames() - 1);
        self.check_frame(last.ok_or(Error::Invalid(Field::Gfn, gfn.get()))?)?;
        if let Some((other, _)) = memory.touching(gfn, level.frames()).first() {
            return Err(Error::Exists(Field::Gfn, other.get()));
        }
        if !self.is_snp() {
            return Ok(Held::Host);
        }
        let asid = self.asid()?;
        let immutable = assign == Assign::Launch;
        self.sp().assign(page, level, asid.0, gfn, immutable)?;
        Ok(match assign {
            Assign::Guest => Held::Assigned,
            Assign::Launch => Held::Immutable,
        })
    }

    /// Mapped -> Absent. A page that cannot be taken back is leaked and the VM poisoned, because
    /// its RMP entry is unknown from then on (Linux marks the VM bugged).
    fn unmap(&self, memory: &mut Memory, gfn: Gfn) -> Result<()> {
        let Some((first, frame)) = memory.frame(gfn) else {
            return Err(Error::NotFound(Field::Gfn, gfn.get()));
        };
        self.unmap_everywhere(first, frame.level)?;
        memory.frames.remove(&first.get());
        memory.touched(first, frame.level.frames());
        self.sp()
            .take_back(frame.page, frame.level, frame.held)
            .inspect_err(|error| {
                self.books.leak_page(frame.page, frame.level, *error);
                self.poison();
            })
    }

    /// Takes a mapping out of the VM's tables and those of its mirrors. No vCPU uses it afterwards.
    fn unmap_everywhere(&self, first: Gfn, level: Level) -> Result<()> {
        self.port.map_encrypted(first, level, None)?;
        self.unmap_in_mirrors(first, level)
    }

    /// Mapped 2 MiB -> 512 of 4 KiB.
    pub(super) fn split(&self, memory: &mut Memory, gfn: Gfn) -> Result<()> {
        let Some((first, frame)) = memory.frame(gfn) else {
            return Err(Error::NotFound(Field::Gfn, gfn.get()));
        };
        if frame.level != Level::Size2M {
            return Ok(());
        }
        // A mapping larger than its RMP entry faults: out before the entry changes, in after.
        self.unmap_everywhere(first, Level::Size2M)?;
        if self.is_snp() {
            if let Err(error) = self.sp().psmash(frame.page) {
                self.port
                    .map_encrypted(first, Level::Size2M, Some(frame.page))?;
                return Err(error);
            }
        }
        memory.frames.remove(&first.get());
        let mut mapped = Ok(());
        for i in 0..Level::Size2M.frames() {
            let (gfn, page) = (Gfn::new(first.get() + i), Pfn::new(frame.page.get() + i));
            let small = Frame {
                page,
                level: Level::Size4K,
                held: frame.held,
            };
            memory.insert(gfn, small);
            if let Err(error) = self.port.map_encrypted(gfn, Level::Size4K, Some(page)) {
                mapped = Err(error);
            }
        }
        mapped
    }

    /// Takes every page in a range out of the guest and frees it; a large page that is only partly
    /// in the range is split.
    pub(crate) fn zap(&self, memory: &mut Memory, first: Gfn, pages: u64) -> Result<()> {
        let end = first.get().saturating_add(pages);
        for (gfn, frame) in memory.touching(first, pages) {
            let last = gfn.get() + frame.level.frames();
            if gfn < first || last > end {
                self.split(memory, gfn)?;
            }
        }
        for (gfn, frame) in memory.touching(first, pages) {
            self.unmap(memory, gfn)?;
            self.sp().free(frame.page, frame.level);
        }
        Ok(())
    }

    /// Gives a frame a private page.
    pub(super) fn populate(&self, memory: &mut Memory, gfn: Gfn, level: Level) -> Result<()> {
        let page = self.sp().alloc(level)?;
        let mapped = self.map(memory, gfn, level, page, Assign::Guest);
        // Unless it became a frame after all, for the teardown to try again.
        if mapped.is_err() && memory.frame(gfn).is_none() {
            self.sp().free(page, level);
        }
        mapped
    }
}
