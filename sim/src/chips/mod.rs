//! The interrupt controllers and the timer of a PC, which a VM with a full irqchip has in the
//! platform: as in KVM, line n is input n of the 8259A pair and of the I/O APIC, and the timer is line
//! 0.

mod ioapic;
mod pic;
mod pins;
mod pit;
mod state;

use std::collections::BTreeMap;

use crate::processor::{Access, Command};

pub use pins::{Pin, Took};
pub use state::{IoApicState, PicState, PitChannelState, PitState};

use ioapic::IoApic;
use pic::Pic;
use pit::Pit;

/// The line of the timer.
const TIMER: u8 = 0;
/// Lines that the 8259A pair has.
const PIC_LINES: u8 = 16;
/// Lines in all.
const LINES: u32 = 24;
const PAGE: u64 = 0x1000;

#[derive(Debug, Default)]
pub(crate) struct Chips {
    pic: Pic,
    pit: Pit,
    ioapic: IoApic,
    /// Lines that send a message in place of the controllers' inputs.
    routes: BTreeMap<u32, Route>,
    messages: Vec<Command>,
    /// The request of the 8259A pair was told.
    told: bool,
    levels: pins::Levels,
    parts: TimerParts,
    /// Inputs that the timer drives in place of line 0.
    timer: Option<Vec<Pin>>,
    /// Inputs of the 8259A pair whose interrupt ended since they were asked for, a bit each: only a VM with
    /// a hook for ends asks.
    ended: u16,
}

/// The parts of the timer that a VM has. All of them, unless it is told otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimerParts {
    /// The 8254, with its ports and its interrupt.
    pub timer: bool,
    /// Port 0x61, by which the speaker is switched.
    pub speaker: bool,
}

impl Default for TimerParts {
    fn default() -> Self {
        Self {
            timer: true,
            speaker: true,
        }
    }
}

impl TimerParts {
    /// True if a port belongs to a part that is there, or to none.
    const fn have(self, port: u16) -> bool {
        match port {
            0x40..=0x43 => self.timer,
            0x61 => self.speaker,
            _ => true,
        }
    }
}

#[derive(Debug)]
struct Route {
    command: Command,
    high: bool,
}

impl Chips {
    /// Reads a port. `None` for a port of other devices.
    pub(crate) fn port_in(&mut self, port: u16, size: u8, now: u64) -> Option<u32> {
        let mut value = 0;
        for n in (0..size).rev() {
            let port = port.checked_add(n.into())?;
            let byte = match self.pic.read(port) {
                Some(byte) => byte,
                None if !self.parts.have(port) => return None,
                None => self.pit.read(port, now)?,
            };
            value = value << 8 | u32::from(byte);
        }
        Some(value)
    }

    /// Writes a port. False for a port of other devices.
    pub(crate) fn port_out(&mut self, port: u16, size: u8, value: u32, now: u64) -> bool {
        let serving = self.pic.in_service();
        let done = (port..=u16::MAX)
            .zip(value.to_le_bytes())
            .take(size.into())
            .all(|(port, byte)| {
                self.pic.write(port, byte)
                    || self.parts.have(port) && self.pit.write(port, byte, now)
            });
        self.ended |= serving & !self.pic.in_service();
        done
    }

    /// Does an access to the I/O APIC. False for other devices.
    pub(crate) fn device(&mut self, access: &mut Access) -> bool {
        if access.gpa & !(PAGE - 1) != ioapic::BASE {
            return false;
        }
        let offset = access.gpa & (PAGE - 1);
        let mut word = [0; 4];
        if access.write {
            word.copy_from_slice(&access.data[..4]);
            self.ioapic.write(offset, u32::from_le_bytes(word));
        } else {
            access.data[..4].copy_from_slice(&self.ioapic.read(offset).to_le_bytes());
        }
        true
    }

    /// Sets a line that [leads](Self::leads) somewhere. One with a message sends it when it rises.
    pub(crate) fn set_line(&mut self, line: u32, high: bool) {
        if let Some(route) = self.routes.get_mut(&line) {
            if high && !route.high {
                self.messages.push(route.command);
            }
            route.high = high;
            return;
        }
        let line = line as u8;
        for pin in [Pin::Pic(line), Pin::IoApic(line)] {
            let _ = self.set_pin(pin, pins::LINE, high);
        }
    }

    /// True if the controllers have an input for the line, or it has a message.
    pub(crate) fn leads(&self, line: u32) -> bool {
        line < LINES || self.routes.contains_key(&line)
    }

    /// Makes a line send this message. The line's level stays.
    pub(crate) fn set_route(&mut self, line: u32, command: Command) {
        let high = self.routes.get(&line).is_some_and(|route| route.high);
        self.routes.insert(line, Route { command, high });
    }

    pub(crate) fn set_timer_parts(&mut self, parts: TimerParts) {
        self.parts = parts;
    }

    /// The time is `now`: the timer may interrupt.
    pub(crate) fn advance(&mut self, now: u64) {
        if self.parts.timer && self.pit.rose(now) {
            // A pulse, which is enough for the edge-triggered inputs.
            for high in [true, false] {
                match self.timer.clone() {
                    Some(inputs) => inputs.into_iter().for_each(|input| {
                        let _ = self.set_pin(input, pins::TIMER, high);
                    }),
                    None => self.set_line(TIMER.into(), high),
                }
            }
        }
    }

    /// A processor ended the interrupt of that vector.
    pub(crate) fn end(&mut self, vector: u8) {
        self.ioapic.end(vector);
    }

    /// The messages to processors since the last call.
    pub(crate) fn take_messages(&mut self) -> Vec<Command> {
        let mut messages = std::mem::take(&mut self.messages);
        messages.extend(self.ioapic.take_messages());
        messages
    }

    /// True if the 8259A pair asks for attention.
    pub(crate) fn interrupts(&self) -> bool {
        self.pic.interrupts()
    }

    /// True once for each time that the 8259A pair begins to ask.
    pub(crate) fn takes_attention(&mut self) -> bool {
        let asks = self.interrupts();
        asks && !std::mem::replace(&mut self.told, asks)
    }

    /// The vector of the interrupt that a processor takes from the 8259A pair.
    pub(crate) fn acknowledge(&mut self) -> u8 {
        self.told = false;
        self.pic.acknowledge()
    }

    /// The next time at which the timer interrupts.
    pub(crate) fn next(&self) -> Option<u64> {
        let heard = match &self.timer {
            Some(inputs) => inputs.iter().any(|input| self.hears(*input)),
            None => {
                let routed = self.routes.contains_key(&TIMER.into());
                let inputs = [Pin::Pic(TIMER), Pin::IoApic(TIMER)];
                routed || inputs.iter().any(|input| self.hears(*input))
            }
        };
        self.pit.next().filter(|_| heard && self.parts.timer)
    }
}
