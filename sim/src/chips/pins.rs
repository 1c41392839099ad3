//! Inputs of the interrupt controllers, which several sources may hold high.

use super::{Chips, PIC_LINES};

/// An input of an interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pin {
    /// Inputs 0 to 7 of the first 8259A, 8 to 15 are those of the second.
    Pic(u8),
    /// Inputs 0 to 23 of the I/O APIC.
    IoApic(u8),
}

/// What became of a new level of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Took {
    /// Nothing: the input is masked, or there is none.
    Masked,
    /// The last interrupt of the input waits still, and this is the same.
    Merged,
    /// The controller took it. A low level is always taken.
    Taken,
}

/// The source of lines with a number.
pub(super) const LINE: u8 = 0;
/// The source of the timer.
pub(super) const TIMER: u8 = 7;

/// The sources that hold each input high, a bit each.
#[derive(Debug, Default)]
pub(super) struct Levels {
    pic: [u8; 16],
    ioapic: [u8; 24],
}

impl Levels {
    /// Sets the level of a source. Returns the level of the input; `None` for one that there is not.
    fn set(&mut self, pin: Pin, source: u8, high: bool) -> Option<bool> {
        let sources = match pin {
            Pin::Pic(input) => self.pic.get_mut(usize::from(input)),
            Pin::IoApic(input) => self.ioapic.get_mut(usize::from(input)),
        }?;
        let bit = 1 << (source & 7);
        *sources = *sources & !bit | if high { bit } else { 0 };
        Some(*sources != 0)
    }
}

impl Chips {
    /// Sets the level of an input, as one of 8 sources has it: the input is high if one of them is.
    pub(crate) fn set_pin(&mut self, pin: Pin, source: u8, high: bool) -> Took {
        match (pin, self.levels.set(pin, source, high)) {
            (Pin::Pic(input), Some(high)) => self.pic.set_line(input, high),
            (Pin::IoApic(input), Some(high)) => self.ioapic.set_line(input, high),
            (_, None) => Took::Masked,
        }
    }

    /// Makes the timer drive these inputs.
    pub(crate) fn set_timer_pins(&mut self, pins: Vec<Pin>) {
        self.timer = Some(pins);
    }

    /// True if a rise of the input would interrupt.
    pub(super) fn hears(&self, pin: Pin) -> bool {
        match pin {
            Pin::Pic(input) => input < PIC_LINES && !self.pic.masks(input),
            Pin::IoApic(input) => !self.ioapic.masks(input),
        }
    }

    /// The inputs of the I/O APIC whose interrupt is about to end.
    pub(crate) fn ending(&self, vector: u8) -> Vec<Pin> {
        self.ioapic.served(vector).map(Pin::IoApic).collect()
    }

    /// The inputs of the 8259A pair whose interrupt ended since the last call.
    pub(crate) fn take_ended(&mut self) -> impl Iterator<Item = Pin> + use<> {
        let ended = std::mem::take(&mut self.ended);
        let inputs = (0..PIC_LINES).filter(move |input| ended >> input & 1 != 0);
        inputs.map(Pin::Pic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_ends_that_are_not_asked_for_take_no_more_room_than_one() {
        let mut chips = Chips::default();
        // The start of the first controller, which ends its interrupts by commands.
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)] {
            assert!(chips.port_out(port, 1, value, 0));
        }
        for n in 0..1_000_000 {
            let (input, vector) = [(0, 0x20), (5, 0x25)][n % 2];
            chips.set_pin(Pin::Pic(input), LINE, true);
            assert_eq!(chips.acknowledge(), vector);
            assert!(chips.port_out(0x20, 1, 0x20, 0));
            chips.set_pin(Pin::Pic(input), LINE, false);
        }
        let ended: Vec<Pin> = chips.take_ended().collect();
        assert_eq!(ended, [Pin::Pic(0), Pin::Pic(5)]);
        assert_eq!(chips.take_ended().count(), 0);
    }

    #[test]
    fn an_input_is_high_while_one_of_its_sources_is() {
        let mut levels = Levels::default();
        let pin = Pin::IoApic(23);
        assert_eq!(levels.set(pin, 0, true), Some(true));
        assert_eq!(levels.set(pin, 1, true), Some(true));
        assert_eq!(levels.set(pin, 0, false), Some(true));
        assert_eq!(levels.set(Pin::Pic(15), 1, false), Some(false));
        assert_eq!(levels.set(pin, 1, false), Some(false));
        assert_eq!(levels.set(Pin::IoApic(24), 0, true), None);
        assert_eq!(levels.set(Pin::Pic(16), 0, true), None);
    }
}
