//! Rounding of exact results to the format of a register or of memory, with the exceptions that it raises.

use super::number::{BIAS, Finite, INTEGER, LEAST, TOP, infinity, pack, zero};
use crate::fpu::Extended;

/// Exceptions, as bits of the status and the control word.
pub(crate) const INVALID: u16 = 1 << 0;
pub(crate) const DENORMAL: u16 = 1 << 1;
pub(crate) const ZERO_DIVIDE: u16 = 1 << 2;
pub(crate) const OVERFLOW: u16 = 1 << 3;
pub(crate) const UNDERFLOW: u16 = 1 << 4;
pub(crate) const PRECISION: u16 = 1 << 5;
/// A stack fault, besides the invalid operation.
pub(crate) const STACK: u16 = 1 << 6;

/// Distance by which the exponent of a result is moved into range while its exception is not masked.
const WRAP: i32 = 24576;

/// Rounding control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    Nearest,
    Down,
    Up,
    Zero,
}

/// Control word and what an operation raises.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    pub(crate) rounding: Rounding,
    /// Bits of the significand of a result in a register: 24, 53 or 64.
    pub(crate) precision: u32,
    /// Exceptions that are masked.
    pub(crate) masked: u16,
    pub(crate) raised: u16,
    /// The last rounding went away from zero.
    pub(crate) up: bool,
    /// An operand was a denormal in memory, which its 80 bits do not show.
    pub(crate) narrow_denormal: bool,
}

/// A number with 128 bits of significand: `significand / 2^127 * 2^exponent`, bit 127 set; `more` says that
/// the number is a little larger.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exact {
    pub(crate) sign: bool,
    pub(crate) exponent: i32,
    pub(crate) significand: u128,
    pub(crate) more: bool,
}

impl Exact {
    /// From a significand that is not zero and whose bit 127 counts `2^exponent`.
    pub(crate) fn normalized(sign: bool, exponent: i32, significand: u128, more: bool) -> Self {
        let shift = significand.leading_zeros();
        Self {
            sign,
            exponent: exponent - shift as i32,
            significand: significand << shift,
            more,
        }
    }
}

impl From<Finite> for Exact {
    fn from(v: Finite) -> Self {
        Self {
            sign: v.sign,
            exponent: v.exponent,
            significand: u128::from(v.significand) << 64,
            more: false,
        }
    }
}

/// A significand cut to some bits.
struct Cut {
    kept: u128,
    inexact: bool,
    up: bool,
}

impl Context {
    pub(crate) fn new(control: u16) -> Self {
        let rounding = match control >> 10 & 3 {
            0 => Rounding::Nearest,
            1 => Rounding::Down,
            2 => Rounding::Up,
            _ => Rounding::Zero,
        };
        let precision = match control >> 8 & 3 {
            0 => 24,
            2 => 53,
            _ => 64,
        };
        Self {
            rounding,
            precision,
            masked: control & 0x3f,
            raised: 0,
            up: false,
            narrow_denormal: false,
        }
    }

    /// The same with all bits of a register.
    pub(crate) fn full(self) -> Self {
        Self {
            precision: 64,
            ..self
        }
    }

    pub(crate) fn raise(&mut self, exceptions: u16) {
        self.raised |= exceptions;
    }

    fn masks(&self, exception: u16) -> bool {
        self.masked & exception != 0
    }

    /// Keeps the upper `bits` (24 to 64) of 128.
    fn cut(&self, sign: bool, significand: u128, more: bool, bits: u32) -> Cut {
        let below = 128 - bits;
        let (kept, low) = (significand >> below, significand & ((1 << below) - 1));
        let half = 1_u128 << (below - 1);
        let inexact = low != 0 || more;
        let up = match self.rounding {
            Rounding::Nearest => low > half || low == half && (more || kept & 1 != 0),
            Rounding::Down => sign && inexact,
            Rounding::Up => !sign && inexact,
            Rounding::Zero => false,
        };
        Cut {
            kept: kept + u128::from(up),
            inexact,
            up,
        }
    }

    fn inexact(&mut self, cut: &Cut) {
        if cut.inexact {
            self.raise(PRECISION);
        }
        self.up = cut.up;
    }

