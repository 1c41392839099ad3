//! Arithmetic of two operands, square root and remainders.

use super::number::{
    Finite, INDEFINITE, Kind, infinity, is_denormal, is_nan, kind, propagate, sign, zero,
};
use super::round::{Context, DENORMAL, Exact, INVALID, Rounding, ZERO_DIVIDE, shifted};
use crate::fpu::Extended;

/// Sign of a zero that is the exact difference of equal numbers.
fn cancelled(x: &Context) -> bool {
    x.rounding == Rounding::Down
}

/// What a remainder tells of the quotient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quotient {
    /// Its low bits.
    Bits(u8),
    /// The reduction is not complete.
    Partial,
    /// There is none.
    None,
}

impl Context {
    pub(crate) fn invalid(&mut self) -> Extended {
        self.raise(INVALID);
        INDEFINITE
    }

    /// What NaNs and unsupported operands give; raises DE for denormals otherwise.
    fn special(&mut self, a: Extended, b: Extended) -> Option<Extended> {
        let any = |wanted: Kind| kind(a) == wanted || kind(b) == wanted;
        if any(Kind::Unsupported) {
            return Some(self.invalid());
        }
        if any(Kind::Signalling) {
            self.raise(INVALID);
        }
        if is_nan(a) || is_nan(b) {
            return Some(propagate(a, b));
        }
        None
    }

    fn denormals(&mut self, operands: &[Extended]) {
        if self.narrow_denormal || operands.iter().any(|v| is_denormal(*v)) {
            self.raise(DENORMAL);
        }
    }

    pub(crate) fn add(&mut self, a: Extended, b: Extended) -> Extended {
        if let Some(nan) = self.special(a, b) {
            return nan;
        }
        let (x, y) = match (kind(a), kind(b)) {
            (Kind::Infinity, Kind::Infinity) if sign(a) != sign(b) => return self.invalid(),
            (Kind::Infinity, _) | (_, Kind::Infinity) => {
                self.denormals(&[a, b]);
                return match kind(a) {
                    Kind::Infinity => a,
                    _ => b,
                };
            }
            (Kind::Zero, Kind::Zero) => {
                let same = sign(a) == sign(b);
                return zero(if same { sign(a) } else { cancelled(self) });
            }
            (Kind::Finite(v), Kind::Zero) | (Kind::Zero, Kind::Finite(v)) => {
                self.denormals(&[a, b]);
                return self.finish(v.into());
            }
            (Kind::Finite(x), Kind::Finite(y)) => (x, y),
            _ => return self.invalid(),
        };
        self.denormals(&[a, b]);
        match sum(x, y) {
            Some(exact) => self.finish(exact),
            None => zero(cancelled(self)),
        }
    }

    pub(crate) fn sub(&mut self, a: Extended, b: Extended) -> Extended {
        // The sign of a NaN is not changed.
        if is_nan(b) || kind(b) == Kind::Unsupported {
            return self.add(a, b);
        }
        self.add(a, b ^ 1 << 79)
    }

    pub(crate) fn mul(&mut self, a: Extended, b: Extended) -> Extended {
        if let Some(nan) = self.special(a, b) {
            return nan;
        }
        let negative = sign(a) != sign(b);
        let (x, y) = match (kind(a), kind(b)) {
            (Kind::Infinity, Kind::Zero) | (Kind::Zero, Kind::Infinity) => return self.invalid(),
            (Kind::Infinity, _) | (_, Kind::Infinity) => {
                self.denormals(&[a, b]);
                return infinity(negative);
            }
            (Kind::Finite(x), Kind::Finite(y)) => (x, y),
            _ => {
                self.denormals(&[a, b]);
                return zero(negative);
            }
        };
        self.denormals(&[a, b]);
        let product = u128::from(x.significand) * u128::from(y.significand);
        let exponent = x.exponent + y.exponent + 1;
        self.finish(Exact::normalized(negative, exponent, product, false))
    }

    pub(crate) fn div(&mut self, a: Extended, b: Extended) -> Extended {
        if let Some(nan) = self.special(a, b) {
            return nan;
        }
        let negative = sign(a) != sign(b);
        let (x, y) = match (kind(a), kind(b)) {
            (Kind::Infinity, Kind::Infinity) | (Kind::Zero, Kind::Zero) => return self.invalid(),
            (Kind::Infinity, _) => {
                self.denormals(&[b]);
                return infinity(negative);
            }
            (_, Kind::Infinity) | (Kind::Zero, _) => {
                self.denormals(&[a, b]);
                return zero(negative);
            }
            (_, Kind::Zero) => {
                self.raise(ZERO_DIVIDE);
                return infinity(negative);
            }
            (Kind::Finite(x), Kind::Finite(y)) => (x, y),
            _ => return self.invalid(),
        };
        self.denormals(&[a, b]);
        let quotient = quotient(x, y);
        self.finish(Exact {
            sign: negative,
            ..quotient
        })
    }

    pub(crate) fn sqrt(&mut self, a: Extended) -> Extended {
        if let Some(nan) = self.special(a, a) {
            return nan;
        }
        let v = match kind(a) {
            Kind::Zero => return a,
            Kind::Infinity if !sign(a) => return a,
            Kind::Finite(v) if !v.sign => v,
            _ => return self.invalid(),
        };
        self.denormals(&[a]);
        let odd = v.exponent & 1 != 0;
        let square = u128::from(v.significand) << if odd { 64 } else { 63 };
        let root = square.isqrt();
        let rest = square - root * root;
        self.finish(Exact {
            sign: false,
            exponent: v.exponent >> 1,
            // More than half of the last place is left if the rest is above the root.
            significand: root << 64 | u128::from(rest > root) << 63,
            more: rest != 0,
        })
    }

