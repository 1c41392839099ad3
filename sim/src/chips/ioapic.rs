//! The I/O APIC of a PC (Intel 82093AA data sheet).

use super::{IoApicState, Took};
use crate::processor::{Command, Kind, To};

/// The page of its registers.
pub(crate) const BASE: u64 = 0xfec0_0000;
const SELECT: u64 = 0;
const WINDOW: u64 = 0x10;

const PINS: usize = 24;
/// Version 0x11 with 24 redirection entries.
const VERSION: u32 = 0x11 | (PINS as u32 - 1) << 16;

/// The bits of the identification register.
const ID: u32 = 0x0f00_0000;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// The bits of a redirection entry that software cannot write: delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;

#[derive(Debug)]
pub(crate) struct IoApic {
    id: u32,
    selected: u8,
    lines: u32,
    entries: [u64; PINS],
    messages: Vec<Command>,
}

impl Default for IoApic {
    fn default() -> Self {
        Self {
            id: 0,
            selected: 0,
            lines: 0,
            entries: [MASKED; PINS],
            messages: Vec::new(),
        }
    }
}

impl IoApic {
    /// Sets one of the inputs 0 to 23.
    pub(crate) fn set_line(&mut self, pin: u8, high: bool) -> Took {
        let pin = usize::from(pin);
        let Some(entry) = self.entries.get(pin).copied() else {
            return Took::Masked;
        };
        let was = self.lines >> pin & 1 != 0;
        self.lines = self.lines & !(1 << pin) | u32::from(high) << pin;
        let waits = match entry & LEVEL {
            0 => was,
            _ => entry & REMOTE_IRR != 0,
        };
        if !high {
            return Took::Taken;
        }
        if waits {
            return Took::Merged;
        }
        match self.service(pin) {
            true => Took::Taken,
            false => Took::Masked,
        }
    }

    pub(crate) fn masks(&self, pin: u8) -> bool {
        let entry = self.entries.get(usize::from(pin));
        entry.is_none_or(|entry| entry & MASKED != 0)
    }

    /// Sends the message of a pin, unless it is masked or waits for the end of its last one: false then.
    fn service(&mut self, pin: usize) -> bool {
        let entry = &mut self.entries[pin];
        if *entry & (MASKED | REMOTE_IRR) != 0 {
            return false;
        }
        if *entry & LEVEL != 0 {
            *entry |= REMOTE_IRR;
        }
        self.messages.push(Command {
            kind: Kind::from_mode(*entry >> 8),
            vector: *entry as u8,
            level: *entry & LEVEL != 0,
            to: To::Named {
                destination: (*entry >> 56) as u32,
                logical: *entry & LOGICAL != 0,
            },
        });
        true
    }

