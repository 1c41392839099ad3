//! The memory of slots, and what changes in it.

use std::collections::BTreeMap;

use super::format::changes;
use crate::Process;

/// A slot of a VM, as the call set it.
struct Slot {
    /// The number of the call among all that set slots.
    ordinal: u32,
    address: u64,
    bytes: u64,
    /// The memory at the last look. `None` before the first run.
    seen: Option<Vec<u8>>,
}

/// The slots of all VMs, by the VM's file and the slot's number.
#[derive(Default)]
pub(super) struct Slots {
    slots: BTreeMap<(u32, u32), Slot>,
    next: u32,
}

/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;

/// A look at memory, zeros where it cannot be read.
fn look(process: &dyn Process, address: u64, bytes: u64) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(bytes).unwrap_or(0)];
    let chunks = all.chunks_mut(CHUNK as usize);
    for (address, chunk) in (address..).step_by(CHUNK as usize).zip(chunks) {
        if process.read(address, chunk).is_err() {
            chunk.fill(0);
        }
    }
    all
}

impl Slots {
    /// A call set a slot of a VM, or deleted it. Returns the call's number.
    pub(super) fn set(&mut self, vm: u32, (number, address, bytes): (u32, u64, u64)) -> u32 {
        let ordinal = self.next;
        self.next += 1;
        match bytes {
            0 => self.slots.remove(&(vm, number)),
            _ => self.slots.insert(
                (vm, number),
                Slot {
                    ordinal,
                    address,
                    bytes,
                    seen: None,
                },
            ),
        };
        ordinal
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
            slot.seen = Some(look(process, slot.address, slot.bytes));
        }
    }

    /// What changed since the last look: the slot's ordinal, offset and bytes.
    pub(super) fn changes(&mut self, vm: u32, process: &dyn Process) -> Vec<(u32, u64, Vec<u8>)> {
        let mut found = Vec::new();
        for slot in self.of_vm(vm) {
            let Some(seen) = &mut slot.seen else { continue };
            let mut chunk = Vec::new();
            for (at, old) in (0..)
                .step_by(CHUNK as usize)
                .zip(seen.chunks_mut(CHUNK as usize))
            {
                chunk.resize(old.len(), 0);
                let address = slot.address.wrapping_add(at);
                if process.read(address, &mut chunk).is_err() || chunk == old {
                    continue;
                }
                let ordinal = slot.ordinal;
                let runs = changes(old, &chunk).into_iter();
                found.extend(runs.map(|(from, bytes)| (ordinal, at + from as u64, bytes)));
                old.copy_from_slice(&chunk);
            }
        }
        found
    }
}
