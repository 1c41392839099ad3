//! Exponentials, logarithms and trigonometry, by series with 128 bits.
//!
//! Angles are reduced by pi with 66 bits, as Intel's processors do (Intel SDM volume 1, 8.3.8).

use super::number::Finite;
use super::wide::Wide;

/// pi with 66 bits, as an integer: times 2^-64.
const PI66: u128 = 0x3_243f_6a88_85a3_08d3;
const _: () = assert!(PI66 >> 64 == 3);

/// Terms that are smaller than this change nothing.
const SMALL: i32 = 130;

/// Sums a series until its terms are too small to count.
fn series(first: Wide, mut next: impl FnMut(Wide, u32) -> Wide) -> Wide {
    let (mut sum, mut term) = (first, first);
    for n in 1..400 {
        term = next(term, n);
        if term.is_zero() || sum.exponent - term.exponent > SMALL {
            break;
        }
        sum = sum.add(term);
    }
    sum
}

/// `2^x - 1` for x from -1 to 1.
pub(crate) fn exp2m1(x: Finite) -> Wide {
    let t = Wide::from(x).mul(Wide::LN2);
    series(t, |term, n| term.mul(t).over(n + 1))
}

/// `2 * artanh(s)`.
fn artanh2(s: Wide) -> Wide {
    let square = s.mul(s);
    let mut power = s;
    let sum = series(s, |_, n| {
        power = power.mul(square);
        power.over(2 * n + 1)
    });
    sum.scaled(1)
}

/// The binary logarithm of a positive number.
pub(crate) fn log2(x: Finite) -> Wide {
    // A significand around one: from 0.707 to 1.414.
    let above = x.significand > 0xb504_f333_f9de_6484;
    let exponent = x.exponent + i32::from(above);
    let m = Wide {
        exponent: -i32::from(above),
        sign: false,
        ..x.into()
    };
    let s = m.sub(Wide::ONE).div(m.add(Wide::ONE));
    let fraction = artanh2(s).div(Wide::LN2);
    Wide::integer(exponent).add(fraction)
}

/// The binary logarithm of `1 + x`.
pub(crate) fn log2p1(x: Finite) -> Wide {
    let x = Wide::from(x);
    artanh2(x.div(x.add(Wide::integer(2)))).div(Wide::LN2)
}

/// The arc tangent of a number from 0 to 1 (Euler's series).
fn arctan(r: Wide) -> Wide {
    let square = r.mul(r);
    let whole = Wide::ONE.add(square);
    let factor = square.div(whole);
    series(r.div(whole), |term, n| {
        term.mul(factor)
            .mul(Wide::integer(2 * n as i32))
            .over(2 * n + 1)
    })
}

/// The angle of a point that lies on neither axis.
pub(crate) fn arctan2(y: Finite, x: Finite) -> Wide {
    let (a, b) = (
        Wide {
            sign: false,
            ..y.into()
        },
        Wide {
            sign: false,
            ..x.into()
        },
    );
    let steep = (a.exponent, a.significand) > (b.exponent, b.significand);
    let mut angle = match steep {
        false => arctan(a.div(b)),
        true => Wide::PI.scaled(-1).sub(arctan(b.div(a))),
    };
    if x.sign {
        angle = Wide::PI.sub(angle);
    }
    Wide {
        sign: y.sign,
        ..angle
    }
}

