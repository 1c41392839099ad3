//! Conversions between registers of the x87 and the formats of memory.

use super::number::{
    BIAS, Finite, INTEGER, Kind, TOP, infinity, is_denormal, kind, pack, quiet, sign, zero,
};
use super::round::{Context, DENORMAL, Exact, INVALID, Rounding};
use crate::fpu::Extended;

/// The least and the largest place of a packed decimal.
const DECIMAL_MAX: u64 = 999_999_999_999_999_999;
const DECIMAL_INDEFINITE: Extended = 0xffff_c000_0000_0000_0000;

/// Bits of significand and exponent of the formats in memory.
#[derive(Clone, Copy)]
pub(crate) struct Format {
    pub(crate) bits: u32,
    pub(crate) exponents: u32,
}

pub(crate) const SINGLE: Format = Format {
    bits: 24,
    exponents: 8,
};
pub(crate) const DOUBLE: Format = Format {
    bits: 53,
    exponents: 11,
};

pub(crate) fn from_integer(value: i64) -> Extended {
    if value == 0 {
        return zero(false);
    }
    let magnitude = value.unsigned_abs();
    let shift = magnitude.leading_zeros();
    let exponent = (BIAS + 63 - shift as i32) as u16;
    pack(value < 0, exponent, magnitude << shift)
}

/// Eighteen decimal digits and a sign.
pub(crate) fn from_decimal(value: Extended) -> Extended {
    let digits = (0..18)
        .rev()
        .fold(0_i64, |sum, n| sum * 10 + (value >> (4 * n) & 15) as i64);
    from_integer(digits) | (value >> 79 & 1) << 79
}

impl Context {
    /// Loads a number of memory. A signalling NaN becomes quiet.
    pub(crate) fn load(&mut self, value: u64, format: Format) -> Extended {
        let value = self.widen(value, format);
        if kind(value) != Kind::Signalling {
            return value;
        }
        self.raise(INVALID);
        quiet(value)
    }

    /// Widens a number of memory. A NaN remains what it is: arithmetic chooses between those of its operands.
    pub(crate) fn widen(&mut self, value: u64, format: Format) -> Extended {
        let place = format.bits - 1;
        let top = (1_u64 << format.exponents) - 1;
        let negative = value >> (place + format.exponents) & 1 != 0;
        let exponent = value >> place & top;
        let fraction = value & ((1 << place) - 1);
        let significand = fraction << (63 - place);
        let bias = (top >> 1) as i32;
        match (exponent, fraction) {
            (0, 0) => zero(negative),
            (0, _) => {
                self.raise(DENORMAL);
                let shift = significand.leading_zeros();
                let exponent = 1 - bias - shift as i32;
                pack(negative, (exponent + BIAS) as u16, significand << shift)
            }
            (e, 0) if e == top => infinity(negative),
            (e, _) if e == top => pack(negative, TOP, INTEGER | significand),
            (e, _) => {
                let exponent = (e as i32 - bias + BIAS) as u16;
                pack(negative, exponent, INTEGER | significand)
            }
        }
    }

    /// Narrows to a number of memory; `None` if an exception keeps it from being stored.
    pub(crate) fn narrow(&mut self, value: Extended, format: Format) -> Option<u64> {
        let place = format.bits - 1;
        let top = ((1_u64 << format.exponents) - 1) << place;
        let negative = u64::from(sign(value)) << (place + format.exponents);
        match kind(value) {
            Kind::Zero => Some(negative),
            Kind::Infinity => Some(negative | top),
            Kind::Quiet | Kind::Signalling => {
                if kind(value) == Kind::Signalling {
                    self.raise(INVALID);
                    if self.masked & INVALID == 0 {
                        return None;
                    }
                }
                let fraction = quiet(value) as u64 & !INTEGER;
                Some(negative | top | fraction >> (63 - place))
            }
            Kind::Unsupported => {
                self.raise(INVALID);
                let indefinite = top | 1 << (place - 1) | 1 << (place + format.exponents);
                (self.masked & INVALID != 0).then_some(indefinite)
            }
            Kind::Finite(v) => {
                // A denormal is below the range of either format: UE and PE tell.
                self.store(v.into(), format.bits, format.exponents)
            }
        }
    }

    /// Rounds to an integer of `bits` (16, 32 or 64); `None` if an exception keeps it from being stored.
    pub(crate) fn integer_of(&mut self, value: Extended, bits: u32) -> Option<u64> {
        let least = 1_u64 << (bits - 1);
        let rounded = match kind(value) {
            Kind::Zero => Some(0),
            Kind::Finite(v) => self.integer(v.into()),
            _ => None,
        };
        let limit = if sign(value) { least } else { least - 1 };
        match rounded.filter(|magnitude| *magnitude <= limit) {
            Some(magnitude) if sign(value) => Some(magnitude.wrapping_neg()),
            Some(magnitude) => Some(magnitude),
            None => self.indefinite(least),
        }
    }

    fn indefinite<T>(&mut self, value: T) -> Option<T> {
        (self.raised, self.up) = (INVALID, false);
        (self.masked & INVALID != 0).then_some(value)
    }