    /// FPREM, and FPREM1 with `nearest`: the remainder, and what is known of the quotient.
    pub(crate) fn remainder(
        &mut self,
        a: Extended,
        b: Extended,
        nearest: bool,
    ) -> (Extended, Quotient) {
        *self = self.full();
        if let Some(nan) = self.special(a, b) {
            return (nan, Quotient::None);
        }
        let (x, y) = match (kind(a), kind(b)) {
            (Kind::Infinity, _) | (_, Kind::Zero) => return (self.invalid(), Quotient::None),
            (Kind::Zero, _) => {
                self.denormals(&[b]);
                return (a, Quotient::Bits(0));
            }
            (Kind::Finite(x), Kind::Infinity) => {
                self.denormals(&[a]);
                return (self.finish(x.into()), Quotient::Bits(0));
            }
            (Kind::Finite(x), Kind::Finite(y)) => (x, y),
            _ => return (self.invalid(), Quotient::None),
        };
        self.denormals(&[a, b]);
        let (rest, bits) = rest(x, y, nearest);
        let value = match rest {
            Some(exact) => self.finish(exact),
            None => zero(x.sign),
        };
        (value, bits)
    }

    /// Order of two numbers; `None` if they have none. `quiet` NaNs are then no invalid operation.
    pub(crate) fn compare(
        &mut self,
        a: Extended,
        b: Extended,
        quiet: bool,
    ) -> Option<core::cmp::Ordering> {
        let bad = |v| matches!(kind(v), Kind::Unsupported | Kind::Signalling);
        if bad(a) || bad(b) {
            self.raise(INVALID);
            return None;
        }
        if is_nan(a) || is_nan(b) {
            if !quiet {
                self.raise(INVALID);
            }
            return None;
        }
        self.denormals(&[a, b]);
        Some(order(a).cmp(&order(b)))
    }
}

/// A key that orders numbers.
fn order(v: Extended) -> (i32, i32, u64) {
    let (exponent, significand) = match kind(v) {
        Kind::Zero => return (0, 0, 0),
        Kind::Finite(f) => (f.exponent, f.significand),
        _ => (i32::MAX, 0),
    };
    match sign(v) {
        false => (1, exponent, significand),
        true => (-1, -exponent, !significand),
    }
}

/// The exact sum; `None` is zero.
pub(crate) fn sum(x: Finite, y: Finite) -> Option<Exact> {
    let larger = (x.exponent, x.significand) >= (y.exponent, y.significand);
    let (x, y) = if larger { (x, y) } else { (y, x) };
    let distance = (x.exponent - y.exponent) as u32;
    // Two bits above, so that nothing is carried out.
    let first = u128::from(x.significand) << 62;
    let (second, more) = shifted(u128::from(y.significand) << 62, distance);
    let significand = match x.sign == y.sign {
        true => first + second,
        // What is lost of the second is taken from the last place.
        false => first - second - u128::from(more),
    };
    (significand != 0).then(|| Exact::normalized(x.sign, x.exponent + 2, significand, more))
}

/// The quotient of magnitudes, with 126 bits and more.
pub(crate) fn quotient(x: Finite, y: Finite) -> Exact {
    let divisor = u128::from(y.significand);
    let dividend = u128::from(x.significand) << 64;
    let (high, rest) = (dividend / divisor, dividend % divisor);
    let (low, rest) = ((rest << 62) / divisor, (rest << 62) % divisor);
    let exponent = x.exponent - y.exponent + 1;
    Exact::normalized(false, exponent, high << 62 | low, rest != 0)
}

/// The remainder of a division, with the sign of the dividend, and the low bits of the quotient.
fn rest(x: Finite, y: Finite, nearest: bool) -> (Option<Exact>, Quotient) {
    let distance = x.exponent - y.exponent;
    // A part of the quotient, so that each round takes at most 63 bits.
    let partial = distance >= 64;
    let steps = match partial {
        true => (distance & 0x1f | 0x20) as u32,
        false => distance.max(-1) as u32,
    };
    let (mut rest, mut bits) = (u128::from(x.significand), 0_u64);
    let divisor = u128::from(y.significand);
    let mut unit = x.exponent;
    if distance >= 0 {
        bits = u64::from(rest >= divisor);
        rest -= u128::from(bits) * divisor;
        for _ in 0..steps {
            rest <<= 1;
            let one = rest >= divisor;
            bits = bits << 1 | u64::from(one);
            rest -= if one { divisor } else { 0 };
        }
        unit -= steps as i32;
    }
    let mut sign = x.sign;
    // Below the divisor there is a fraction of one: which half it is in, and a tie to even.
    if nearest && !partial {
        let up = match distance {
            ..-1 => false,
            // The dividend counts half as much as the divisor.
            -1 => rest > divisor,
            _ => rest << 1 > divisor || rest << 1 == divisor && bits & 1 != 0,
        };
        if up {
            rest = match distance {
                -1 => (divisor << 1) - rest,
                _ => divisor - rest,
            };
            sign = !sign;
            bits += 1;
        }
    }
    let exact = (rest != 0).then(|| Exact::normalized(sign, unit + 64, rest, false));
    let quotient = match partial {
        true => Quotient::Partial,
        false => Quotient::Bits(bits as u8),
    };
    (exact, quotient)
}
