//! The 8254 timer of a PC (Intel 8254 data sheet), in the time of its VM, and port 0x61.

use super::{PitChannelState, PitState};

/// Ticks of a VM's clock in a second: CPUID says 1 GHz.
const CLOCK_HZ: u128 = 1_000_000_000;
const PIT_HZ: u128 = 1_193_182;
/// Half a period of the refresh request that port 0x61 shows, in clock ticks.
const REFRESH: u64 = 15_085;

/// The bytes that a channel reads and writes (RW of the control word).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Bytes {
    Low,
    High,
    #[default]
    Both,
}

#[derive(Debug, Default)]
struct Channel {
    mode: u8,
    bytes: Bytes,
    bcd: bool,
    /// The first byte of two was written.
    low: Option<u8>,
    /// The next byte that is read is the second one.
    reads_high: bool,
    latched: Option<u16>,
    status: Option<u8>,
    /// The count, 1 to 65536, and the clock at which it was loaded.
    loaded: Option<(u32, u64)>,
    gate: bool,
}

/// Timer ticks in so many clock ticks.
fn pit_ticks(clock: u64) -> u64 {
    (u128::from(clock) * PIT_HZ / CLOCK_HZ) as u64
}

/// Clock ticks after which so many timer ticks have passed.
fn clock_ticks(pit: u64) -> u64 {
    (u128::from(pit) * CLOCK_HZ).div_ceil(PIT_HZ) as u64
}

impl Channel {
    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn elapsed(&self, now: u64) -> Option<(u64, u64)> {
        let (count, at) = self.loaded?;
        Some((count.into(), pit_ticks(now.saturating_sub(at))))
    }

    fn counter(&self, now: u64) -> u16 {
        let Some((count, elapsed)) = self.elapsed(now) else {
            return 0;
        };
        let value = match self.mode {
            2 => count - elapsed % count,
            // It counts by two, twice a period.
            3 => count - elapsed * 2 % count,
            _ => count.wrapping_sub(elapsed),
        };
        match self.bcd {
            true => to_bcd(value % 10_000),
            false => value as u16,
        }
    }

    fn output(&self, now: u64) -> bool {
        let Some((count, elapsed)) = self.elapsed(now) else {
            return self.mode != 0;
        };
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => elapsed % count != count - 1,
            3 => elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// The first clock after `after` at which the output rises.
    fn rises(&self, after: u64) -> Option<u64> {
        let (count, at) = self.loaded?;
        let count = u64::from(count);
        let periods = match self.periodic() {
            true => pit_ticks(after.saturating_sub(at)) / count + 1,
            false => 1,
        };
        let rise = |periods: u64| at.saturating_add(clock_ticks(periods.saturating_mul(count)));
        match rise(periods) {
            rise if rise > after => Some(rise),
            _ if self.periodic() => Some(rise(periods + 1)),
            _ => None,
        }
    }

    fn control(&mut self, word: u8, now: u64) {
        self.bytes = match word >> 4 & 3 {
            0 => {
                let counter = self.counter(now);
                self.latched.get_or_insert(counter);
                return;
            }
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::Both,
        };
        let mode = word >> 1 & 7;
        // Modes 6 and 7 are 2 and 3.
        self.mode = if mode > 5 { mode - 4 } else { mode };
        self.bcd = word & 1 != 0;
        (self.low, self.latched, self.status) = (None, None, None);
        self.reads_high = false;
        self.loaded = None;
    }

    fn write(&mut self, value: u8, now: u64) {
        let count = match (self.bytes, self.low.take()) {
            (Bytes::Low, _) => value.into(),
            (Bytes::High, _) => u16::from(value) << 8,
            (Bytes::Both, None) => {
                self.low = Some(value);
                return;
            }
            (Bytes::Both, Some(low)) => u16::from_le_bytes([low, value]),
        };
        let count = match self.bcd {
            true => from_bcd(count),
            false => count.into(),
        };
        let most = if self.bcd { 10_000 } else { 0x1_0000 };
        self.loaded = Some((if count == 0 { most } else { count }, now));
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.counter(now));
        let [low, high] = value.to_le_bytes();
        let (byte, last) = match (self.bytes, self.reads_high) {
            (Bytes::Low, _) => (low, true),
            (Bytes::High, _) => (high, true),
            (Bytes::Both, false) => (low, false),
            (Bytes::Both, true) => (high, true),
        };
        self.reads_high = !last;
        if last {
            self.latched = None;
        }
        byte
    }

