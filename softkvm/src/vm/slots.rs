//! The slots of a VM, in each of its address spaces.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use kvm_ops::{HostRange, Privacy};
use kvm_ops_uapi::memory::{gmem_flags, slot_flags};

use super::Gmem;
use crate::FileMemory;

const PAGE: u64 = 4096;

/// A slot. Its range is whole pages, not empty, and does not wrap.
#[derive(Clone)]
pub(crate) struct Slot {
    pub(crate) flags: u32,
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    pub(crate) hva: u64,
    pub(crate) file: Option<Binding>,
    pub(crate) lent: Lent,
}

/// The memory behind a slot, as far as the process lends it.
#[derive(Clone, Default)]
pub(crate) struct Lent {
    pub(crate) user: Option<HostRange>,
    pub(crate) file: Option<Arc<dyn FileMemory>>,
}

/// A range of a guest_memfd behind a slot. The slot does not keep the file.
#[derive(Clone)]
pub(crate) struct Binding {
    file: Weak<Gmem>,
    flags: u64,
    offset: u64,
    size: u64,
}

impl Slot {
    /// The address of the last byte.
    pub(crate) fn last(&self) -> u64 {
        self.gpa + (self.size - 1)
    }

    /// The memory behind the slot. A file that can be mapped serves shared accesses too.
    pub(crate) fn memory(&self, privacy: Privacy) -> Option<HostRange> {
        let file = self.file.as_ref();
        match privacy {
            Privacy::Shared if !file.is_some_and(Binding::serves_shared) => self.lent.user,
            _ => self.lent.file.as_ref().map(|file| file.range()),
        }
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.flags & slot_flags::READONLY != 0
    }

    pub(crate) fn pages(&self) -> u64 {
        self.size / PAGE
    }

    pub(crate) fn logs_dirty(&self) -> bool {
        self.flags & slot_flags::LOG_DIRTY_PAGES != 0
    }

    /// The guest addresses behind a range of a file: start and size, if the slot has some of it.
    pub(crate) fn guest_range(
        &self,
        file: &Gmem,
        (offset, size): (u64, u64),
    ) -> Option<(u64, u64)> {
        let binding = self.file.as_ref()?;
        if !std::ptr::eq(binding.file.as_ptr(), file) {
            return None;
        }
        let start = offset.max(binding.offset);
        let end = offset
            .saturating_add(size)
            .min(binding.offset + binding.size);
        (start < end).then(|| (self.gpa + (start - binding.offset), end - start))
    }

    /// True if the slot was lent memory of the process in a range.
    pub(crate) fn meets_user_memory(&self, address: u64, bytes: u64) -> bool {
        let (start, end) = (self.hva, self.hva.saturating_add(self.size));
        self.lent.user.is_some() && start < address.saturating_add(bytes) && address < end
    }

    /// The user address behind a guest address of the slot.
    pub(crate) fn user_address(&self, gpa: u64) -> u64 {
        self.hva.wrapping_add(gpa - self.gpa)
    }
}

impl Binding {
    pub(crate) fn new(file: &Arc<Gmem>, offset: u64, size: u64) -> Self {
        Self {
            file: Arc::downgrade(file),
            flags: file.flags(),
            offset,
            size,
        }
    }

    fn serves_shared(&self) -> bool {
        self.flags & gmem_flags::MMAP != 0
    }

    pub(crate) fn is_open(&self) -> bool {
        self.file.strong_count() != 0
    }

    /// True if both name a byte of one open file.
    fn meets(&self, other: &Self) -> bool {
        self.is_open()
            && Weak::ptr_eq(&self.file, &other.file)
            && self.offset < other.offset + other.size
            && other.offset < self.offset + self.size
    }
}

/// Slots by number, and by place.
#[derive(Default)]
pub(crate) struct Slots {
    by_number: BTreeMap<u32, Slot>,
    /// Address space and first address, to the slot's number.
    by_place: BTreeMap<(u32, u64), u32>,
}

