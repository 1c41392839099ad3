//! The guest's memory: slots, private or shared, and the pages that hold what is private.
//!
//! A frame's private page is one of the host's [`PagePort`](kvm_ops::PagePort): for SNP it is
//! assigned in the RMP, for SEV and SEV-ES it is ordinary memory that guest and firmware use with
//! the ASID's key. A frame without one shows its slot. Every change of a frame is one
//! [`SpteChange`], and [`Shared::change`] alone derives what it means to the RMP and to the nested
//! page tables.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use kvm_ops::{
    Error, Field, Gfn, Gpa, Host, Level, MemSlot, NestedFaultAnswer, PAGE_SIZE, Pfn, Privacy,
    PrivateSpte, Result, SlotId, SpteChange, VmPort,
};
use kvm_ops_mmu::Attributes;

use crate::migrate::FrameSet;
use crate::shared::Shared;
use crate::sp::Held;

/// A private page of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) page: Pfn,
    pub(crate) level: Level,
    pub(crate) held: Held,
}

/// What the guest's addresses mean.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    slots: BTreeMap<SlotId, MemSlot>,
    attributes: Attributes,
    /// By first frame number; frames do not overlap.
    frames: BTreeMap<u64, Frame>,
    /// Frames that changed since somebody asked; kept while the guest is being sent.
    dirty: Option<FrameSet>,
}

impl Memory {
    /// Whether a slot backs all of these frames.
    pub(crate) fn has_slot(&self, first: Gfn, frames: u64) -> bool {
        let Some(end) = first.get().checked_add(frames) else {
            return false;
        };
        self.slots.values().any(|slot| {
            let from = slot.gpa.get() >> 12;
            from <= first.get() && end <= from + (slot.bytes() >> 12)
        })
    }

    /// Where the guest sees a byte of the host memory that a slot lends.
    pub(crate) fn gpa_of(&self, host: u64) -> Option<Gpa> {
        self.slots.values().find_map(|slot| {
            let offset = host.checked_sub(slot.host.address())?;
            (offset < slot.bytes()).then(|| Gpa::new(slot.gpa.get() + offset))
        })
    }

    /// The page that covers a frame, with its first frame number.
    pub(crate) fn frame(&self, gfn: Gfn) -> Option<(Gfn, Frame)> {
        let (first, frame) = self.frames.range(..=gfn.get()).next_back()?;
        (gfn.get() - first < frame.level.frames()).then_some((Gfn::new(*first), *frame))
    }

    /// The 4 KiB page behind a frame, also inside a large one.
    pub(crate) fn page(&self, gfn: Gfn) -> Option<Pfn> {
        let (first, frame) = self.frame(gfn)?;
        frame.page.checked_add(gfn.get() - first.get())
    }

    /// The frames that touch a range, lowest first.
    fn touching(&self, first: Gfn, pages: u64) -> Vec<(Gfn, Frame)> {
        let from = self.frame(first).map_or(first, |(gfn, _)| gfn);
        let end = first.get().saturating_add(pages);
        self.frames
            .range(from.get()..end)
            .map(|(gfn, frame)| (Gfn::new(*gfn), *frame))
            .collect()
    }

    pub(crate) fn clear(&mut self) -> BTreeMap<u64, Frame> {
        core::mem::take(&mut self.frames)
    }

    /// Notes in which hands a page is.
    pub(crate) fn set_held(&mut self, gfn: Gfn, held: Held) {
        if let Some(frame) = self.frames.get_mut(&gfn.get()) {
            frame.held = held;
        }
    }

    pub(crate) fn is_shared(&self, gfn: Gfn) -> bool {
        self.attributes.get(gfn) == Privacy::Shared
    }

    fn insert(&mut self, gfn: Gfn, frame: Frame) {
        self.frames.insert(gfn.get(), frame);
        self.touched(gfn, frame.level.frames());
    }

    /// Notes that frames changed, or may.
    pub(crate) fn touched(&mut self, first: Gfn, frames: u64) {
        if let Some(dirty) = &mut self.dirty {
            for gfn in (first.get()..).take(frames as usize) {
                dirty.insert(Gfn::new(gfn));
            }
        }
    }

    /// The private pages: first frame and page of each.
    pub(crate) fn frames(&self) -> impl Iterator<Item = (Gfn, Frame)> + '_ {
        self.frames
            .iter()
            .map(|(gfn, frame)| (Gfn::new(*gfn), *frame))
    }

    /// The record of frames that changed, for who begins, reads or ends it.
    pub(crate) fn dirty(&mut self) -> &mut Option<FrameSet> {
        &mut self.dirty
    }

    pub(crate) fn slots(&self) -> impl Iterator<Item = &MemSlot> {
        self.slots.values()
    }

    /// Takes another VM's pages over, and what is private of its memory. The slots are each VM's
    /// own.
    pub(crate) fn take_pages(&mut self, from: &mut Self) {
        self.frames = core::mem::take(&mut from.frames);
        self.attributes = core::mem::take(&mut from.attributes);
        from.dirty = None;
    }
}

