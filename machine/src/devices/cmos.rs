//! CMOS RAM with the clock: how firmware learns the memory size and the number of vCPUs.

use std::time::{SystemTime, UNIX_EPOCH};

/// The registers that hold memory sizes and the number of vCPUs, as SeaBIOS reads them
/// (src/hw/rtc.h).
const BASE_KIB: u8 = 0x15;
const EXTENDED_KIB: [u8; 2] = [0x17, 0x30];
const ABOVE_16M: u8 = 0x34;
const ABOVE_4G: u8 = 0x5b;
const OTHER_CPUS: u8 = 0x5f;

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
/// The divider for a 32 kHz crystal and a periodic rate of 1024 Hz; no update in progress.
const DIVIDER: u8 = 0x26;
/// 24 hours; numbers are BCD.
const HOURS_24: u8 = 1 << 1;
/// The battery is good.
const RAM_VALID: u8 = 1 << 7;

const KIB: u64 = 1 << 10;
const UNIT: u64 = 64 << 10;

/// CMOS RAM: an index register and 128 bytes, which the guest cannot change.
pub(crate) struct Cmos {
    index: u8,
    ram: [u8; 128],
    /// The time at which the clock stands, in seconds since 1970; `None` if it goes.
    stands_at: Option<u64>,
}

impl Cmos {
    pub(crate) fn new(ram_bytes: u64, vcpus: u32) -> Self {
        let low = crate::layout::low_ram(ram_bytes);
        let mut cmos = Self {
            index: 0,
            ram: [0; 128],
            stands_at: None,
        };
        let capped = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
        cmos.put16(BASE_KIB, 640);
        for register in EXTENDED_KIB {
            cmos.put16(register, capped(low.saturating_sub(1 << 20) / KIB));
        }
        cmos.put16(ABOVE_16M, capped(low.saturating_sub(16 << 20) / UNIT));
        let above_4g = ((ram_bytes - low) / UNIT).min(0xff_ffff);
        cmos.put16(ABOVE_4G, above_4g as u16);
        cmos.ram[usize::from(ABOVE_4G) + 2] = (above_4g >> 16) as u8;
        // Firmware counts in a byte; it waits for no more than that.
        cmos.ram[usize::from(OTHER_CPUS)] = u8::try_from(vcpus.saturating_sub(1)).unwrap_or(255);
        cmos.ram[usize::from(STATUS_A)] = DIVIDER;
        cmos.ram[usize::from(STATUS_B)] = HOURS_24;
        cmos.ram[usize::from(STATUS_D)] = RAM_VALID;
        cmos
    }

    fn put16(&mut self, register: u8, value: u16) {
        let at = usize::from(register);
        self.ram[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Stops the clock at a time, in seconds since 1970.
    pub(crate) fn stop_clock(&mut self, at: u64) {
        self.stands_at = Some(at);
    }

    /// Selects a register. Bit 7 masks NMIs on a PC, and is no part of the number.
    pub(crate) fn select(&mut self, index: u8) {
        self.index = index & 0x7f;
    }

    /// Reads the selected register.
    pub(crate) fn read(&self) -> u8 {
        let host = || {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            since.map_or(0, |since| since.as_secs())
        };
        self.read_at(self.stands_at.unwrap_or_else(host))
    }

    fn read_at(&self, now: u64) -> u8 {
        let day = now / 86_400;
        let (year, month, day_of_month) = date(day);
        bcd(match self.index {
            0x00 => now % 60,
            0x02 => now / 60 % 60,
            0x04 => now / 3600 % 24,
            // 1970-01-01 was a Thursday, and Sunday is 1.
            0x06 => (day + 4) % 7 + 1,
            0x07 => day_of_month,
            0x08 => month,
            0x09 => year % 100,
            0x32 => year / 100,
            index => return self.ram[usize::from(index)],
        })
    }
}

/// Two decimal digits, each in four bits.
fn bcd(value: u64) -> u8 {
    (value / 10 % 10 * 16 + value % 10) as u8
}

/// Year, month and day of month of a day counted from 1970-01-01. Years start in March here, so
/// that the leap day is their last and months follow a fixed pattern of 153 days in five.
fn date(day: u64) -> (u64, u64, u64) {
    const FROM_MARCH_OF_0: u64 = 719_468;
    const IN_400_YEARS: u64 = 146_097;
    let day = day + FROM_MARCH_OF_0;
    let (era, day) = (day / IN_400_YEARS, day % IN_400_YEARS);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + next, month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(cmos: &mut Cmos, index: u8) -> u64 {
        cmos.select(index);
        cmos.read().into()
    }

    /// The computation of SeaBIOS (src/fw/paravirt.c, `qemu_preinit` without a memory map).
    fn seabios_ram(cmos: &mut Cmos) -> (u64, u64) {
        let above = (read(cmos, 0x34) << 16) | (read(cmos, 0x35) << 24);
        let low = if above != 0 {
            above + (16 << 20)
        } else {
            ((read(cmos, 0x30) << 10) | (read(cmos, 0x31) << 18)) + (1 << 20)
        };
        let high = (read(cmos, 0x5b) << 16) | (read(cmos, 0x5c) << 24) | (read(cmos, 0x5d) << 32);
        (low, high)
    }

    #[test]
    fn firmware_finds_the_memory() {
        for (ram, low, high) in [
            (2 << 20, 2 << 20, 0),
            (16 << 20, 16 << 20, 0),
            (128 << 20, 128 << 20, 0),
            (0xaff0_0000, 0xaff0_0000, 0),
            (0xb000_0000, 2 << 30, 0x3000_0000),
            (5 << 30, 2 << 30, 3 << 30),
            (1 << 40, 2 << 30, (1_u64 << 40) - (2 << 30)),
        ] {
            assert_eq!(seabios_ram(&mut Cmos::new(ram, 1)), (low, high), "{ram:#x}");
        }
        assert_eq!(read(&mut Cmos::new(1 << 20, 4), 0x5f), 3);
        assert_eq!(read(&mut Cmos::new(1 << 20, 4096), 0x5f), 255);
    }

    #[test]
    fn a_clock_that_was_stopped_stands() {
        let mut cmos = Cmos::new(1 << 20, 1);
        cmos.stop_clock(951_868_798);
        for (index, value) in [(0, 0x58), (9, 0x00), (0x32, 0x20)] {
            cmos.select(index);
            assert_eq!(cmos.read(), value);
        }
    }

    #[test]
    fn the_clock_tells_known_dates() {
        let mut cmos = Cmos::new(1 << 20, 1);
        // 2000-02-29 23:59:58, a Tuesday; 2026-11-21 00:00:00, a Saturday.
        for (now, expected) in [
            (951_868_798, [0x58, 0x59, 0x23, 3, 0x29, 0x02, 0x00, 0x20]),
            (1_795_219_200, [0, 0, 0, 7, 0x21, 0x11, 0x26, 0x20]),
        ] {
            for (index, value) in [0, 2, 4, 6, 7, 8, 9, 0x32].into_iter().zip(expected) {
                cmos.select(index | 0x80);
                assert_eq!(cmos.read_at(now), value, "register {index:#x}");
            }
        }
    }
}
