//! The memory of slots, piece by piece.

use kvm_ops::{Gfn, Gpa, HostRange, MemSlot, Privacy, SlotFlags, SlotId};
use kvm_ops_mmu::Attributes;

use super::Machine;
use crate::refusal::Result;
use crate::vm::{Slot, Slots};

const PAGE: u64 = 4096;
/// Guest addresses of the software machine end here.
const END: u64 = 1 << 48;

/// Part of a slot, and the memory behind it.
struct Piece {
    gpa: u64,
    host: HostRange,
}

/// The part of a range of host memory that starts `offset` bytes in. `None` if it is not inside.
fn part(of: Option<HostRange>, offset: u64, bytes: u64) -> Option<HostRange> {
    let of = of?;
    of.part(offset, bytes)
}

/// The pieces of a slot that have memory.
fn pieces<'a>(slot: &'a Slot, attributes: &'a Attributes) -> impl Iterator<Item = Piece> + 'a {
    let runs = attributes.runs(Gfn::new(slot.gpa / PAGE), slot.pages());
    let runs = runs.into_iter().flatten();
    runs.filter_map(move |(first, pages, privacy)| {
        let gpa = first.get() * PAGE;
        let bytes = pages * PAGE;
        let host = part(slot.memory(privacy), gpa - slot.gpa, bytes)?;
        (gpa + bytes <= END).then_some(Piece { gpa, host })
    })
}

impl Machine {
    /// Lends a slot, or what changed of it.
    pub(crate) fn lend(&mut self, slot: &Slot, attributes: &Attributes) -> Result<()> {
        let flags = SlotFlags {
            read_only: slot.is_read_only(),
            log_dirty: slot.logs_dirty(),
        };
        let wanted: Vec<Piece> = pieces(slot, attributes).collect();
        let is_wanted = |old: &MemSlot| {
            let gpa = old.gpa.get();
            let at = wanted.binary_search_by_key(&gpa, |piece| piece.gpa);
            at.is_ok_and(|at| wanted[at].host == old.host)
        };
        // What goes is missing before: without a slot, an access would leave as one to a device.
        self.declare(slot, attributes, Option::is_some);
        let range = slot.gpa..=slot.last();
        let old = self.pieces.range(range).map(|(_, old)| *old);
        let stale: Vec<MemSlot> = old.filter(|old| !is_wanted(old)).collect();
        for piece in stale {
            self.give_back(&piece)?;
        }
        for Piece { gpa, host } in wanted {
            let id = match self.pieces.get(&gpa) {
                Some(same) if same.flags == flags => continue,
                Some(same) => same.id,
                None => self.number(),
            };
            let piece = MemSlot {
                flags,
                ..MemSlot::new(id, Gpa::new(gpa), host)
            };
            self.vm.set_memory_slot(piece)?;
            self.pieces.insert(gpa, piece);
        }
        self.declare(slot, attributes, Option::is_none);
        Ok(())
    }

    /// Takes a slot back.
    pub(crate) fn take_back(&mut self, slot: &Slot, attributes: &Attributes) -> Result<()> {
        let range = slot.gpa..=slot.last();
        let old: Vec<MemSlot> = self.pieces.range(range).map(|(_, old)| *old).collect();
        for piece in old {
            self.give_back(&piece)?;
        }
        self.declare_range(slot.gpa / PAGE, slot.pages(), attributes);
        Ok(())
    }

    /// The attributes of a range changed.
    pub(crate) fn convert(
        &mut self,
        (first, pages): (u64, u64),
        slots: &Slots,
        attributes: &Attributes,
    ) -> Result<()> {
        self.declare_range(first, pages, attributes);
        let last = (first + (pages - 1)).saturating_mul(PAGE);
        let met = |slot: &&Slot| slot.gpa <= last && slot.last() / PAGE >= first;
        let lent = slots.iter().filter(|(number, _)| number >> 16 == 0);
        for slot in lent.map(|(_, slot)| slot).filter(met) {
            self.lend(slot, attributes)?;
        }
        Ok(())
    }

    fn give_back(&mut self, piece: &MemSlot) -> Result<()> {
        self.vm.delete_memory_slot(piece.id)?;
        self.pieces.remove(&piece.gpa.get());
        self.free.push(piece.id);
        Ok(())
    }

    fn number(&mut self) -> SlotId {
        self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            SlotId(self.next)
        })
    }

    /// Frames that are private by their attribute fault where no slot has private memory for them.
    fn declare_range(&self, first: u64, pages: u64, attributes: &Attributes) {
        let runs = attributes.runs(Gfn::new(first), pages);
        for (first, pages, privacy) in runs.into_iter().flatten() {
            let kind = (privacy == Privacy::Private).then_some(Privacy::Private);
            self.set_missing(first, pages, kind);
        }
    }

    /// So do all frames of a slot whose memory is not there. Declares those that are missing, or those that are not.
    fn declare(
        &self,
        slot: &Slot,
        attributes: &Attributes,
        which: impl Fn(&Option<Privacy>) -> bool,
    ) {
        let runs = attributes.runs(Gfn::new(slot.gpa / PAGE), slot.pages());
        for (first, pages, privacy) in runs.into_iter().flatten() {
            let has_memory = slot.memory(privacy).is_some();
            let kind = (!has_memory || privacy == Privacy::Private).then_some(privacy);
            if which(&kind) {
                self.set_missing(first, pages, kind);
            }
        }
    }
}
