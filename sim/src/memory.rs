//! The memory of a VM: slots, their dirty logs, the second-level table, and the frames that a
//! confidential VM does not share.

use std::collections::BTreeMap;

use kvm_ops::{Error, Field, Gfn, Gpa, Level, MemSlot, OpName, PAGE_SIZE, Privacy, Result, SlotId};

use crate::TableStats;
use crate::frame_set::FrameSet;
use crate::table::{FRAMES, GPA_BITS, Mapping, Table};

#[derive(Default)]
pub(crate) struct Memory {
    slots: BTreeMap<SlotId, MemSlot>,
    dirty: BTreeMap<SlotId, Vec<u64>>,
    /// The frames of a confidential VM that it does not share with the host. See
    /// [`set_shared`](Memory::set_shared) for its size.
    private: FrameSet,
    /// Frames whose memory is missing, as private and as shared memory.
    missing: [FrameSet; 2],
    table: Table,
}

impl Memory {
    /// Creates a slot or changes its flags.
    pub(crate) fn set_slot(&mut self, slot: &MemSlot) -> Result<()> {
        let last = slot.last()?;
        if last.get() >> GPA_BITS != 0 {
            return Err(Error::Invalid(Field::Gpa, last.get()));
        }
        if slot.private.is_some() {
            static GUEST_MEMFD: OpName = OpName("guest_memfd");
            return Err(Error::HostLacks(&GUEST_MEMFD));
        }
        if self.slots.contains_key(&slot.id) && self.find(slot).is_err() {
            return Err(Error::Exists(Field::Slot, slot.id.0.into()));
        }
        let mut others = self.slots.values().filter(|other| other.id != slot.id);
        if let Some(other) = others.find(|other| other.overlaps(slot)) {
            return Err(Error::Invalid(Field::OverlappedSlot, other.id.0.into()));
        }
        if self.slots.insert(slot.id, *slot).is_some() {
            self.zap(slot);
        }
        if slot.flags.log_dirty {
            // A log that goes on keeps its bits, as on KVM.
            let log = self.dirty.entry(slot.id);
            log.or_insert_with(|| vec![0; slot.dirty_words()]);
        } else {
            self.dirty.remove(&slot.id);
        }
        Ok(())
    }

    pub(crate) fn delete_slot(&mut self, slot: &MemSlot) -> Result<()> {
        self.find(slot)?;
        self.slots.remove(&slot.id);
        self.dirty.remove(&slot.id);
        self.zap(slot);
        Ok(())
    }

    /// Copies the dirty log of a slot, and starts a new one.
    pub(crate) fn dirty_log(&mut self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        self.find(slot)?;
        let log = self.dirty.get_mut(&slot.id).ok_or(not_found(slot))?;
        if bitmap.len() != log.len() {
            return Err(Error::Invalid(Field::BufferLength, bitmap.len() as u64));
        }
        bitmap.copy_from_slice(log);
        log.fill(0);
        let (first, pages) = frames_of(slot);
        self.table.write_protect(Gfn::new(first), pages);
        Ok(())
    }

    /// True if a slot with a dirty log is at a frame.
    #[allow(dead_code)] // Never in a build without SEV.
    pub(crate) fn logs(&self, gfn: Gfn) -> bool {
        let slot = || self.slot_at(gfn.base()?);
        !self.dirty.is_empty() && slot().is_some_and(|slot| slot.flags.log_dirty)
    }

    /// Notes a write to a frame that does not go through the second-level table: one to a page of the guest's own.
    #[allow(dead_code)] // Never in a build without SEV.
    pub(crate) fn log_write(&mut self, gfn: Gfn) {
        let Some((id, page)) = gfn.base().and_then(|gpa| {
            let slot = self.slot_at(gpa)?;
            Some((slot.id, (gpa.get() - slot.gpa.get()) / PAGE_SIZE))
        }) else {
            return;
        };
        if let Some(bitmap) = self.dirty.get_mut(&id) {
            mark(bitmap, page);
        }
    }

    /// The number of frames in all slots.
    pub(crate) fn frames(&self) -> u64 {
        let frames = self.slots.values().map(|slot| frames_of(slot).1);
        frames.fold(0, u64::saturating_add)
    }

    pub(crate) fn stats(&self) -> TableStats {
        self.table.stats
    }

    pub(crate) fn lookup(&self, gfn: Gfn) -> Option<Mapping> {
        self.table.lookup(gfn)
    }

