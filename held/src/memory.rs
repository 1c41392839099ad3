//! Slots, and the attribute of each frame. The kernel knows them too, but tells neither.

use kvm_ops::{Error, Field, Gfn, HeldFailure, HeldPort, MemSlot, Privacy, Result, SharedMask};
use kvm_ops_mmu::{Attributes, Slots};

/// The books of a VM's memory.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) slots: Slots,
    /// A frame is what the frames of a new slot are, until it is converted.
    pub(crate) attributes: Attributes,
}

impl Memory {
    /// The frames of a range that slots cover without a gap.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is empty or wraps; [`Error::NotFound`] where no slot has the
    /// first frame.
    fn covered(&self, first: Gfn, pages: u64) -> Result<u64> {
        if pages == 0 {
            return Err(Error::Invalid(Field::Size, 0));
        }
        if first.checked_add(pages).is_none() {
            return Err(Error::Invalid(Field::Gfn, first.get()));
        }
        match self.slots.covered(first, pages) {
            0 => Err(Error::NotFound(Field::Gfn, first.get())),
            covered => Ok(covered),
        }
    }

    /// Converts the frames of a range that slots cover, and returns how many.
    pub(crate) fn convert(
        &mut self,
        port: &dyn HeldPort,
        first: Gfn,
        pages: u64,
        to: Privacy,
    ) -> Result<u64, HeldFailure> {
        let pages = self.covered(first, pages)?;
        port.convert(first, pages, to)?;
        self.attributes.set(first, pages, to)?;
        Ok(pages)
    }

    /// Maps the first run of private frames of a range.
    pub(crate) fn pre_fault(
        &self,
        port: &dyn HeldPort,
        first: Gfn,
        pages: u64,
    ) -> Result<u64, HeldFailure> {
        let pages = self.covered(first, pages)?;
        match self.attributes.runs(first, pages)?.next() {
            Some((_, private, Privacy::Private)) => port.pre_fault(first, private),
            _ => Err(Error::NotFound(Field::Gfn, first.get()).into()),
        }
    }
}

/// Checks that a slot lies in the guest's address space.
pub(crate) fn check_place(slot: &MemSlot, mask: SharedMask, begins: Privacy) -> Result<()> {
    let last = Gfn::containing(slot.last()?);
    match mask.join(last, begins) {
        Some(_) => Ok(()),
        None => Err(Error::Invalid(Field::Gfn, last.get())),
    }
}
