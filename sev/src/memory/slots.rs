//! Requests of the host: slots, attributes, and pages before they are touched.

use kvm_ops::{Error, Field, Gfn, Host, Level, MemSlot, PAGE_SIZE, Privacy, Result, VmPort};

use super::Memory;
use crate::shared::Shared;

/// First frame and number of frames of a slot.
fn frames(slot: &MemSlot) -> (Gfn, u64) {
    (Gfn::containing(slot.gpa), slot.bytes() / PAGE_SIZE)
}

impl<H: Host> Shared<H> {
    /// Makes a range private or shared. A range that becomes shared gives its pages up at once; one
    /// that becomes private gets pages when it is touched or pre-faulted, as in Linux.
    ///
    /// Returns the number of frames converted. It stops before the first frame that no slot covers:
    /// the guest chooses the frames, and its memory bounds the attributes that are kept.
    ///
    /// # Errors
    /// [`Error::NotFound`] if no slot covers the first frame. On an error the attributes are as
    /// before; a page that is gone comes back, empty, with the next touch.
    pub(crate) fn set_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        let mut memory = self.memory();
        let pages = memory.slots.covered(first, pages);
        if pages == 0 {
            return Err(Error::NotFound(Field::Gfn, first.get()));
        }
        match to {
            Privacy::Shared => self.zap(&mut memory, first, pages)?,
            Privacy::Private => self.forget_shown(&mut memory, first, pages),
        }
        self.govern(first, pages, to)?;
        memory.attributes.set(first, pages, to)?;
        Ok(pages)
    }

    /// The kind of memory that a frame is now.
    pub(crate) fn privacy(&self, gfn: Gfn) -> Privacy {
        self.memory().attributes.get(gfn)
    }

    /// Tells the port which frames a guest reaches without the C-bit. The first such touch of another frame is a
    /// fault.
    pub(super) fn govern(&self, first: Gfn, pages: u64, privacy: Privacy) -> Result<()> {
        self.sev()?
            .set_shared(first, pages, privacy == Privacy::Shared)
    }

    /// Creates a slot, or changes its flags. Attributes that its frames have stay.
    pub(crate) fn set_slot(&self, slot: &MemSlot) -> Result<()> {
        let mut memory = self.memory();
        memory.slots.check(slot)?;
        self.port.set_memory_slot(slot)?;
        memory.slots.insert(*slot);
        let (first, pages) = frames(slot);
        for (first, pages, privacy) in memory.attributes.runs(first, pages)? {
            self.govern(first, pages, privacy)?;
        }
        self.show_parked(&mut memory, slot)
    }

    /// Deletes a slot with its private pages and attributes; those of a SEV or SEV-ES guest stay that stand for memory
    /// in a registered region. The guest may find devices there, which are shared.
    pub(crate) fn delete_slot(&self, slot: &MemSlot) -> Result<()> {
        let mut memory = self.memory();
        let slot = memory.slots.known(slot)?;
        self.port.delete_memory_slot(&slot)?;
        memory.slots.remove(slot.id);
        let (first, pages) = frames(&slot);
        self.park_slot(&mut memory, &slot)?;
        self.zap(&mut memory, first, pages)?;
        memory.attributes.set(first, pages, Privacy::Private)?;
        self.govern(first, pages, Privacy::Shared)?;
        drop(memory);
        match self.mirrored_group() {
            Some(group) => group.forget_views(self, first, pages),
            None => Ok(()),
        }
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
            return Ok(first.get() + frame.page.level().frames() - gfn.get());
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
            && memory.swap.touching(gfn, large).is_empty()
            && memory.is_private(gfn, large);
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
