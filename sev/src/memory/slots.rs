//! What the host asks for: slots, attributes, and pages before they are touched.

use kvm_ops::{
    Error, Field, Gfn, Host, Level, MemSlot, PAGE_SIZE, Privacy, Result, SlotId, VmPort,
};

use super::Memory;
use crate::shared::Shared;

/// First frame and number of frames of a slot.
fn frames(slot: &MemSlot) -> (Gfn, u64) {
    (Gfn::containing(slot.gpa), slot.bytes() / PAGE_SIZE)
}

impl Memory {
    /// Records a slot. Returns the ranges of an older slot of that number that it leaves uncovered.
    fn put(&mut self, slot: &MemSlot) -> [(Gfn, u64); 2] {
        let (first, pages) = frames(slot);
        let Some(old) = self.slots.insert(slot.id, *slot) else {
            return [(first, 0); 2];
        };
        let (old_first, old_pages) = frames(&old);
        let (start, end) = (old_first.get(), old_first.get() + old_pages);
        let below = first.get().clamp(start, end);
        let above = (first.get() + pages).clamp(start, end).max(below);
        [(start, below), (above, end)].map(|(from, to)| (Gfn::new(from), to - from))
    }

    fn remove(&mut self, id: SlotId) -> Option<MemSlot> {
        self.slots.remove(&id)
    }
}

impl<H: Host> Shared<H> {
    /// Makes a range private or shared. A range that becomes shared gives its pages up at once; one
    /// that becomes private gets pages when it is touched or pre-faulted, as in Linux.
    ///
    /// # Errors
    /// [`Error::NotFound`] names the first frame that no slot backs. On any error the attributes are
    /// as before; pages that are gone come back, empty, with the next touch.
    pub(crate) fn set_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        let mut memory = self.memory();
        if let Some(gfn) = memory.first_uncovered(first, pages) {
            return Err(Error::NotFound(Field::Gfn, gfn.get()));
        }
        if to == Privacy::Shared {
            self.zap(&mut memory, first, pages)?;
        }
        self.govern(first, pages, to)?;
        memory.attributes.set(first, pages, to)?;
        Ok(pages)
    }

    /// Tells the port which frames a guest may reach without the C-bit. Only SNP knows private
    /// frames: a SEV or SEV-ES guest chooses with each access.
    fn govern(&self, first: Gfn, pages: u64, privacy: Privacy) -> Result<()> {
        if !self.is_snp() {
            return Ok(());
        }
        self.port
            .set_shared(first, pages, privacy == Privacy::Shared)
    }

    /// Creates or changes a slot. Attributes of frames that it has already stay.
    pub(crate) fn set_slot(&self, slot: &MemSlot) -> Result<()> {
        let mut memory = self.memory();
        self.port.set_memory_slot(slot)?;
        for (first, pages) in memory.put(slot) {
            self.forget(&mut memory, first, pages)?;
        }
        let (first, pages) = frames(slot);
        for (first, pages, privacy) in memory.attributes.runs(first, pages)? {
            self.govern(first, pages, privacy)?;
        }
        Ok(())
    }

    /// Deletes a slot with its private pages and attributes.
    pub(crate) fn delete_slot(&self, slot: &MemSlot) -> Result<()> {
        let mut memory = self.memory();
        self.port.delete_memory_slot(slot)?;
        let Some(slot) = memory.remove(slot.id) else {
            return Ok(());
        };
        let (first, pages) = frames(&slot);
        self.forget(&mut memory, first, pages)
    }

    /// No slot is there any more. The guest may find devices there, which are shared.
    fn forget(&self, memory: &mut Memory, first: Gfn, pages: u64) -> Result<()> {
        if pages == 0 {
            return Ok(());
        }
        self.zap(memory, first, pages)?;
        memory.attributes.set(first, pages, Privacy::Private)?;
        self.govern(first, pages, Privacy::Shared)
    }

    /// Maps private pages where none is: 2 MiB where range, slot and host memory allow it. Returns
    /// how many frames of the range, from its start, are mapped now.
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
                // The host has no large page left: small ones will do.
                Err(Error::NoMemory) => {}
                Err(error) => return Err(error),
            }
        }
        self.populate(memory, gfn, Level::Size4K)?;
        Ok(1)
    }
}