    /// True for memory that is not shared with the host. A frame without a slot is MMIO, and one of a
    /// read-only slot cannot be private.
    pub(crate) fn is_private(&self, gfn: Gfn) -> bool {
        self.private.contains(gfn.get()) && self.slot_page(gfn, true).is_some()
    }

    /// Fails unless this very slot was set: number, place and memory. Its flags may have changed.
    fn find(&self, slot: &MemSlot) -> Result<()> {
        match self.slots.get(&slot.id) {
            Some(known) if known.is_same_place(slot) => Ok(()),
            _ => Err(not_found(slot)),
        }
    }

    /// Removes frames from the shared memory, or adds them.
    ///
    /// Only the frames that slots back change, so that a guest that asks for conversions elsewhere
    /// does not make the set larger than its memory. A range with every slot and half of the
    /// address space, as a back end makes it when the VM starts, also holds for later slots.
    pub(crate) fn set_shared(&mut self, first: Gfn, pages: u64, shared: bool) {
        let (start, end) = (first.get(), first.get().saturating_add(pages));
        let has_slot = |(first, pages)| start <= first && first + pages <= end;
        if pages >= FRAMES / 2 && self.slots.values().map(frames_of).all(has_slot) {
            self.private = FrameSet::default();
            if !shared {
                self.private.insert(0, FRAMES);
            }
        } else {
            for (first, pages) in self.slots.values().map(frames_of) {
                let from = start.max(first);
                let pages = end.min(first + pages).saturating_sub(from);
                match shared {
                    true => self.private.remove(from, pages),
                    false => self.private.insert(from, pages),
                }
            }
        }
        if !shared {
            self.table.zap(first, pages);
        }
    }

    /// Declares memory as missing, or no more.
    pub(crate) fn set_missing(&mut self, first: Gfn, pages: u64, kind: Option<Privacy>) {
        let kinds = [Privacy::Private, Privacy::Shared];
        for (set, own) in self.missing.iter_mut().zip(kinds) {
            match kind == Some(own) {
                true => set.insert(first.get(), pages),
                false => set.remove(first.get(), pages),
            }
        }
    }

    /// The kind of memory that is missing at a frame without a slot.
    pub(crate) fn missing(&self, gfn: Gfn) -> Option<Privacy> {
        let [private, shared] = self.missing.each_ref().map(|set| set.contains(gfn.get()));
        let kind = match (private, shared) {
            (true, _) => Privacy::Private,
            (false, true) => Privacy::Shared,
            (false, false) => return None,
        };
        let has_slot = gfn.base().is_some_and(|gpa| self.slot_at(gpa).is_some());
        (!has_slot).then_some(kind)
    }

    /// Takes over the frames that another VM does not share, with its guest. Slots stay, and nothing is
    /// mapped any more.
    pub(crate) fn take_private(&mut self, from: &mut Self) {
        self.private = std::mem::take(&mut from.private);
        self.table.zap(Gfn::new(0), FRAMES);
    }

    fn slot_at(&self, gpa: Gpa) -> Option<&MemSlot> {
        self.slots.values().find(|slot| contains(slot, gpa))
    }

    /// The host address of a page of a slot. `None` for a write to a read-only one.
    pub(crate) fn slot_page(&self, gfn: Gfn, write: bool) -> Option<u64> {
        let gpa = gfn.base()?;
        let slot = self.slot_at(gpa)?;
        let allowed = !write || !slot.flags.read_only;
        allowed.then(|| slot.host.address() + (gpa.get() - slot.gpa.get()))
    }

    /// Resolves a violation from the slots. `None` means MMIO: no slot is there, or the write goes
    /// to a read-only slot.
    pub(crate) fn resolve(&mut self, gfn: Gfn, write: bool) -> Option<Mapping> {
        // Another vCPU may have resolved it while this one waited for the lock.
        if let Some(mapping) = self.lookup(gfn).filter(|m| m.writable || !write) {
            return Some(mapping);
        }
        self.table.stats.violations += 1;
        let gpa = gfn.base()?;
        let slot = *self.slot_at(gpa)?;
        if write && slot.flags.read_only {
            return None;
        }
        let offset = gpa.get() - slot.gpa.get();
        if !slot.flags.log_dirty && self.map_2m(&slot, gfn) {
            return self.table.lookup(gfn);
        }
        if write && let Some(bitmap) = self.dirty.get_mut(&slot.id) {
            mark(bitmap, offset / PAGE_SIZE);
        }
        let writable = !slot.flags.read_only && (write || !slot.flags.log_dirty);
        let mapping = Mapping {
            host: slot.host.address() + offset,
            writable,
        };
        self.table
            .map(gfn, Level::Size4K, mapping)
            .then_some(mapping)
    }