/// An angle less a multiple of pi/2: from -pi/4 to pi/4, and the multiple modulo 4. `None` from 2^63 on.
fn reduced(x: Finite) -> Option<(Wide, u8)> {
    if x.exponent >= 63 {
        return None;
    }
    if x.exponent < -1 {
        return Some((
            Wide {
                sign: false,
                ..x.into()
            },
            0,
        ));
    }
    // Both as integers times 2^-65 and less: the divisor pi/2 is PI66 * 2^-65.
    let shift = x.exponent - 63 + 65;
    // 64 bits of the number and at most two more fit; the rest of the shift goes bit by bit.
    let (mut rest, mut quotient) = (u128::from(x.significand) << 2, 0_u64);
    let mut places = shift - 2;
    if places < 0 {
        // The number is below 4, so the divisor is moved instead.
        let divisor = PI66 << -places;
        quotient = (rest / divisor) as u64;
        rest %= divisor;
    } else {
        quotient += (rest / PI66) as u64;
        rest %= PI66;
        while places > 0 {
            rest <<= 1;
            quotient = quotient.wrapping_mul(2);
            if rest >= PI66 {
                rest -= PI66;
                quotient = quotient.wrapping_add(1);
            }
            places -= 1;
        }
    }
    let unit = -65 + (shift - 2).min(0);
    let divisor = PI66 << (shift - 2).min(0).unsigned_abs();
    let (magnitude, sign) = match rest << 1 > divisor {
        true => {
            quotient = quotient.wrapping_add(1);
            (divisor - rest, true)
        }
        false => (rest, false),
    };
    let angle = Wide::normalized(sign, unit + 127, magnitude);
    Some((angle, (quotient & 3) as u8))
}

fn sine(r: Wide) -> Wide {
    let square = r.mul(r).negated();
    series(r, |term, n| term.mul(square).over(2 * n).over(2 * n + 1))
}

fn cosine(r: Wide) -> Wide {
    let square = r.mul(r).negated();
    series(Wide::ONE, |term, n| {
        term.mul(square).over(2 * n - 1).over(2 * n)
    })
}

/// Sine and cosine; `None` for an angle that is out of range.
pub(crate) fn sine_cosine(x: Finite) -> Option<(Wide, Wide)> {
    let (r, quadrant) = reduced(x)?;
    let (s, c) = (sine(r), cosine(r));
    let (s, c) = match quadrant {
        0 => (s, c),
        1 => (c, s.negated()),
        2 => (s.negated(), c.negated()),
        _ => (c.negated(), s),
    };
    let s = if x.sign { s.negated() } else { s };
    Some((s, c))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::x87::number::{Kind, kind};
    use crate::x87::round::Context;

    fn finite(v: f64) -> Finite {
        let mut x = Context::new(0x37f);
        match kind(x.load(v.to_bits(), crate::x87::convert::DOUBLE)) {
            Kind::Finite(f) => f,
            other => panic!("{v} is {other:?}"),
        }
    }

    fn double(v: Wide) -> f64 {
        let magnitude = (v.significand >> 64) as f64 * 2_f64.powi(v.exponent - 63);
        if v.sign { -magnitude } else { magnitude }
    }

    #[test]
    fn functions_are_those_of_the_standard_library_to_its_precision() {
        let close = |ours: Wide, theirs: f64, what: &str| {
            let error = (double(ours) - theirs).abs();
            assert!(error <= 4e-15 * theirs.abs().max(1e-3), "{what}: {error:e}");
        };
        for n in 1..4000 {
            let x = f64::from(n) * 0.173 * if n % 2 == 0 { -1.0 } else { 1.0 };
            let f = finite(x);
            let (s, c) = sine_cosine(f).expect("in range");
            close(s, x.sin(), "sine");
            close(c, x.cos(), "cosine");
            let positive = finite(x.abs());
            close(log2(positive), x.abs().log2(), "logarithm");
            let small = x / 700.0;
            let f = finite(small);
            close(
                exp2m1(f),
                (small * core::f64::consts::LN_2).exp_m1(),
                "exponential",
            );
            let theirs = (small * 0.4).ln_1p() / core::f64::consts::LN_2;
            close(log2p1(finite(small * 0.4)), theirs, "logarithm of one and");
            let other = f64::from(n % 97) - 48.5;
            close(arctan2(f, finite(other)), small.atan2(other), "angle");
            close(arctan2(finite(other), f), other.atan2(small), "angle");
        }
        assert!(sine_cosine(finite(2_f64.powi(63))).is_none());
        assert!(sine_cosine(finite(-(2_f64.powi(62)))).is_some());
    }
}
