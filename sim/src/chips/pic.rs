//! The pair of 8259A interrupt controllers of a PC (Intel 8259A data sheet), with the edge/level
//! registers of EISA.

use super::{PicState, Took};

/// The input of the first controller to which the second one is connected.
const CASCADE: u8 = 2;
/// The input that a controller reports if its interrupt is gone when it is acknowledged.
const SPURIOUS: u8 = 7;

/// The inputs of each that may be level-triggered. The timer, the keyboard and the cascade are edges; so are
/// the clock and the FPU.
pub(super) const ELCR: [u8; 2] = [0xf8, 0xde];

/// What the next write to the data port is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expects {
    #[default]
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Debug, Default)]
struct Controller {
    /// The levels of the inputs.
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    /// Level-triggered inputs.
    elcr: u8,
    /// The vector of input 0.
    base: u8,
    /// The input of the highest priority.
    first: u8,
    expects: Expects,
    wants_icw4: bool,
    cascaded: bool,
    auto_eoi: bool,
    rotates: bool,
    reads_isr: bool,
    polls: bool,
    special_mask: bool,
}

impl Controller {
    fn set_line(&mut self, input: u8, high: bool) -> Took {
        let bit = 1 << input;
        let (was, waits) = (self.lines & bit != 0, self.irr & bit != 0);
        self.lines = self.lines & !bit | u8::from(high) << input;
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | u8::from(high) << input;
        } else if high && !was {
            // The request stays when the line falls, as in KVM and QEMU.
            self.irr |= bit;
        }
        // An edge-triggered input that stays high asks for nothing, which KVM takes.
        let asks = high && (self.elcr & bit != 0 || !was);
        match self.imr & bit {
            0 if asks && waits => Took::Merged,
            0 => Took::Taken,
            _ => Took::Masked,
        }
    }

    /// The input of the highest priority among these, counted from `first`.
    fn highest(&self, inputs: u8) -> Option<u8> {
        (0..8)
            .map(|n| (self.first + n) & 7)
            .find(|input| inputs >> input & 1 != 0)
    }

    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.first) & 7
    }

    /// The input whose interrupt is due: above everything in service.
    fn due(&self) -> Option<u8> {
        let input = self.highest(self.irr & !self.imr)?;
        let served = match self.special_mask {
            true => self.isr & !self.imr,
            false => self.isr,
        };
        let above = |served| self.rank(input) < self.rank(served);
        self.highest(served).is_none_or(above).then_some(input)
    }

    /// The interrupt is taken.
    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotates {
            self.first = (input + 1) & 7;
        }
    }

    fn command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            *self = Self {
                lines: self.lines,
                elcr: self.elcr,
                expects: Expects::Icw2,
                wants_icw4: value & 1 != 0,
                cascaded: value & 2 == 0,
                ..Self::default()
            };
        } else if value & 8 != 0 {
            match value & 3 {
                2 => self.reads_isr = false,
                3 => self.reads_isr = true,
                _ => {}
            }
            self.polls = value & 4 != 0;
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.end(value);
        }
    }

    /// The second operation command word: ends of interrupts and priorities.
    fn end(&mut self, value: u8) {
        let (rotate, specific, eoi) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        let input = match specific {
            true => Some(value & 7),
            false => self.highest(self.isr),
        };
        match (eoi, input) {
            (true, Some(input)) => {
                self.isr &= !(1 << input);
                if rotate {
                    self.first = (input + 1) & 7;
                }
            }
            (false, Some(input)) if rotate && specific => self.first = (input + 1) & 7,
            (false, _) if !specific => self.rotates = rotate,
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        let icw4 = match self.wants_icw4 {
            true => Expects::Icw4,
            false => Expects::Mask,
        };
        self.expects = match self.expects {
            Expects::Mask => {
                self.imr = value;
                Expects::Mask
            }
            Expects::Icw2 => {
                self.base = value & 0xf8;
                match self.cascaded {
                    true => Expects::Icw3,
                    false => icw4,
                }
            }
            Expects::Icw3 => icw4,
            Expects::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                Expects::Mask
            }
        };
    }

    fn read_command(&mut self) -> u8 {
        if std::mem::take(&mut self.polls) {
            return match self.due() {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match self.reads_isr {
            true => self.isr,
            false => self.irr,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Pic([Controller; 2]);

impl Pic {
    /// Sets one of the lines 0 to 15.
    pub(crate) fn set_line(&mut self, line: u8, high: bool) -> Took {
        let took = self.0[usize::from(line >> 3 & 1)].set_line(line & 7, high);
        self.cascade();
        took
    }

    /// The output of the second controller is an input of the first.
    fn cascade(&mut self) {
        let [first, second] = &mut self.0;
        let due = u8::from(second.due().is_some());
        first.irr = first.irr & !(1 << CASCADE) | due << CASCADE;
    }

    /// True if the processor is asked for attention (INTR).
    pub(crate) fn interrupts(&self) -> bool {
        self.0[0].due().is_some()
    }

    /// True if the line is masked.
    pub(crate) fn masks(&self, line: u8) -> bool {
        self.0[usize::from(line >> 3 & 1)].imr >> (line & 7) & 1 != 0
    }

    /// The vector of the interrupt that the processor takes (INTA).
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let [first, second] = &mut self.0;
        let vector = match first.due() {
            Some(CASCADE) => {
                first.acknowledge(CASCADE);
                let input = second.due();
                if let Some(input) = input {
                    second.acknowledge(input);
                }
                second.base | input.unwrap_or(SPURIOUS)
            }
            Some(input) => {
                first.acknowledge(input);
                first.base | input
            }
            None => first.base | SPURIOUS,
        };
        self.cascade();
        vector
    }

    /// The inputs whose interrupts are in service, a bit each.
    pub(super) fn in_service(&self) -> u16 {
        let [first, second] = self.0.each_ref().map(|controller| controller.isr);
        u16::from(first) | u16::from(second) << 8
    }

    /// The registers of the first controller or the second.
    pub(super) fn save(&self, second: bool) -> PicState {
        let from = &self.0[usize::from(second)];
        PicState {
            lines: from.lines,
            irr: from.irr,
            imr: from.imr,
            isr: from.isr,
            elcr: from.elcr,
            base: from.base,
            first: from.first,
            expects: match from.expects {
                Expects::Mask => 0,
                Expects::Icw2 => 1,
                Expects::Icw3 => 2,
                Expects::Icw4 => 3,
            },
            wants_icw4: from.wants_icw4,
            auto_eoi: from.auto_eoi,
            rotates: from.rotates,
            reads_isr: from.reads_isr,
            polls: from.polls,
            special_mask: from.special_mask,
        }
    }

    /// Loads them. Numbers that there are not count as their lowest bits.
    pub(super) fn load(&mut self, second: bool, from: &PicState) {
        self.0[usize::from(second)] = Controller {
            lines: from.lines,
            irr: from.irr,
            imr: from.imr,
            isr: from.isr,
            elcr: from.elcr & ELCR[usize::from(second)],
            base: from.base & 0xf8,
            first: from.first & 7,
            expects: match from.expects & 3 {
                0 => Expects::Mask,
                1 => Expects::Icw2,
                2 => Expects::Icw3,
                _ => Expects::Icw4,
            },
            wants_icw4: from.wants_icw4,
            // In a PC they are two.
            cascaded: true,
            auto_eoi: from.auto_eoi,
            rotates: from.rotates,
            reads_isr: from.reads_isr,
            polls: from.polls,
            special_mask: from.special_mask,
        };
        self.cascade();
    }

    pub(crate) fn read(&mut self, port: u16) -> Option<u8> {
        let controller = usize::from(port & 0x80 != 0);
        let value = match port {
            0x20 | 0xa0 => self.0[controller].read_command(),
            0x21 | 0xa1 => self.0[controller].imr,
            0x4d0 | 0x4d1 => self.0[usize::from(port & 1)].elcr,
            _ => return None,
        };
        self.cascade();
        Some(value)
    }

    /// Returns false for a port of another device.
    pub(crate) fn write(&mut self, port: u16, value: u8) -> bool {
        let controller = usize::from(port & 0x80 != 0);
        match port {
            0x20 | 0xa0 => self.0[controller].command(value),
            0x21 | 0xa1 => self.0[controller].data(value),
            0x4d0 => self.0[0].elcr = value & ELCR[0],
            0x4d1 => self.0[1].elcr = value & ELCR[1],
            _ => return false,
        }
        self.cascade();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As PC firmware leaves it: vectors 0x20 and 0x28, nothing masked.
    fn pic() -> Pic {
        let mut pic = Pic::default();
        for (port, words) in [(0x20, [0x11, 0x20, 4, 1]), (0xa0, [0x11, 0x28, 2, 1])] {
            assert!(pic.write(port, words[0]));
            for word in &words[1..] {
                assert!(pic.write(port | 1, *word));
            }
        }
        pic
    }

    #[test]
    fn interrupts_come_by_priority_and_wait_for_the_end_of_higher_ones() {
        let mut pic = pic();
        assert!(!pic.interrupts());
        for line in [5, 9, 1] {
            pic.set_line(line, true);
        }
        assert_eq!(pic.acknowledge(), 0x21);
        assert!(!pic.interrupts(), "1 is in service");
        assert!(pic.write(0x20, 0x20));
        assert_eq!(pic.acknowledge(), 0x29);
        assert!(!pic.interrupts(), "the cascade is in service");
        // A specific end of each.
        assert!(pic.write(0xa0, 0x61) && pic.write(0x20, 0x62));
        assert_eq!(pic.acknowledge(), 0x25);
        assert_eq!(pic.acknowledge(), 0x27, "spurious");
    }

    #[test]
    fn an_edge_comes_once_and_a_level_until_it_falls() {
        let mut pic = pic();
        assert!(pic.write(0x4d0, 0x20));
        for line in [4, 5] {
            pic.set_line(line, true);
        }
        assert_eq!(pic.acknowledge(), 0x24);
        assert!(pic.write(0x20, 0x20));
        for _ in 0..3 {
            assert_eq!(pic.acknowledge(), 0x25);
            assert!(pic.write(0x20, 0x20));
        }
        pic.set_line(5, false);
        assert!(!pic.interrupts());
    }

    #[test]
    fn masks_hold_back_and_registers_read_back() {
        let mut pic = pic();
        assert!(pic.write(0x21, 0xfe) && pic.masks(1) && !pic.masks(0));
        pic.set_line(1, true);
        assert!(!pic.interrupts());
        assert_eq!((pic.read(0x21), pic.read(0x20)), (Some(0xfe), Some(2)));
        assert!(pic.write(0x21, 0));
        assert_eq!(pic.acknowledge(), 0x21);
        assert!(pic.write(0x20, 0x0b));
        assert_eq!(pic.read(0x20), Some(2), "in service");
        assert!(pic.write(0x20, 0x0c));
        assert_eq!(pic.read(0x20), Some(0), "a poll finds nothing");
        assert_eq!((pic.read(0x22), pic.write(0x22, 0)), (None, false));
    }
}
