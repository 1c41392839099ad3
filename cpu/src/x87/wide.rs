//! Numbers with 128 bits of significand, for series: each operation is wrong by less than two of the last bits.

use super::number::Finite;
use super::round::Exact;

/// `significand / 2^127 * 2^exponent` with bit 127 set, or zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wide {
    pub(crate) sign: bool,
    pub(crate) exponent: i32,
    pub(crate) significand: u128,
}

impl From<Finite> for Wide {
    fn from(v: Finite) -> Self {
        Self {
            sign: v.sign,
            exponent: v.exponent,
            significand: u128::from(v.significand) << 64,
        }
    }
}

impl From<Wide> for Exact {
    fn from(v: Wide) -> Self {
        Self {
            sign: v.sign,
            exponent: v.exponent,
            significand: v.significand,
            // No result of a series is exact.
            more: true,
        }
    }
}

/// The upper half of a product.
fn high(a: u128, b: u128) -> u128 {
    const LOW: u128 = u64::MAX as u128;
    let (a1, a0, b1, b0) = (a >> 64, a & LOW, b >> 64, b & LOW);
    let (middle, carry) = (a1 * b0).overflowing_add(a0 * b1);
    let low = ((a0 * b0) >> 64) + (middle & LOW);
    a1 * b1 + (middle >> 64) + (u128::from(carry) << 64) + (low >> 64)
}

impl Wide {
    pub(crate) const ZERO: Self = Self {
        sign: false,
        exponent: i32::MIN / 4,
        significand: 0,
    };
    pub(crate) const ONE: Self = Self {
        sign: false,
        exponent: 0,
        significand: 1 << 127,
    };
    /// ln 2.
    pub(crate) const LN2: Self = Self {
        sign: false,
        exponent: -1,
        significand: 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af,
    };
    /// pi.
    pub(crate) const PI: Self = Self {
        sign: false,
        exponent: 1,
        significand: 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1,
    };

    pub(crate) fn normalized(sign: bool, exponent: i32, significand: u128) -> Self {
        if significand == 0 {
            return Self::ZERO;
        }
        let shift = significand.leading_zeros();
        Self {
            sign,
            exponent: exponent - shift as i32,
            significand: significand << shift,
        }
    }

    pub(crate) fn integer(value: i32) -> Self {
        Self::normalized(value < 0, 127, value.unsigned_abs().into())
    }

    pub(crate) fn is_zero(self) -> bool {
        self.significand == 0
    }

    pub(crate) fn negated(self) -> Self {
        Self {
            sign: !self.sign,
            ..self
        }
    }

    /// Times a power of two.
    pub(crate) fn scaled(self, by: i32) -> Self {
        Self {
            exponent: self.exponent + by,
            ..self
        }
    }

    pub(crate) fn add(self, other: Self) -> Self {
        let larger = (self.exponent, self.significand) >= (other.exponent, other.significand);
        let (a, b) = if larger { (self, other) } else { (other, self) };
        if b.is_zero() {
            return a;
        }
        let distance = (a.exponent - b.exponent) as u32;
        let second = b.significand.checked_shr(distance).unwrap_or(0);
        if a.sign != b.sign {
            return Self::normalized(a.sign, a.exponent, a.significand - second);
        }
        let (sum, carry) = a.significand.overflowing_add(second);
        match carry {
            false => Self::normalized(a.sign, a.exponent, sum),
            true => Self {
                exponent: a.exponent + 1,
                significand: sum >> 1 | 1 << 127,
                ..a
            },
        }
    }

    pub(crate) fn sub(self, other: Self) -> Self {
        self.add(other.negated())
    }

    pub(crate) fn mul(self, other: Self) -> Self {
        let product = high(self.significand, other.significand);
        let exponent = self.exponent + other.exponent + 1;
        Self::normalized(self.sign != other.sign, exponent, product)
    }

    /// Divided by a small number.
    pub(crate) fn over(self, divisor: u32) -> Self {
        // Bits that the quotient lacks at its end come from the remainder.
        let divisor = u128::from(divisor.max(1));
        let bits = 128 - divisor.leading_zeros() - 1;
        let (quotient, rest) = (self.significand / divisor, self.significand % divisor);
        let more = (rest << bits) / divisor;
        let sum = (quotient << bits).checked_add(more);
        Self::normalized(
            self.sign,
            self.exponent - bits as i32,
            sum.unwrap_or(u128::MAX),
        )
    }

    /// Divided, by Newton's method from a quotient of 64 bits.
    pub(crate) fn div(self, other: Self) -> Self {
        if self.is_zero() || other.is_zero() {
            return Self::ZERO;
        }
        let top = other.significand >> 64;
        // Bit 65 of this counts one.
        let first = u128::MAX / top;
        let mut inverse = Self::normalized(other.sign, 62 - other.exponent, first);
        let two = Self::ONE.scaled(1);
        for _ in 0..2 {
            inverse = inverse.mul(two.sub(other.mul(inverse)));
        }
        self.mul(inverse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: Wide, b: Wide) {
        let difference = a.sub(b);
        let far = difference.exponent - b.exponent;
        assert!(difference.is_zero() || far < -120, "{a:x?} {b:x?} {far}");
    }

    #[test]
    fn quotients_and_products_undo_each_other() {
        for (a, b) in [
            (1, 3),
            (7, 5),
            (1, 1),
            (1_000_003, 97),
            (5, 8),
            (2, 1_234_567),
        ] {
            let (x, y) = (Wide::integer(a), Wide::integer(b));
            close(x.div(y).mul(y), x);
            close(x.over(b as u32).mul(y), x);
            close(x.div(y), x.over(b as u32));
            close(x.sub(y).add(y), x);
        }
    }
}
