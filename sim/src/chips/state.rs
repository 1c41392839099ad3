//! The registers of the chips, as whoever saves and loads them has them.

use super::Chips;

/// One of the two 8259A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a bit of the chip")]
pub struct PicState {
    /// Levels of the inputs.
    pub lines: u8,
    /// Requests.
    pub irr: u8,
    /// Masks.
    pub imr: u8,
    /// Interrupts in service.
    pub isr: u8,
    /// Level-triggered inputs. Those that are always edges are dropped when it is loaded.
    pub elcr: u8,
    /// The vector of input 0, a multiple of 8.
    pub base: u8,
    /// The input of the highest priority, 0 to 7.
    pub first: u8,
    /// The word that the next write to the data port is: 0 the masks, 1 to 3 ICW2 to ICW4.
    pub expects: u8,
    /// ICW1 asked for ICW4.
    pub wants_icw4: bool,
    /// Interrupts end when they are taken.
    pub auto_eoi: bool,
    /// Priorities rotate then.
    pub rotates: bool,
    /// The command port reads the interrupts in service, not the requests.
    pub reads_isr: bool,
    /// The next read is a poll.
    pub polls: bool,
    /// Masked interrupts in service hold none back.
    pub special_mask: bool,
}

/// The I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApicState {
    /// The identification register: bits 27 to 24.
    pub id: u32,
    /// The register that the window shows.
    pub selected: u8,
    /// The inputs that are high, a bit each.
    pub lines: u32,
    /// The redirection table.
    pub entries: [u64; 24],
}

/// A channel of the 8254.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PitChannelState {
    /// 0 to 5.
    pub mode: u8,
    /// The bytes of a count that are read and written: 1 the low one, 2 the high one, 3 both.
    pub bytes: u8,
    /// The count is decimal.
    pub bcd: bool,
    /// The first byte of two that was written.
    pub low: Option<u8>,
    /// The next byte that is read is the second one.
    pub reads_high: bool,
    /// A count that was latched.
    pub latched: Option<u16>,
    /// A status that was latched.
    pub status: Option<u8>,
    /// The count from which the channel counts, 1 to 65536.
    pub loaded: Option<u32>,
    /// The level of the gate.
    pub gate: bool,
}

/// The 8254, and the bits of port 0x61.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PitState {
    /// Its channels.
    pub channels: [PitChannelState; 3],
    /// The speaker is connected.
    pub speaker: bool,
    /// Another timer has the place of channel 0, whose output leads nowhere.
    pub replaced: bool,
}

impl Chips {
    /// Reads the registers of an 8259A.
    pub(crate) fn pic_state(&self, second: bool) -> PicState {
        self.pic.save(second)
    }

    pub(crate) fn set_pic_state(&mut self, second: bool, state: &PicState) {
        self.told = false;
        self.pic.load(second, state);
    }

    pub(crate) fn ioapic_state(&self) -> IoApicState {
        self.ioapic.save()
    }

    pub(crate) fn set_ioapic_state(&mut self, state: &IoApicState) {
        self.ioapic.load(state);
    }

    pub(crate) fn pit_state(&self) -> PitState {
        self.pit.save()
    }

    pub(crate) fn set_pit_state(&mut self, state: &PitState, now: u64) {
        self.pit.load(state, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chips::Pin;
    use crate::processor::To;

    /// The words of a PC's firmware, and a count for the timer.
    fn chips() -> Chips {
        let mut chips = Chips::default();
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 1),
            (0x21, 0xfb),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0x4d1, 0xff),
            (0x43, 0x34),
            (0x40, 0xe8),
            (0x40, 0x03),
            (0x61, 2),
        ] {
            assert!(chips.port_out(port, 1, value, 0));
        }
        chips
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let mut from = chips();
        from.set_pin(Pin::Pic(9), 0, true);
        let mut to = Chips::default();
        let both = |chips: &Chips| [false, true].map(|second| chips.pic_state(second));
        for (second, state) in [false, true].into_iter().zip(both(&from)) {
            to.set_pic_state(second, &state);
        }
        assert_eq!(both(&to), both(&from));
        assert_eq!(
            from.pic_state(true).expects,
            2,
            "in the middle of its start"
        );
        assert_eq!(from.pic_state(true).elcr, 0xde);
        let pit = from.pit_state();
        to.set_pit_state(&pit, 5000);
        assert_eq!(to.pit_state(), pit);
        assert_eq!(pit.channels[0].loaded, Some(1000));
        let next = |chips: &Chips| chips.pit.next().unwrap();
        assert_eq!(next(&to), next(&from) + 5000, "the count begins again");
        let replaced = PitState {
            replaced: true,
            ..pit
        };
        to.set_pit_state(&replaced, 5000);
        assert_eq!(to.pit.next(), None);
    }

    #[test]
    fn an_input_that_was_high_interrupts_when_it_is_loaded() {
        let mut chips = Chips::default();
        let mut state = chips.ioapic_state();
        state.entries[3] = 0x41 | 2 << 56;
        state.lines = 1 << 3;
        chips.set_ioapic_state(&state);
        assert_eq!(chips.ioapic_state(), state);
        let to = To::Named {
            destination: 2,
            logical: false,
        };
        assert!(
            matches!(chips.take_messages()[..], [sent] if sent.vector == 0x41 && sent.to == to)
        );
    }
}
