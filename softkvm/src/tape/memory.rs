//! The memory of slots, and what changes in it.

use std::collections::{BTreeMap, HashMap};
use std::thread::{self, ThreadId};

use kvm_ops_uapi::memory::SLOT_MAX_PAGES;

use super::format::changes;
use crate::Process;

/// A slot of a VM, as the call set it.
struct Slot {
    /// The number of the call among all that set slots.
    ordinal: u32,
    address: u64,
    bytes: u64,
    /// The memory at the last look: by their offset, the chunks that are not all zeros. `None` before the first run.
    seen: Option<BTreeMap<u64, Vec<u8>>>,
}

/// What changed in a slot: its ordinal, an offset, and the bytes from there on.
pub(super) type Change = (u32, u64, Vec<u8>);

/// The slots of all VMs, by the VM's file and the slot's number.
#[derive(Default)]
pub(super) struct Slots {
    slots: BTreeMap<(u32, u32), Slot>,
    /// The VM and the slot of each thread whose call sets one. Guests see it before the call ends.
    coming: HashMap<ThreadId, (u32, Slot)>,
    next: u32,
}

/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// Bytes that are there or not.
const PAGE: usize = 4096;

/// A chunk of memory that nobody wrote.
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// Reads memory. Bytes of pages that are not there stay as they are.
fn read_there(process: &dyn Process, address: u64, into: &mut [u8]) {
    if process.read(address, into).is_ok() {
        return;
    }
    for (address, page) in (address..).step_by(PAGE).zip(into.chunks_mut(PAGE)) {
        // One that is not there keeps its bytes.
        let _ = process.read(address, page);
    }
}

impl Slot {
    /// The first byte of each chunk, and its length.
    fn chunks(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
        let starts = (0..bytes).step_by(CHUNK);
        starts.map(move |at| (at, (bytes - at).min(CHUNK as u64) as usize))
    }

    /// Notes how the memory is, zeros where it is not there.
    fn look(&mut self, process: &dyn Process) {
        let mut seen = BTreeMap::new();
        let mut buffer = vec![0; CHUNK];
        for (at, len) in Self::chunks(self.bytes) {
            let now = &mut buffer[..len];
            now.fill(0);
            read_there(process, self.address.wrapping_add(at), now);
            if *now != ZEROS[..len] {
                seen.insert(at, now.to_vec());
            }
        }
        self.seen = Some(seen);
    }

    /// What changed since the last look. Pages that are not there any more have not.
    fn changes(&mut self, process: &dyn Process, found: &mut Vec<Change>) {
        let Some(seen) = &mut self.seen else { return };
        let mut buffer = vec![0; CHUNK];
        for (at, len) in Self::chunks(self.bytes) {
            let now = &mut buffer[..len];
            let old = seen.get(&at).map_or(&ZEROS[..len], Vec::as_slice);
            now.copy_from_slice(old);
            read_there(process, self.address.wrapping_add(at), now);
            if now == old {
                continue;
            }
            let runs = changes(old, now).into_iter();
            found.extend(runs.map(|(from, bytes)| (self.ordinal, at + from as u64, bytes)));
            seen.insert(at, now.to_vec());
        }
    }
}

impl Slots {
    /// A call is about to set a slot of a VM. If its guest runs, it may write there before the call ends: the memory is looked
    /// at now. Otherwise the first run does, as what the program writes in front of it is no change.
    pub(super) fn begin(
        &mut self,
        vm: u32,
        (_, address, bytes): (u32, u64, u64),
        process: &dyn Process,
        runs: bool,
    ) {
        let mut slot = Slot {
            ordinal: 0,
            address,
            bytes,
            seen: None,
        };
        let is_possible =
            bytes / PAGE as u64 <= SLOT_MAX_PAGES && address.checked_add(bytes).is_some();
        if runs && is_possible {
            slot.look(process);
        }
        self.coming.insert(thread::current().id(), (vm, slot));
    }

    /// The call was refused.
    pub(super) fn refused(&mut self) {
        self.coming.remove(&thread::current().id());
    }

    /// The call that [began](Self::begin) set the slot, or deleted it. Returns what the guest of a VM that runs wrote to one
    /// that was deleted.
    pub(super) fn set(
        &mut self,
        vm: u32,
        (number, _, bytes): (u32, u64, u64),
        process: &dyn Process,
        runs: bool,
    ) -> Vec<Change> {
        let ordinal = self.next;
        self.next += 1;
        let mut left = Vec::new();
        let coming = self.coming.remove(&thread::current().id());
        let old = self.slots.remove(&(vm, number));
        match (coming, old) {
            (_, Some(mut old)) if bytes == 0 && runs => old.changes(process, &mut left),
            (Some((_, slot)), old) if bytes != 0 => {
                // A slot that exists keeps its memory.
                let seen = old.and_then(|old| old.seen).or(slot.seen);
                let slot = Slot {
                    ordinal,
                    seen,
                    ..slot
                };
                self.slots.insert((vm, number), slot);
            }
            _ => {}
        }
        left
    }

    /// The slot of a VM that has an address of the process: its ordinal, and the offset.
    pub(super) fn find(&self, vm: u32, address: u64) -> Option<(u32, u64)> {
        let mut slots = self.slots.range((vm, 0)..=(vm, u32::MAX));
        slots.find_map(|(_, slot)| {
            let offset = address.checked_sub(slot.address)?;
            (offset < slot.bytes).then_some((slot.ordinal, offset))
        })
    }

    /// A VM ended.
    pub(super) fn forget(&mut self, vm: u32) {
        self.slots.retain(|(of, _), _| *of != vm);
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.slots.len()
    }

    fn of_vm(&mut self, vm: u32) -> impl Iterator<Item = &mut Slot> {
        let slots = self.slots.range_mut((vm, 0)..=(vm, u32::MAX));
        slots.map(|(_, slot)| slot)
    }

    /// Looks at slots that are new, in front of a run.
    pub(super) fn look_at_new(&mut self, vm: u32, process: &dyn Process) {
        for slot in self.of_vm(vm).filter(|slot| slot.seen.is_none()) {
            slot.look(process);
        }
        let coming = self.coming.values_mut().filter(|(of, _)| *of == vm);
        for (_, slot) in coming.filter(|(_, slot)| slot.seen.is_none()) {
            slot.look(process);
        }
    }

    /// What changed in the slots of a VM since the last look.
    pub(super) fn changes(&mut self, vm: u32, process: &dyn Process) -> Vec<Change> {
        let mut found = Vec::new();
        for slot in self.of_vm(vm) {
            slot.changes(process, &mut found);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Task;

    #[test]
    fn what_changes_beside_pages_that_are_not_there_is_found() {
        const PAGES: usize = 3;
        let task = Task::new();
        let at = task.map(PAGES * PAGE);
        let mut slot = Slot {
            ordinal: 7,
            address: at,
            // The last page of it was never there.
            bytes: ((PAGES + 1) * PAGE) as u64,
            seen: None,
        };
        slot.look(&task);
        for page in 0..PAGES {
            task.write(at + (page * PAGE + page) as u64, &[1 + page as u8])
                .unwrap();
        }
        let mut found = Vec::new();
        slot.changes(&task, &mut found);
        let expected: Vec<Change> = (0..PAGES)
            .map(|page| (7, (page * PAGE + page) as u64, vec![1 + page as u8]))
            .collect();
        assert_eq!(found, expected);
        found.clear();
        slot.changes(&task, &mut found);
        assert_eq!(found, []);
    }
}