    /// The status byte of a read-back.
    fn status(&self, now: u64) -> u8 {
        let bytes = match self.bytes {
            Bytes::Low => 1,
            Bytes::High => 2,
            Bytes::Both => 3,
        };
        u8::from(self.output(now)) << 7
            | u8::from(self.loaded.is_none()) << 6
            | bytes << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }
}

impl Channel {
    fn save(&self) -> PitChannelState {
        PitChannelState {
            mode: self.mode,
            bytes: match self.bytes {
                Bytes::Low => 1,
                Bytes::High => 2,
                Bytes::Both => 3,
            },
            bcd: self.bcd,
            low: self.low,
            reads_high: self.reads_high,
            latched: self.latched,
            status: self.status,
            loaded: self.loaded.map(|(count, _)| count),
            gate: self.gate,
        }
    }

    fn load(&mut self, from: &PitChannelState, now: u64) {
        let count = |count: u32| (count.clamp(1, 0x1_0000), now);
        *self = Self {
            mode: from.mode.min(5),
            bytes: match from.bytes {
                1 => Bytes::Low,
                2 => Bytes::High,
                _ => Bytes::Both,
            },
            bcd: from.bcd,
            low: from.low,
            reads_high: from.reads_high,
            latched: from.latched,
            status: from.status,
            loaded: from.loaded.map(count),
            gate: from.gate,
        };
    }
}

fn to_bcd(value: u64) -> u16 {
    (0..4).fold(0, |bcd, digit| {
        bcd | ((value / 10_u64.pow(digit) % 10) as u16) << (4 * digit)
    })
}

fn from_bcd(bcd: u16) -> u32 {
    (0..4).fold(0, |value, digit| {
        value + u32::from(bcd >> (4 * digit) & 15) * 10_u32.pow(digit)
    })
}

#[derive(Debug)]
pub(crate) struct Pit {
    channels: [Channel; 3],
    speaker: bool,
    /// Another timer has channel 0's place: its output leads nowhere.
    replaced: bool,
    /// The clock up to which rises of channel 0 were reported.
    reported: u64,
}

impl Default for Pit {
    fn default() -> Self {
        let mut channels = <[Channel; 3]>::default();
        // The gates of the first two are high in a PC.
        (channels[0].gate, channels[1].gate) = (true, true);
        Self {
            channels,
            speaker: false,
            replaced: false,
            reported: 0,
        }
    }
}

impl Pit {
    pub(crate) fn read(&mut self, port: u16, now: u64) -> Option<u8> {
        Some(match port {
            0x40..=0x42 => self.channels[usize::from(port & 3)].read(now),
            0x43 => 0xff,
            0x61 => {
                let channel = &self.channels[2];
                u8::from(channel.gate)
                    | u8::from(self.speaker) << 1
                    | (((now / REFRESH) & 1) as u8) << 4
                    | u8::from(channel.output(now)) << 5
            }
            _ => return None,
        })
    }

    /// Returns false for a port of another device.
    pub(crate) fn write(&mut self, port: u16, value: u8, now: u64) -> bool {
        match port {
            0x40..=0x42 => {
                let n = usize::from(port & 3);
                self.channels[n].write(value, now);
                if n == 0 {
                    self.reported = now;
                }
            }
            0x43 if value >> 6 == 3 => self.read_back(value, now),
            0x43 => self.channels[usize::from(value >> 6)].control(value, now),
            0x61 => {
                self.speaker = value & 2 != 0;
                let channel = &mut self.channels[2];
                let gate = value & 1 != 0;
                if gate && !channel.gate {
                    // A rising gate starts the count again.
                    channel.loaded = channel.loaded.map(|(count, _)| (count, now));
                }
                channel.gate = gate;
            }
            _ => return false,
        }
        true
    }

