//! The TD's clock: virtual TSC = native TSC · multiplier / 2⁴⁸ + offset.

/// Multiplier and offset of a TD.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct VirtualTsc {
    /// 2⁴⁸ is the native frequency.
    pub(crate) multiplier: u64,
    pub(crate) offset: u64,
}

const FRACTION: u32 = 48;
/// TSC_FREQUENCY counts these.
const FREQUENCY_UNIT: u128 = 25_000_000;

impl VirtualTsc {
    /// A clock of `frequency` · 25 MHz that shows `value` when the native TSC shows `now`.
    pub(crate) fn starting_at(value: u64, now: u64, frequency: u16, native_hz: u64) -> Self {
        let hz = u128::from(frequency) * FREQUENCY_UNIT;
        let multiplier = ((hz << FRACTION) / u128::from(native_hz.max(1))) as u64;
        VirtualTsc {
            multiplier,
            offset: value.wrapping_sub(scale(now, multiplier)),
        }
    }

    /// Value of the TD's RDTSC.
    pub(crate) fn at(self, native: u64) -> u64 {
        scale(native, self.multiplier).wrapping_add(self.offset)
    }

    /// The native TSC at a virtual one: `None` if it does not fit 64 bits.
    pub(crate) fn native_at(self, virtual_tsc: u64) -> Option<u64> {
        let scaled = u128::from(virtual_tsc.wrapping_sub(self.offset)) << FRACTION;
        let native = scaled.checked_div(u128::from(self.multiplier))?;
        u64::try_from(native).ok()
    }
}

fn scale(ticks: u64, multiplier: u64) -> u64 {
    ((u128::from(ticks) * u128::from(multiplier)) >> FRACTION) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_of_half_the_native_frequency_starts_at_zero_and_runs_half_as_fast() {
        let tsc = VirtualTsc::starting_at(0, 1_000_000_000_000, 40, 2_000_000_000);
        assert_eq!(tsc.multiplier, 0x8000_0000_0000);
        assert_eq!(tsc.offset, 0xFFFF_FF8B_95AD_7800);
        assert_eq!(tsc.at(1_000_000_000_000), 0);
        assert_eq!(tsc.at(1_000_002_000_000), 1_000_000);
        assert_eq!(tsc.native_at(1_000_000), Some(1_000_002_000_000));
    }

    #[test]
    fn a_native_time_beyond_64_bits_is_none() {
        let tsc = VirtualTsc::starting_at(0, 0, 4, 2_000_000_000);
        assert_eq!(tsc.native_at(u64::MAX), None);
        assert_eq!(VirtualTsc::default().native_at(1), None, "no clock yet");
    }
}