    /// Rounds to a packed decimal.
    pub(crate) fn decimal_of(&mut self, value: Extended) -> Option<Extended> {
        let rounded = match kind(value) {
            Kind::Zero => Some(0),
            Kind::Finite(v) => self.integer(v.into()),
            _ => None,
        };
        let Some(mut rest) = rounded.filter(|magnitude| *magnitude <= DECIMAL_MAX) else {
            return self.indefinite(DECIMAL_INDEFINITE);
        };
        let mut decimal = u128::from(sign(value)) << 79;
        for n in 0..18 {
            decimal |= u128::from(rest % 10) << (4 * n);
            rest /= 10;
        }
        Some(decimal)
    }

    /// FRNDINT.
    pub(crate) fn round_to_integer(&mut self, value: Extended) -> Extended {
        match kind(value) {
            Kind::Unsupported => self.invalid(),
            Kind::Signalling => {
                self.raise(INVALID);
                quiet(value)
            }
            Kind::Finite(v) if v.exponent < 63 => {
                if is_denormal(value) {
                    self.raise(DENORMAL);
                }
                let magnitude = self.integer(v.into()).unwrap_or(0);
                if magnitude == 0 {
                    return zero(v.sign);
                }
                let shift = magnitude.leading_zeros();
                let exponent = (BIAS + 63 - shift as i32) as u16;
                pack(v.sign, exponent, magnitude << shift)
            }
            _ => value,
        }
    }

    /// FSCALE: `a` times two to the integer part of `b`.
    pub(crate) fn scale(&mut self, a: Extended, b: Extended) -> Extended {
        *self = self.full();
        let bad = |v| matches!(kind(v), Kind::Unsupported | Kind::Signalling | Kind::Quiet);
        if bad(a) || bad(b) {
            // As any operation on two numbers has it.
            return self.add(a, b);
        }
        let by = match (kind(a), kind(b)) {
            (Kind::Zero, Kind::Infinity) if !sign(b) => return self.invalid(),
            (Kind::Infinity, Kind::Infinity) if sign(b) => return self.invalid(),
            (Kind::Zero | Kind::Infinity, _) => {
                self.raise_denormals(a, b);
                return a;
            }
            (_, Kind::Infinity) => {
                self.raise_denormals(a, b);
                return match sign(b) {
                    true => zero(sign(a)),
                    false => infinity(sign(a)),
                };
            }
            (_, Kind::Finite(v)) => whole(v),
            _ => 0,
        };
        self.raise_denormals(a, b);
        match kind(a) {
            Kind::Finite(v) => {
                let exponent = v.exponent.saturating_add(by);
                self.finish(Exact {
                    exponent,
                    ..v.into()
                })
            }
            _ => a,
        }
    }

    fn raise_denormals(&mut self, a: Extended, b: Extended) {
        if is_denormal(a) || is_denormal(b) {
            self.raise(DENORMAL);
        }
    }

    /// A constant that is not exact, rounded by the rounding control.
    pub(crate) fn constant(&self, nearest: Extended, above: bool) -> Extended {
        // `above`: the nearest number is above the constant. All are positive.
        match self.rounding {
            Rounding::Nearest => nearest,
            Rounding::Up if above => nearest,
            Rounding::Up => nearest + 1,
            _ if above => nearest - 1,
            _ => nearest,
        }
    }
}

/// The integer part, as far as it changes an exponent.
fn whole(v: Finite) -> i32 {
    let far = 0x1_0000;
    let magnitude = match v.exponent {
        ..0 => 0,
        16.. => far,
        e => (v.significand >> (63 - e)) as i32,
    };
    if v.sign { -magnitude } else { magnitude }
}

/// FXTRACT of a finite number: exponent and significand.
pub(crate) fn extract(v: Finite) -> (Extended, Extended) {
    let significand = pack(v.sign, BIAS as u16, v.significand);
    (from_integer(v.exponent.into()), significand)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Intel SDM volume 1, table 4-7: a quiet NaN before a signalling one, then the larger significand.
    #[test]
    fn arithmetic_chooses_between_the_nans_of_register_and_memory() {
        const QUIET: Extended = 0x7fff_c100_0000_0000_0000;
        const SIGNALLING: Extended = 0x7fff_a100_0000_0000_0000;
        const QUIETED: Extended = 0x7fff_e100_0000_0000_0000;
        for (register, memory, result) in [
            // A signalling NaN of memory has the larger significand once it is quiet.
            (QUIET, 0x7fa2_0000, QUIET),
            (SIGNALLING, 0x7fa0_0000, QUIETED),
            (SIGNALLING, 0x7fa2_0000, 0x7fff_e200_0000_0000_0000),
            (SIGNALLING, 0x7fc0_0000, 0x7fff_c000_0000_0000_0000),
        ] {
            let mut x = Context::new(0x37f);
            let operand = x.widen(memory, SINGLE);
            assert_eq!(x.raised, 0);
            assert_eq!(x.add(register, operand), result, "{memory:x}");
            assert_eq!(x.raised, INVALID, "{memory:x}");
        }
        let mut x = Context::new(0x37f);
        assert_eq!(x.load(0x7fa0_0000, SINGLE), 0x7fff_e000_0000_0000_0000);
        assert_eq!(x.raised, INVALID);
    }
}