    /// Rounds to a register.
    pub(crate) fn finish(&mut self, v: Exact) -> Extended {
        let bits = self.precision;
        let left = 64 - bits;
        let mut cut = self.cut(v.sign, v.significand, v.more, bits);
        let mut exponent = v.exponent;
        if cut.kept >> bits != 0 {
            cut.kept >>= 1;
            exponent += 1;
        }
        if exponent > BIAS {
            self.raise(OVERFLOW);
            if self.masks(OVERFLOW) {
                return self.overflow(v.sign, bits);
            }
            self.inexact(&cut);
            exponent -= WRAP;
        } else if exponent < LEAST {
            if self.masks(UNDERFLOW) {
                return self.denormal(v, bits);
            }
            self.raise(UNDERFLOW);
            self.inexact(&cut);
            exponent += WRAP;
        } else {
            self.inexact(&cut);
        }
        // Exponents of any operation but FSCALE are in range now; that one saturates.
        if !(LEAST..=BIAS).contains(&exponent) {
            self.raise(PRECISION);
            self.up = exponent > BIAS;
            return match self.up {
                true => infinity(v.sign),
                false => zero(v.sign),
            };
        }
        pack(v.sign, (exponent + BIAS) as u16, (cut.kept as u64) << left)
    }

    /// The masked response to overflow.
    fn overflow(&mut self, sign: bool, bits: u32) -> Extended {
        self.raise(PRECISION);
        self.up = match self.rounding {
            Rounding::Nearest => true,
            Rounding::Down => sign,
            Rounding::Up => !sign,
            Rounding::Zero => false,
        };
        match self.up {
            true => infinity(sign),
            false => pack(sign, TOP - 1, u64::MAX << (64 - bits)),
        }
    }

    /// The masked response to underflow: fewer bits, and UE only if some are lost.
    fn denormal(&mut self, v: Exact, bits: u32) -> Extended {
        let (significand, more) = shifted(v.significand, (LEAST - v.exponent) as u32);
        let cut = self.cut(v.sign, significand, v.more || more, bits);
        self.inexact(&cut);
        if cut.inexact {
            self.raise(UNDERFLOW);
        }
        let significand = (cut.kept as u64) << (64 - bits);
        pack(v.sign, u16::from(significand & INTEGER != 0), significand)
    }

    /// Rounds to a number of `bits` (24 or 53) with `exponents` bits of exponent (8 or 11) in memory. `None`
    /// if an exception that is not masked keeps it from being stored.
    pub(crate) fn store(&mut self, v: Exact, bits: u32, exponents: u32) -> Option<u64> {
        let bias = (1 << (exponents - 1)) - 1;
        let place = bits - 1;
        let top = (1_u64 << exponents) - 1;
        let signed = |magnitude: u64| magnitude | u64::from(v.sign) << (place + exponents);
        let mut cut = self.cut(v.sign, v.significand, v.more, bits);
        let mut exponent = v.exponent;
        if cut.kept >> bits != 0 {
            cut.kept >>= 1;
            exponent += 1;
        }
        if exponent > bias {
            self.raise(OVERFLOW);
            if !self.masks(OVERFLOW) {
                return None;
            }
            let infinite = super::number::kind(self.overflow(v.sign, 64));
            return Some(signed(match infinite {
                super::number::Kind::Infinity => top << place,
                _ => (top << place) - 1,
            }));
        }
        if exponent < 1 - bias {
            if !self.masks(UNDERFLOW) {
                self.raise(UNDERFLOW);
                return None;
            }
            let (significand, more) = shifted(v.significand, (1 - bias - v.exponent) as u32);
            cut = self.cut(v.sign, significand, v.more || more, bits);
            self.inexact(&cut);
            if cut.inexact {
                self.raise(UNDERFLOW);
            }
            // A carry makes the least normal number.
            return Some(signed(cut.kept as u64));
        }
        self.inexact(&cut);
        let fraction = cut.kept as u64 & ((1 << place) - 1);
        Some(signed(((exponent + bias) as u64) << place | fraction))
    }

    /// Rounds to an integer; `None` if it has more than 64 bits.
    pub(crate) fn integer(&mut self, v: Exact) -> Option<u64> {
        if v.exponent > 63 {
            return None;
        }
        // One bit more than the integer, so that all of it can be a fraction.
        let (significand, more) = shifted(v.significand, (63 - v.exponent) as u32);
        let cut = self.cut(v.sign, significand, v.more || more, 64);
        self.inexact(&cut);
        u64::try_from(cut.kept).ok()
    }
}

/// Shifts right, and tells if ones were lost.
pub(crate) fn shifted(v: u128, by: u32) -> (u128, bool) {
    match by {
        0 => (v, false),
        1..128 => (v >> by, v & ((1 << by) - 1) != 0),
        _ => (0, v != 0),
    }
}