    /// The pins whose level-triggered interrupt has that vector and waits for its end.
    pub(super) fn served(&self, vector: u8) -> impl Iterator<Item = u8> + '_ {
        let is = move |entry: &u64| *entry as u8 == vector && *entry & REMOTE_IRR != 0;
        (0..)
            .zip(&self.entries)
            .filter(move |(_, entry)| is(entry))
            .map(|(pin, _)| pin)
    }

    /// A processor ended the interrupt of that vector. A line that is still high comes again.
    pub(crate) fn end(&mut self, vector: u8) {
        for pin in 0..PINS {
            let entry = &mut self.entries[pin];
            if *entry as u8 == vector && *entry & REMOTE_IRR != 0 {
                *entry &= !REMOTE_IRR;
                if self.lines >> pin & 1 != 0 {
                    self.service(pin);
                }
            }
        }
    }

    /// The registers, and the inputs that are high.
    pub(super) fn save(&self) -> IoApicState {
        IoApicState {
            id: self.id,
            selected: self.selected,
            lines: self.lines,
            entries: self.entries,
        }
    }

    /// Loads the registers. Inputs that are high interrupt as if they rose.
    pub(super) fn load(&mut self, state: &IoApicState) {
        self.id = state.id & ID;
        self.selected = state.selected;
        self.lines = 0;
        self.entries = state.entries;
        for pin in (0..PINS as u8).filter(|pin| state.lines >> pin & 1 != 0) {
            self.set_line(pin, true);
        }
    }

    pub(crate) fn take_messages(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.messages)
    }

    /// Reads the register at that offset in the page.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        match (offset, self.selected) {
            (SELECT, selected) => selected.into(),
            (WINDOW, 0 | 2) => self.id,
            (WINDOW, 1) => VERSION,
            (WINDOW, n) => self
                .entry(n)
                .map_or(0, |(pin, shift)| (self.entries[pin] >> shift) as u32),
            _ => 0,
        }
    }

    pub(crate) fn write(&mut self, offset: u64, value: u32) {
        match (offset, self.selected) {
            (SELECT, _) => self.selected = value as u8,
            (WINDOW, 0) => self.id = value & ID,
            (WINDOW, n) => {
                if let Some((pin, shift)) = self.entry(n) {
                    self.write_entry(pin, shift, value);
                }
            }
            _ => {}
        }
    }

    /// The pin and the half that a register number names.
    fn entry(&self, register: u8) -> Option<(usize, u32)> {
        let n = usize::from(register.checked_sub(0x10)?);
        (n / 2 < PINS).then_some((n / 2, n as u32 % 2 * 32))
    }

    fn write_entry(&mut self, pin: usize, shift: u32, value: u32) {
        let mask = 0xffff_ffff_u64 << shift & !READ_ONLY;
        let entry = &mut self.entries[pin];
        *entry = *entry & !mask | u64::from(value) << shift & mask;
        if *entry & LEVEL == 0 {
            *entry &= !REMOTE_IRR;
        } else if self.lines >> pin & 1 != 0 {
            self.service(pin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ioapic: &mut IoApic, register: u8, value: u32) {
        ioapic.write(SELECT, register.into());
        ioapic.write(WINDOW, value);
    }

    fn get(ioapic: &mut IoApic, register: u8) -> u32 {
        ioapic.write(SELECT, register.into());
        ioapic.read(WINDOW)
    }

    #[test]
    fn edges_come_once_and_levels_until_their_end_finds_them_low() {
        let mut ioapic = IoApic::default();
        ioapic.set_line(4, true);
        assert!(ioapic.take_messages().is_empty(), "masked");
        ioapic.set_line(4, false);
        set(&mut ioapic, 0x19, 3 << 24);
        set(&mut ioapic, 0x18, 0x44);
        ioapic.set_line(4, true);
        ioapic.set_line(4, true);
        let to = To::Named {
            destination: 3,
            logical: false,
        };
        let sent = Command {
            kind: Some(Kind::Fixed),
            vector: 0x44,
            level: false,
            to,
        };
        assert_eq!(ioapic.take_messages(), [sent]);

        set(&mut ioapic, 0x1a, 0x45 | LEVEL as u32);
        ioapic.set_line(5, true);
        assert!(matches!(ioapic.take_messages()[..], [message] if message.level));
        assert_ne!(get(&mut ioapic, 0x1a) & REMOTE_IRR as u32, 0);
        ioapic.set_line(5, true);
        assert!(ioapic.take_messages().is_empty(), "not ended");
        ioapic.end(0x45);
        assert_eq!(ioapic.take_messages().len(), 1);
        ioapic.set_line(5, false);
        ioapic.end(0x45);
        assert!(ioapic.take_messages().is_empty());
        assert_eq!(get(&mut ioapic, 0x1a) & REMOTE_IRR as u32, 0);
    }

    #[test]
    fn registers_read_back_and_the_rest_is_zero() {
        let mut ioapic = IoApic::default();
        assert_eq!(get(&mut ioapic, 1), 0x0017_0011);
        set(&mut ioapic, 0, u32::MAX);
        assert_eq!(get(&mut ioapic, 0), 0x0f00_0000);
        for register in 0x10..0x40 {
            set(&mut ioapic, register, 0x0101_0030);
            assert_eq!(get(&mut ioapic, register), 0x0101_0030);
        }
        assert_eq!(get(&mut ioapic, 0x40), 0);
        assert_eq!(get(&mut ioapic, 0xff), 0);
        for pin in [24, 255] {
            ioapic.set_line(pin, true);
            assert!(ioapic.masks(pin));
        }
    }
}
