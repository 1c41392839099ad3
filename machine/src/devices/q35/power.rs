//! Power management of the ICH9, at the port that firmware sets it to: PM1 event and control blocks, the timer, and general
//! purpose events that never happen (ACPI 6.5, 4.8.3).

use std::time::Duration;

/// The first port, and the last.
pub(super) const BASE: u16 = 0x600;
pub(super) const LAST: u16 = BASE + 0x7f;

/// Ports of the blocks, as the FADT tells them.
pub(super) const PM1A_EVENT: u16 = BASE;
pub(super) const PM1A_CONTROL: u16 = BASE + 4;
pub(super) const TIMER: u16 = BASE + 8;
pub(super) const GPE0: u16 = BASE + 0x20;
/// Bytes of the blocks.
pub(super) const PM1A_EVENT_BYTES: u8 = 4;
pub(super) const PM1A_CONTROL_BYTES: u8 = 2;
pub(super) const TIMER_BYTES: u8 = 4;
pub(super) const GPE0_BYTES: u8 = 16;

const PM1A_ENABLE: u16 = PM1A_EVENT + 2;

/// SCI_EN: there is no system management mode to hand power management over.
const SCI_ENABLED: u16 = 1 << 0;
/// SLP_EN. The only state that the machine can sleep in is S5.
const SLEEP: u16 = 1 << 13;

/// Ticks of the timer in a second.
const TIMER_HZ: u128 = 3_579_545;

#[derive(Default)]
pub(super) struct Power {
    pm1a_enable: u16,
    pm1a_control: u16,
}

impl Power {
    /// Reads a port. `time` is the guest's.
    pub(super) fn read(&self, port: u16, time: Duration, data: &mut [u8]) {
        let ticks = time.as_nanos() * TIMER_HZ / 1_000_000_000;
        let (first, block) = match port {
            PM1A_EVENT..PM1A_CONTROL => (PM1A_EVENT, u32::from(self.pm1a_enable) << 16),
            PM1A_CONTROL..TIMER => (PM1A_CONTROL, (self.pm1a_control | SCI_ENABLED).into()),
            TIMER..0x60c => (TIMER, ticks as u32),
            _ => (port, 0),
        };
        let block = block.to_le_bytes();
        for (byte, at) in data.iter_mut().zip(usize::from(port - first)..) {
            *byte = block.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes a port. True if the guest switches the machine off.
    pub(super) fn write(&mut self, port: u16, data: &[u8]) -> bool {
        let value = match *data {
            [low, high, ..] => u16::from_le_bytes([low, high]),
            [low] => low.into(),
            [] => return false,
        };
        match port {
            PM1A_ENABLE => self.pm1a_enable = value,
            PM1A_CONTROL if value & SLEEP != 0 => return true,
            PM1A_CONTROL => self.pm1a_control = value,
            // Status bits, which no event sets.
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(power: &Power, port: u16, time: Duration) -> u32 {
        let mut data = [0; 4];
        power.read(port, time, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_timer_counts_its_rate_in_the_guests_time() {
        let power = Power::default();
        for (seconds, ticks) in [(0, 0), (1, 3_579_545), (1200, 484_700)] {
            let time = Duration::from_secs(seconds);
            // It wraps after 1200 seconds less 0.1.
            let count = read(&power, TIMER, time);
            assert_eq!(u64::from(count), (seconds * 3_579_545) & 0xffff_ffff);
            assert!(u64::from(count) >= ticks);
        }
        let half = read(&power, TIMER + 2, Duration::from_secs(1));
        assert_eq!(half, 3_579_545 >> 16);
    }

    #[test]
    fn control_is_the_acpi_drivers_and_sleeping_is_switching_off() {
        let mut power = Power::default();
        let now = Duration::ZERO;
        assert_eq!(read(&power, PM1A_CONTROL, now), u32::from(SCI_ENABLED));
        assert!(!power.write(PM1A_CONTROL, &0x1c00_u16.to_le_bytes()));
        assert_eq!(read(&power, PM1A_CONTROL, now), 0x1c01);
        assert!(power.write(PM1A_CONTROL, &0x3c01_u16.to_le_bytes()));
        // The bit lies in the second byte; the first alone is another write.
        assert!(!power.write(PM1A_CONTROL, &[0xff]));
    }

    #[test]
    fn no_event_is_ever_pending() {
        let mut power = Power::default();
        power.write(PM1A_EVENT, &[0xff; 2]);
        power.write(PM1A_ENABLE, &0x0120_u16.to_le_bytes());
        assert_eq!(read(&power, PM1A_EVENT, Duration::ZERO), 0x0120_0000);
        for port in GPE0..GPE0 + u16::from(GPE0_BYTES) {
            power.write(port, &[0xff]);
            assert_eq!(read(&power, port, Duration::ZERO), 0);
        }
    }
}