/// How a page is assigned in the RMP: for the guest to accept, or for SNP_LAUNCH_UPDATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Assign {
    Guest,
    Launch,
}

impl<H: Host> Shared<H> {
    /// Carries one change of a frame over to the RMP and the nested page tables.
    ///
    /// | old | new | is |
    /// |---|---|---|
    /// | absent | mapped | RMPUPDATE to the guest, then the mapping |
    /// | mapped | absent | no mapping, (SNP_PAGE_RECLAIM,) RMPUPDATE to the host |
    /// | mapped, 2 MiB | table | no mapping, PSMASH, 512 mappings |
    ///
    /// Pages are neither taken nor freed here.
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
        match self.port.map_encrypted(gfn, level, Some(page)) {
            Ok(()) => {
                memory.insert(gfn, Frame { page, level, held });
                Ok(())
            }
            Err(error) => {
                // A page that does not come back stays a frame, and the teardown tries again.
                if self.sp().take_back(page, level, held).is_err() {
                    memory.insert(gfn, Frame { page, level, held });
                }
                Err(error)
            }
        }
    }

    /// Maps a page that SNP_LAUNCH_UPDATE gave to the guest. It is a frame even if the port cannot
    /// map it: it was measured, and no command takes that back.
    pub(crate) fn enter(&self, memory: &mut Memory, gfn: Gfn, page: Pfn, held: Held) -> Result<()> {
        let level = Level::Size4K;
        memory.insert(gfn, Frame { page, level, held });
        self.port.map_encrypted(gfn, level, Some(page))
    }

    /// The first half of mapping: the RMP. Answers how the page is held.
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

    /// Mapped -> Absent. A page that cannot be taken back is leaked, and the VM poisoned, because
    /// what its RMP says and what we believe differ from then on (Linux marks it bugged).
    fn unmap(&self, memory: &mut Memory, gfn: Gfn) -> Result<()> {
        let Some((first, frame)) = memory.frame(gfn) else {
            return Err(Error::NotFound(Field::Gfn, gfn.get()));
        };
        self.port.map_encrypted(first, frame.level, None)?;
        self.unmap_in_mirrors(first, frame.level)?;
        memory.frames.remove(&first.get());
        memory.touched(first, frame.level.frames());
        self.sp()
            .take_back(frame.page, frame.level, frame.held)
            .inspect_err(|error| {
                self.books.leak_page(frame.page, frame.level, *error);
                self.poison();
            })
    }

    /// Mapped 2 MiB -> 512 of 4 KiB.
    fn split(&self, memory: &mut Memory, gfn: Gfn) -> Result<()> {
        let Some((first, frame)) = memory.frame(gfn) else {
            return Err(Error::NotFound(Field::Gfn, gfn.get()));
        };
        if frame.level != Level::Size2M {
            return Ok(());
        }
        // A mapping larger than the RMP entry faults: out before the entry changes, and in after.
        self.port.map_encrypted(first, Level::Size2M, None)?;
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

    /// Takes every page in a range out of the guest and frees it; large pages that are only partly
    /// in it are split. Answers how many frames were freed.
    pub(crate) fn zap(&self, memory: &mut Memory, first: Gfn, pages: u64) -> Result<u64> {
        let end = first.get().saturating_add(pages);
        for (gfn, frame) in memory.touching(first, pages) {
            let last = gfn.get() + frame.level.frames();
            if gfn < first || last > end {
                let old = PrivateSpte::Mapped(frame.page);
                let new = PrivateSpte::Table(frame.page);
                let level = frame.level;
                self.change(
                    memory,
                    &SpteChange {
                        gfn,
                        level,
                        old,
                        new,
                    },
                )?;
            }
        }
        let mut freed = 0;
        for (gfn, frame) in memory.touching(first, pages) {
            let (level, old) = (frame.level, PrivateSpte::Mapped(frame.page));
            let new = PrivateSpte::Absent;
            self.change(
                memory,
                &SpteChange {
                    gfn,
                    level,
                    old,
                    new,
                },
            )?;
            self.sp().free(frame.page, level);
            freed += level.frames();
        }
        Ok(freed)
    }

    /// Gives a frame a page of its own.
    fn populate(&self, memory: &mut Memory, gfn: Gfn, level: Level) -> Result<()> {
        let page = self.sp().alloc(level)?;
        let (old, new) = (PrivateSpte::Absent, PrivateSpte::Mapped(page));
        self.change(
            memory,
            &SpteChange {
                gfn,
                level,
                old,
                new,
            },
        )
        .inspect_err(|_| {
            // Unless it was entered after all, for the teardown to try again.
            if memory.frame(gfn).is_none() {
                self.sp().free(page, level);
            }
        })
    }

    /// Maps private pages where slots are and none is mapped: 2 MiB where range, slot and host
    /// memory allow it. Answers how many frames of the range are mapped now, from its start.
    pub(crate) fn pre_fault(&self, first: Gfn, pages: u64) -> Result<u64> {
        let mut memory = self.memory();
        let end = first.get().saturating_add(pages);
        let mut at = first;
        while at.get() < end {
            let done = match self.pre_fault_one(&mut memory, at, end - at.get()) {
                Ok(done) => done,
                Err(error) if at == first => return Err(error),
                Err(_) => break,
            };
            at = Gfn::new(at.get() + done);
        }
        Ok(at.get().min(end) - first.get())
    }

    fn pre_fault_one(&self, memory: &mut Memory, gfn: Gfn, left: u64) -> Result<u64> {
        if let Some((first, frame)) = memory.frame(gfn) {
            return Ok(first.get() + frame.level.frames() - gfn.get());
        }
        if !memory.has_slot(gfn, 1) || memory.is_shared(gfn) {
            return Err(Error::NotFound(Field::Gfn, gfn.get()));
        }
        let large = Level::Size2M.frames();
        let fits = self.is_snp()
            && gfn.is_aligned(Level::Size2M)
            && left >= large
            && memory.has_slot(gfn, large)
            && memory.touching(gfn, large).is_empty()
            && (memory.attributes.all(gfn, large, Privacy::Private)).unwrap_or(false);
        if fits {
            match self.populate(memory, gfn, Level::Size2M) {
                Ok(()) => return Ok(large),
                // No large page is left: small ones will do.
                Err(Error::NoMemory) => {}
                Err(error) => return Err(error),
            }
        }
        self.populate(memory, gfn, Level::Size4K)?;
        Ok(1)
    }

    /// Makes a range private or shared. What becomes shared gives its pages up at once; what
    /// becomes private gets pages when it is touched or pre-faulted, as Linux does.
    pub(crate) fn set_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        let mut memory = self.memory();
        memory.attributes.set(first, pages, to)?;
        if to == Privacy::Shared {
            self.zap(&mut memory, first, pages)?;
        }
        self.govern(first, pages, to)?;
        Ok(pages)
    }

    /// Tells the port which frames a guest may reach without the C-bit. Only SNP knows of private
    /// frames: a SEV or SEV-ES guest touches what it wants as it wants.
    fn govern(&self, first: Gfn, pages: u64, privacy: Privacy) -> Result<()> {
        if !self.is_snp() {
            return Ok(());
        }
        self.port
            .set_shared(first, pages, privacy == Privacy::Shared)
    }

    /// Creates a slot. What is private of it stays so.
    pub(crate) fn set_slot(&self, slot: &MemSlot) -> Result<()> {
        let mut memory = self.memory();
        self.port.set_memory_slot(slot)?;
        memory.slots.insert(slot.id, *slot);
        let (first, pages) = (Gfn::containing(slot.gpa), slot.bytes() / PAGE_SIZE);
        for (first, pages, privacy) in memory.attributes.runs(first, pages)? {
            self.govern(first, pages, privacy)?;
        }
        Ok(())
    }

    /// Deletes a slot, and the private pages in its place with it. Where no slot is, nothing is
    /// private: the guest may find devices there.
    pub(crate) fn delete_slot(&self, slot: &MemSlot) -> Result<()> {
        let mut memory = self.memory();
        self.port.delete_memory_slot(slot)?;
        let Some(slot) = memory.slots.remove(&slot.id) else {
            return Ok(());
        };
        let (first, pages) = (Gfn::containing(slot.gpa), slot.bytes() / PAGE_SIZE);
        self.zap(&mut memory, first, pages)?;
        self.govern(first, pages, Privacy::Shared)
    }

    /// A guest touched a frame with the C-bit, and nothing is mapped there.
    pub(crate) fn private_fault(&self, gfn: Gfn) -> NestedFaultAnswer {
        let mut memory = self.memory();
        if let Some((first, frame)) = memory.frame(gfn) {
            memory.touched(first, frame.level.frames());
            // Another vCPU was here first; the page came with the context of another VM; its use is
            // being recorded; or the port could not map it then, and may now.
            let mapped = self
                .port
                .map_encrypted(first, frame.level, Some(frame.page));
            return mapped.map_or_else(NestedFaultAnswer::Fail, |()| NestedFaultAnswer::Retry);
        }
        if let Some(home) = self.mirror_of() {
            drop(memory);
            return self.mirror_fault(&home, gfn);
        }
        if !memory.has_slot(gfn, 1) || memory.is_shared(gfn) {
            return NestedFaultAnswer::Leave;
        }
        match self.populate(&mut memory, gfn, Level::Size4K) {
            Ok(()) => NestedFaultAnswer::Retry,
            Err(error) => NestedFaultAnswer::Fail(error),
        }
    }

    /// A guest meant 4 KiB of a frame that the RMP has as 2 MiB.
    pub(crate) fn split_fault(&self, gfn: Gfn) -> NestedFaultAnswer {
        let mut memory = self.memory();
        match memory.frame(gfn) {
            None => NestedFaultAnswer::Leave,
            Some((_, frame)) if frame.level == Level::Size4K => NestedFaultAnswer::Leave,
            Some((first, _)) => match self.split(&mut memory, first) {
                Ok(()) => NestedFaultAnswer::Retry,
                Err(error) => NestedFaultAnswer::Fail(error),
            },
        }
    }
}