    /// Maps the whole 2 MiB around `gfn`, where slot and host memory allow it.
    fn map_2m(&mut self, slot: &MemSlot, gfn: Gfn) -> bool {
        let first = Gfn::new(gfn.get() & !(Level::Size2M.frames() - 1));
        let Some(gpa) = first.base() else {
            return false;
        };
        let last = gpa.get() + (Level::Size2M.bytes() - 1);
        if gpa < slot.gpa || !slot.last().is_ok_and(|end| last <= end.get()) {
            return false;
        }
        let host = slot.host.address() + (gpa.get() - slot.gpa.get());
        if !host.is_multiple_of(Level::Size2M.bytes()) {
            return false;
        }
        let mapping = Mapping {
            host,
            writable: !slot.flags.read_only,
        };
        self.table.map(first, Level::Size2M, mapping)
    }

    fn zap(&mut self, slot: &MemSlot) {
        let (first, pages) = frames_of(slot);
        self.table.zap(Gfn::new(first), pages);
    }
}

/// Sets a page's bit in a dirty log of its slot.
fn mark(bitmap: &mut [u64], page: u64) {
    bitmap[(page / 64) as usize] |= 1 << (page % 64);
}

/// The first frame of a slot, and the number of its frames.
fn frames_of(slot: &MemSlot) -> (u64, u64) {
    let first = Gfn::containing(slot.gpa).get();
    (first, slot.bytes() / PAGE_SIZE)
}

fn not_found(slot: &MemSlot) -> Error {
    Error::NotFound(Field::Slot, slot.id.0.into())
}

fn contains(slot: &MemSlot, gpa: Gpa) -> bool {
    slot.gpa <= gpa && slot.last().is_ok_and(|last| gpa <= last)
}

#[cfg(test)]
mod tests {
    use super::*;

    use kvm_ops::HostRange;

    fn slot(gpa: u64, host: u64, bytes: u64) -> MemSlot {
        // SAFETY: nothing is read or written through the range: only tables and sets are looked at.
        let range = unsafe { HostRange::new(host, bytes) }.unwrap();
        MemSlot::new(SlotId(0), Gpa::new(gpa), range)
    }

    #[test]
    fn a_violation_that_another_vcpu_resolved_first_is_no_mmio() {
        // Aligned, so that one mapping covers 2 MiB.
        let large = Level::Size2M.bytes();
        let mut memory = Memory::default();
        memory.set_slot(&slot(0, 16 * large, large)).unwrap();
        let first = memory.resolve(Gfn::new(1), true);
        assert!(first.is_some());
        assert_eq!(memory.resolve(Gfn::new(1), true), first);
        assert!(memory.resolve(Gfn::new(2), false).is_some());
        assert_eq!(memory.table.stats.violations, 1);
    }

    #[test]
    fn the_set_of_private_frames_is_no_larger_than_the_memory() {
        let mut memory = Memory::default();
        memory.set_shared(Gfn::new(0), FRAMES / 2, false);
        let slot = slot(0x4000, 0x10_0000, 16 * PAGE_SIZE);
        memory.set_slot(&slot).unwrap();
        assert!(memory.is_private(Gfn::new(4)), "a slot that came later");
        let ranges = |memory: &Memory| memory.private.ranges();
        assert_eq!(ranges(&memory), 1);
        for page in 0..100_000 {
            memory.set_shared(Gfn::new(100 + 2 * page), 1, true);
        }
        assert_eq!(ranges(&memory), 1, "nothing lies there");
        for first in (0..100).step_by(2) {
            memory.set_shared(Gfn::new(first), 1, true);
        }
        let shared = (4..20).filter(|gfn| !memory.is_private(Gfn::new(*gfn)));
        assert_eq!(shared.collect::<Vec<_>>(), [4, 6, 8, 10, 12, 14, 16, 18]);
        assert_eq!(ranges(&memory), 9);
        // A range that a guest may ask for, too short to be the back end's, in any order.
        for first in (0..50_000).rev() {
            memory.set_shared(Gfn::new(0), first, first % 2 == 0);
        }
        assert!(ranges(&memory) <= 10);
        memory.set_shared(Gfn::new(0), FRAMES, true);
        assert_eq!(ranges(&memory), 0);
    }
}
