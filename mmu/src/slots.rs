//! The memory slots of a confidential VM.

use alloc::collections::BTreeMap;

use kvm_ops_core::{Field, MemSlot, PAGE_SIZE, SlotId};

use crate::{Error, Gfn, Result};

/// Memory slots by number.
///
/// The guest chooses the frames that it converts and touches. Only those that a slot covers may
/// enter the books of a VM, so that the books are bounded by the guest's memory.
#[derive(Clone, Debug, Default)]
pub struct Slots(BTreeMap<SlotId, MemSlot>);

impl Slots {
    /// No slots.
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// Checks that `slot` is new, or changes nothing but the flags of the slot of its number.
    /// Returns whether it is new.
    ///
    /// # Errors
    /// [`Error::Exists`] if the number belongs to a slot of other memory or at another address.
    pub fn check(&self, slot: &MemSlot) -> Result<bool> {
        match self.0.get(&slot.id) {
            None => Ok(true),
            Some(known) if same_but_flags(known, slot) => Ok(false),
            Some(_) => Err(Error::Exists(Field::Slot, slot.id.0.into())),
        }
    }

    /// Adds a slot, or replaces the one of its number.
    pub fn insert(&mut self, slot: MemSlot) {
        self.0.insert(slot.id, slot);
    }

    /// The slot that equals `slot` in all but the flags.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown number, and for a number that belongs to a slot of other
    /// memory or at another address.
    pub fn known(&self, slot: &MemSlot) -> Result<MemSlot> {
        match self.0.get(&slot.id) {
            Some(known) if same_but_flags(known, slot) => Ok(*known),
            _ => Err(Error::NotFound(Field::Slot, slot.id.0.into())),
        }
    }

    /// Removes the slot of that number.
    pub fn remove(&mut self, id: SlotId) {
        self.0.remove(&id);
    }

    /// Every slot, by number.
    pub fn iter(&self) -> impl Iterator<Item = &MemSlot> {
        self.0.values()
    }

    /// The slot that covers a frame.
    pub fn find(&self, gfn: Gfn) -> Option<&MemSlot> {
        let gpa = gfn.base()?;
        let covers = |slot: &&MemSlot| slot.gpa <= gpa && slot.last().is_ok_and(|last| gpa <= last);
        self.0.values().find(covers)
    }

    /// The number of frames from `first` on, without a gap and at most `pages`, that slots cover.
    pub fn covered(&self, first: Gfn, pages: u64) -> u64 {
        let mut done = 0;
        while done < pages {
            let Some(slot) = first.checked_add(done).and_then(|gfn| self.find(gfn)) else {
                break;
            };
            let offset = first.get() + done - Gfn::containing(slot.gpa).get();
            done += slot.bytes() / PAGE_SIZE - offset;
        }
        done.min(pages)
    }
}

fn same_but_flags(a: &MemSlot, b: &MemSlot) -> bool {
    let MemSlot { flags, .. } = *a;
    *a == MemSlot { flags, ..*b }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops_core::{Gpa, HostRange};

    fn slot(id: u32, first: u64, pages: u64) -> MemSlot {
        // SAFETY: no VM gets the range.
        let host = unsafe { HostRange::new(0x10_0000, pages * PAGE_SIZE) };
        MemSlot::new(SlotId(id), Gpa::new(first * PAGE_SIZE), host.unwrap())
    }

    #[test]
    fn covered_counts_every_frame_up_to_the_first_gap() {
        let mut slots = Slots::new();
        for (id, first, pages) in [(0, 16, 4), (1, 20, 2), (2, 23, 1), (3, (1 << 52) - 1, 1)] {
            slots.insert(slot(id, first, pages));
        }
        let memory = |gfn: u64| (16..22).contains(&gfn) || gfn == 23 || gfn == (1 << 52) - 1;
        for first in (0..30).chain((1 << 52) - 2..(1 << 52) + 2) {
            for pages in [0, 1, 3, 9, u64::MAX] {
                let gap = (0..pages).find(|n| !memory(first + n)).unwrap_or(pages);
                assert_eq!(
                    slots.covered(Gfn::new(first), pages),
                    gap,
                    "{first:#x} {pages}"
                );
            }
            assert_eq!(slots.find(Gfn::new(first)).is_some(), memory(first));
        }
        assert_eq!(slots.covered(Gfn::new(u64::MAX), 5), 0);
    }

    #[test]
    fn a_number_names_one_slot_and_only_its_flags_change() {
        let mut slots = Slots::new();
        let first = slot(7, 16, 4);
        assert_eq!(slots.check(&first), Ok(true));
        slots.insert(first);
        let mut read_only = first;
        read_only.flags.read_only = true;
        assert_eq!(slots.check(&read_only), Ok(false));
        assert_eq!(slots.known(&read_only), Ok(first));
        for other in [slot(7, 17, 4), slot(7, 16, 5)] {
            assert_eq!(slots.check(&other), Err(Error::Exists(Field::Slot, 7)));
            assert_eq!(slots.known(&other), Err(Error::NotFound(Field::Slot, 7)));
        }
        slots.remove(SlotId(7));
        assert_eq!(slots.known(&first), Err(Error::NotFound(Field::Slot, 7)));
    }
}