    fn read_back(&mut self, value: u8, now: u64) {
        for (n, channel) in self.channels.iter_mut().enumerate() {
            if value >> (n + 1) & 1 == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                let counter = channel.counter(now);
                channel.latched.get_or_insert(counter);
            }
            if value & 0x10 == 0 {
                let status = channel.status(now);
                channel.status.get_or_insert(status);
            }
        }
    }

    /// True if the output of channel 0 rose since the last call.
    pub(crate) fn rose(&mut self, now: u64) -> bool {
        let rise = self.channels[0].rises(self.reported);
        let rose = rise.is_some_and(|at| at <= now);
        if rose {
            self.reported = now;
        }
        rose && !self.replaced
    }

    /// The clock at which the output of channel 0 rises next.
    pub(crate) fn next(&self) -> Option<u64> {
        let rise = self.channels[0].rises(self.reported);
        rise.filter(|_| !self.replaced)
    }

    /// The registers.
    pub(super) fn save(&self) -> PitState {
        PitState {
            channels: self.channels.each_ref().map(Channel::save),
            speaker: self.speaker,
            replaced: self.replaced,
        }
    }

    /// Loads them at clock `now`, at which counts that were loaded begin again.
    pub(super) fn load(&mut self, from: &PitState, now: u64) {
        for (to, from) in self.channels.iter_mut().zip(&from.channels) {
            to.load(from, now);
        }
        (self.speaker, self.replaced) = (from.speaker, from.replaced);
        self.reported = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pit(control: u8, count: u16) -> Pit {
        let mut pit = Pit::default();
        let port = 0x40 + u16::from(control >> 6);
        assert!(pit.write(0x43, control, 0));
        for byte in count.to_le_bytes() {
            assert!(pit.write(port, byte, 0));
        }
        pit
    }

    /// Clock ticks of so many timer ticks.
    fn at(ticks: u64) -> u64 {
        clock_ticks(ticks)
    }

    #[test]
    fn a_rate_generator_rises_once_a_period() {
        let mut pit = pit(0x34, 1000);
        for period in 1..5 {
            let next = pit.next().unwrap();
            assert_eq!(next, at(period * 1000));
            assert!(!pit.rose(next - 1));
            assert!(pit.rose(next));
            assert!(!pit.rose(next));
        }
    }

    #[test]
    fn a_count_to_zero_rises_once() {
        let mut pit = pit(0x30, 500);
        assert_eq!(pit.next(), Some(at(500)));
        assert!(pit.rose(at(700)));
        assert_eq!((pit.next(), pit.rose(at(9000))), (None, false));
    }

    #[test]
    fn the_counter_reads_low_byte_first_and_a_latch_holds_it() {
        let mut pit = pit(0x34, 1000);
        let now = at(100);
        assert!(pit.write(0x43, 0, now), "latch");
        let later = at(300);
        let value = [pit.read(0x40, later), pit.read(0x40, later)].map(Option::unwrap);
        assert_eq!(u16::from_le_bytes(value), 900);
        let value = [pit.read(0x40, later), pit.read(0x40, later)].map(Option::unwrap);
        assert_eq!(u16::from_le_bytes(value), 700);
        // Status of channel 0: output high, loaded, both bytes, mode 2.
        assert!(pit.write(0x43, 0xe2, later));
        assert_eq!(pit.read(0x40, later), Some(0xb4));
    }

    #[test]
    fn the_gate_of_the_speaker_starts_channel_2_and_its_output_shows() {
        let mut pit = pit(0xb0, 100);
        let start = at(1000);
        assert!(pit.write(0x61, 1, start));
        let out = |pit: &mut Pit, now| pit.read(0x61, now).unwrap() & 0x21;
        assert_eq!(out(&mut pit, start + at(99)), 1);
        assert_eq!(out(&mut pit, start + at(101)), 0x21);
    }

    #[test]
    fn decimal_counts_are_decimal() {
        let pit = pit(0x35, 0x1000);
        assert_eq!(pit.channels[0].counter(at(1)), 0x0999);
        for value in [0, 1, 42, 9999] {
            assert_eq!(u64::from(from_bcd(to_bcd(value))), value);
        }
    }
}