/// The address space in a slot's number.
pub(crate) const fn space(number: u32) -> u32 {
    number >> 16
}

impl Slots {
    pub(crate) fn get(&self, number: u32) -> Option<&Slot> {
        self.by_number.get(&number)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        self.by_number.iter().map(|(number, slot)| (*number, slot))
    }

    pub(crate) fn insert(&mut self, number: u32, slot: Slot) {
        self.remove(number);
        self.by_place.insert((space(number), slot.gpa), number);
        self.by_number.insert(number, slot);
    }

    pub(crate) fn remove(&mut self, number: u32) -> Option<Slot> {
        let slot = self.by_number.remove(&number)?;
        self.by_place.remove(&(space(number), slot.gpa));
        Some(slot)
    }

    /// The slot that holds an address.
    pub(crate) fn at(&self, space: u32, gpa: u64) -> Option<&Slot> {
        self.number_at(space, gpa).map(|(_, slot)| slot)
    }

    /// The slot that holds an address, with its number.
    pub(crate) fn number_at(&self, space: u32, gpa: u64) -> Option<(u32, &Slot)> {
        let below = self.by_place.range((space, 0)..=(space, gpa));
        let (_, number) = below.last()?;
        let slot = self.get(*number).filter(|slot| gpa <= slot.last())?;
        Some((*number, slot))
    }

    /// True if another slot of the address space has an address in the range.
    pub(crate) fn overlaps(&self, number: u32, gpa: u64, size: u64) -> bool {
        let space = space(number);
        let last = gpa + (size - 1);
        let below = self.by_place.range((space, 0)..=(space, last)).rev();
        // Slots do not overlap, so of those that begin in front of the range only the nearest, which
        // may be the slot itself, can reach into it.
        below
            .filter(|(_, other)| **other != number)
            .take(1)
            .any(|(_, other)| self.by_number[other].last() >= gpa)
    }

    /// True if a slot uses part of the same range of a file.
    pub(crate) fn uses(&self, binding: &Binding) -> bool {
        let mut bindings = self
            .by_number
            .values()
            .filter_map(|slot| slot.file.as_ref());
        bindings.any(|other| other.meets(binding))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(gpa: u64, pages: u64) -> Slot {
        Slot {
            flags: 0,
            gpa,
            size: pages * PAGE,
            hva: 0x10_0000,
            file: None,
            lent: Lent::default(),
        }
    }

    /// Every placement of a range among two slots, against the definition.
    #[test]
    fn overlap_is_that_of_ranges() {
        let mut slots = Slots::default();
        slots.insert(1, slot(2 * PAGE, 2));
        slots.insert(2, slot(6 * PAGE, 1));
        slots.insert(1 << 16 | 1, slot(0, 16));
        let taken = [2, 3, 6];
        for number in [1, 2, 3] {
            for first in 0..10 {
                for pages in 1..6 {
                    let own = |page: &u64| match number {
                        1 => [2, 3].contains(page),
                        2 => *page == 6,
                        _ => false,
                    };
                    let mut range = first..first + pages;
                    let expected = range.any(|page| taken.contains(&page) && !own(&page));
                    let found = slots.overlaps(number, first * PAGE, pages * PAGE);
                    assert_eq!(found, expected, "slot {number}: {first} + {pages}");
                }
            }
        }
    }

    #[test]
    fn a_slot_is_found_by_each_of_its_addresses() {
        let mut slots = Slots::default();
        slots.insert(7, slot(!0 - (4 * PAGE - 1), 4));
        assert!(
            slots.at(0, !0).is_some(),
            "the last byte of the address space"
        );
        assert!(slots.at(0, !0 - 4 * PAGE).is_none());
        assert!(slots.at(1, !0).is_none());
        assert_eq!(
            slots.at(0, !0).unwrap().user_address(!0),
            0x10_0000 + 4 * PAGE - 1
        );
        slots.remove(7);
        assert!(slots.at(0, !0).is_none());
    }
}
