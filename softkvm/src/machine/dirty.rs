//! Dirty logs.

use kvm_ops::MemSlot;

use super::Machine;
use crate::refusal::Result;
use crate::vm::Slot;

const PAGE: u64 = 4096;

impl Machine {
    /// Moves what the guest wrote since the last call into the log of the slot.
    pub(crate) fn harvest(&self, slot: &Slot, log: &mut [u64]) -> Result<()> {
        let pieces = self.pieces.range(slot.gpa..=slot.last());
        for (_, piece) in pieces.filter(|(_, piece)| piece.flags.log_dirty) {
            self.harvest_piece(piece, (piece.gpa.get() - slot.gpa) / PAGE, log)?;
        }
        Ok(())
    }

    fn harvest_piece(&self, piece: &MemSlot, offset: u64, log: &mut [u64]) -> Result<()> {
        let mut bits = vec![0; piece.dirty_words()];
        self.vm.dirty_log(piece.id, &mut bits)?;
        for (word, bits) in (0..).zip(bits) {
            or(log, offset + word * 64, bits);
        }
        Ok(())
    }
}

/// Sets bits of a map from a place on. What lies outside is dropped.
fn or(map: &mut [u64], place: u64, bits: u64) {
    let (word, shift) = ((place / 64) as usize, place % 64);
    let parts = u128::from(bits) << shift;
    for (at, part) in [(word, parts as u64), (word + 1, (parts >> 64) as u64)] {
        if let Some(word) = map.get_mut(at) {
            *word |= part;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_land_at_their_place() {
        for place in 0..130 {
            for bit in 0..64 {
                let mut map = [0; 2];
                or(&mut map, place, 1 << bit);
                let expected = place + bit;
                let found = (0..128u64).filter(|at| map[*at as usize / 64] >> (at % 64) & 1 != 0);
                let expected: Vec<u64> = (expected < 128).then_some(expected).into_iter().collect();
                assert_eq!(found.collect::<Vec<_>>(), expected);
            }
        }
    }
}
