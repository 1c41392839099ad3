//! Numbers of the x87: 80 bits, of which the integer bit of the significand is explicit.

use crate::fpu::Extended;

/// Exponent of one, and of infinities and NaNs.
pub(crate) const BIAS: i32 = 16383;
pub(crate) const TOP: u16 = 0x7fff;
pub(crate) const INTEGER: u64 = 1 << 63;
const QUIET: u64 = 1 << 62;
/// The least exponent of a normal number.
pub(crate) const LEAST: i32 = 1 - BIAS;

/// The NaN that stands for the result of an invalid operation.
pub(crate) const INDEFINITE: Extended = pack(true, TOP, INTEGER | QUIET);

pub(crate) const fn pack(sign: bool, exponent: u16, significand: u64) -> Extended {
    significand as u128 | (exponent as u128 | (sign as u128) << 15) << 64
}

pub(crate) const fn zero(sign: bool) -> Extended {
    pack(sign, 0, 0)
}

pub(crate) const fn infinity(sign: bool) -> Extended {
    pack(sign, TOP, INTEGER)
}

pub(crate) const fn sign(v: Extended) -> bool {
    v >> 79 & 1 != 0
}

/// A finite number that is not zero: `significand / 2^63 * 2^exponent`, with bit 63 set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Finite {
    pub(crate) sign: bool,
    pub(crate) exponent: i32,
    pub(crate) significand: u64,
}

/// The kinds of numbers that operations tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Zero,
    Finite(Finite),
    Infinity,
    Quiet,
    Signalling,
    /// Formats of the 8087 that no processor since computes with: unnormals, pseudo-infinities,
    /// pseudo-NaNs.
    Unsupported,
}

pub(crate) fn kind(v: Extended) -> Kind {
    let exponent = (v >> 64) as u16 & TOP;
    let significand = v as u64;
    match (exponent, significand) {
        (0, 0) => Kind::Zero,
        (0, _) => {
            // A pseudo-denormal has the integer bit and the same exponent.
            let shift = significand.leading_zeros();
            Kind::Finite(Finite {
                sign: sign(v),
                exponent: LEAST - shift as i32,
                significand: significand << shift,
            })
        }
        (_, s) if s & INTEGER == 0 => Kind::Unsupported,
        (TOP, INTEGER) => Kind::Infinity,
        (TOP, s) if s & QUIET != 0 => Kind::Quiet,
        (TOP, _) => Kind::Signalling,
        _ => Kind::Finite(Finite {
            sign: sign(v),
            exponent: i32::from(exponent) - BIAS,
            significand,
        }),
    }
}

/// True for denormals and pseudo-denormals, which raise DE.
pub(crate) fn is_denormal(v: Extended) -> bool {
    (v >> 64) as u16 & TOP == 0 && v as u64 != 0
}

pub(crate) fn is_nan(v: Extended) -> bool {
    matches!(kind(v), Kind::Quiet | Kind::Signalling)
}

pub(crate) const fn quiet(v: Extended) -> Extended {
    v | QUIET as u128
}

/// The NaN that an operation on two operands gives, of which one is a NaN: the one with the larger
/// significand, then the positive one (Intel SDM volume 1, table 4-7).
pub(crate) fn propagate(a: Extended, b: Extended) -> Extended {
    let chosen = match (is_nan(a), is_nan(b)) {
        (true, false) => a,
        (false, true) => b,
        _ => {
            let signalling = |v| kind(v) == Kind::Signalling;
            match (signalling(a), signalling(b)) {
                (true, false) => b,
                (false, true) => a,
                _ if a as u64 != b as u64 => {
                    if a as u64 > b as u64 {
                        a
                    } else {
                        b
                    }
                }
                _ if sign(a) => b,
                _ => a,
            }
        }
    };
    quiet(chosen)
}
