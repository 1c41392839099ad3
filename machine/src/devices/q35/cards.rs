//! Devices in the slots of the PCI bus, beside the functions of the chipset.
#![cfg_attr(
    not(feature = "virtio"),
    expect(dead_code, reason = "all cards are virtio devices")
)]

use std::sync::{Mutex, PoisonError};

use kvm_ops::{Gpa, Msi};

use crate::Inside;

/// The slots that take cards, as device numbers.
pub(super) const FIRST_SLOT: u16 = 1;
pub(super) const SLOTS: u16 = 8;
/// The input of the I/O APIC to which the first slot's INTA leads. Each slot has one for itself.
pub(super) const FIRST_LINE: u32 = 16;

/// An interrupt that a card asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// A message.
    Message(Msi),
    /// The level of INTA.
    Line(bool),
}

/// The machine for the time of an access, and the interrupts to which the access leads.
pub(super) struct Access<'a> {
    pub(super) machine: &'a dyn Inside,
    pub(super) signals: Vec<Signal>,
}

/// A PCI function with a range of memory.
pub(super) trait Card: Send {
    /// Answers a read of configuration space.
    fn config_read(&mut self, at: usize, data: &mut [u8], access: &mut Access<'_>);
    /// Takes a write to configuration space.
    fn config_write(&mut self, at: usize, data: &[u8], access: &mut Access<'_>);
    /// The offset of an address in the card's memory; `None` where the card does not answer.
    fn offset(&self, gpa: Gpa) -> Option<u64>;
    /// Answers a read of the card's memory.
    fn read(&mut self, offset: u64, data: &mut [u8], access: &mut Access<'_>);
    /// Takes a write to the card's memory.
    fn write(&mut self, offset: u64, data: &[u8], access: &mut Access<'_>);
    /// Takes what is typed on it. Returns how many bytes it takes.
    fn type_in(&mut self, input: &[u8], access: &mut Access<'_>) -> usize;
}

/// The target of an access.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// A bus, device and function number, and an offset in the configuration space.
    Config(u16, usize),
    /// Memory without RAM.
    Memory(Gpa),
}

/// The cards in the slots, from the first slot on.
#[derive(Default)]
pub(super) struct Cards(Vec<Mutex<Box<dyn Card>>>);

impl Cards {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts a card into the next slot, and returns its number among the cards; `None` if there is none.
    pub(super) fn plug(&mut self, card: Box<dyn Card>) -> Option<usize> {
        let number = self.0.len();
        (number < usize::from(SLOTS)).then(|| {
            self.0.push(Mutex::new(card));
            number
        })
    }

    /// Types on a card. Returns how many bytes it takes, the line of its INTA, and the interrupts.
    pub(super) fn type_in(
        &self,
        number: usize,
        input: &[u8],
        machine: &dyn Inside,
    ) -> Option<(usize, u32, Vec<Signal>)> {
        let mut access = Access {
            machine,
            signals: Vec::new(),
        };
        let card = self.0.get(number)?;
        // No panic happens under the lock.
        let taken = card
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .type_in(input, &mut access);
        Some((taken, FIRST_LINE + number as u32, access.signals))
    }

    /// Hands an access to the card that it is for. Returns the interrupts, and the line of the card's INTA; `None` if no
    /// card is there.
    pub(super) fn access(
        &self,
        target: Target,
        write: bool,
        data: &mut [u8],
        machine: &dyn Inside,
    ) -> Option<(u32, Vec<Signal>)> {
        let mut access = Access {
            machine,
            signals: Vec::new(),
        };
        for (card, (slot, line)) in self.0.iter().zip((FIRST_SLOT..).zip(FIRST_LINE..)) {
            // No panic happens under the lock.
            let mut card = card.lock().unwrap_or_else(PoisonError::into_inner);
            match target {
                Target::Config(function, at) if function == slot << 3 => match write {
                    false => card.config_read(at, data, &mut access),
                    true => card.config_write(at, data, &mut access),
                },
                Target::Memory(gpa) => match (card.offset(gpa), write) {
                    (Some(offset), false) => card.read(offset, data, &mut access),
                    (Some(offset), true) => card.write(offset, data, &mut access),
                    (None, _) => continue,
                },
                Target::Config(..) => continue,
            }
            return Some((line, access.signals));
        }
        None
    }
}
