//! F2XM1, FYL2X, FYL2XP1, FPATAN, FPTAN, FSIN, FCOS and FSINCOS.

use iced_x86::{Instruction, Mnemonic as M};

use super::{C2, Context};
use crate::exec::Exec;
use crate::fpu::Extended;
use crate::state::{Core, R};
use crate::x87::function::{arctan2, exp2m1, log2, log2p1, sine_cosine};
use crate::x87::number::{
    BIAS, Finite, INDEFINITE, Kind, infinity, is_denormal, is_nan, kind, pack, propagate, quiet,
    sign, zero,
};
use crate::x87::round::{DENORMAL, Exact, INVALID, ZERO_DIVIDE};
use crate::x87::wide::Wide;

const ONE: Extended = pack(false, BIAS as u16, 1 << 63);

pub(super) fn select(m: M) -> Option<Exec> {
    Some(match m {
        M::F2xm1 => exponential,
        M::Fyl2x => |c, i| two(c, i, logarithm),
        M::Fyl2xp1 => |c, i| two(c, i, logarithm_of_one_and),
        M::Fpatan => |c, i| two(c, i, angle),
        M::Fsin | M::Fcos | M::Fsincos | M::Fptan => circular,
        _ => return None,
    })
}

/// NaNs and unsupported numbers: what they give.
fn special(x: &mut Context, values: &[Extended]) -> Option<Extended> {
    let any = |wanted| values.iter().any(|v| kind(*v) == wanted);
    if any(Kind::Unsupported) {
        return Some(x.invalid());
    }
    if any(Kind::Signalling) {
        x.raise(INVALID);
    }
    if values.iter().any(|v| is_nan(*v)) {
        return Some(match values {
            [a, b] => propagate(*a, *b),
            _ => quiet(values[0]),
        });
    }
    if values.iter().any(|v| is_denormal(*v)) {
        x.raise(DENORMAL);
    }
    None
}

fn exponential(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_begin(i)?;
    if c.fpu.is_empty(0) {
        c.x87_underflow(0);
        return Ok(());
    }
    let v = c.fpu.st(0);
    let mut x = c.x87_context().full();
    let value = match special(&mut x, &[v]) {
        Some(nan) => nan,
        None => match kind(v) {
            Kind::Infinity if sign(v) => ONE | 1 << 79,
            Kind::Finite(f) if f.exponent < 0 => x.finish(exp2m1(f).into()),
            Kind::Finite(f) if f.exponent == 0 && f.significand == 1 << 63 => match f.sign {
                // 2^-1 - 1
                true => pack(true, BIAS as u16 - 1, 1 << 63),
                false => v,
            },
            // Out of range: undefined by the architecture.
            _ => v,
        },
    };
    c.x87_result(&x, 0, value);
    Ok(())
}

/// An instruction on ST(1) and ST(0) that pops.
fn two(
    c: &mut Core,
    i: &Instruction,
    compute: fn(&mut Context, Extended, Extended) -> Extended,
) -> R<()> {
    c.x87_begin(i)?;
    let used = if c.fpu.is_empty(0) || c.fpu.is_empty(1) {
        c.x87_underflow(1)
    } else {
        let (a, b) = (c.fpu.st(1), c.fpu.st(0));
        let mut x = c.x87_context().full();
        let value = match special(&mut x, &[a, b]) {
            Some(nan) => nan,
            None => compute(&mut x, a, b),
        };
        if x.raised & (INVALID | ZERO_DIVIDE) != 0 {
            // These come first.
            x.raised &= !DENORMAL;
        }
        c.x87_result(&x, 1, value)
    };
    if used {
        c.fpu.pop();
    }
    Ok(())
}

/// `y * factor`, for a factor that is not zero.
fn times(x: &mut Context, y: Extended, factor: Wide) -> Extended {
    match kind(y) {
        Kind::Finite(f) => x.finish(Wide::from(f).mul(factor).into()),
        Kind::Infinity => infinity(sign(y) != factor.sign),
        _ => zero(sign(y) != factor.sign),
    }
}

/// `y * log2(v)`.
fn logarithm(x: &mut Context, y: Extended, v: Extended) -> Extended {
    let f = match kind(v) {
        Kind::Zero => {
            return match kind(y) {
                Kind::Zero => x.invalid(),
                Kind::Infinity => infinity(!sign(y)),
                _ => {
                    x.raise(ZERO_DIVIDE);
                    infinity(!sign(y))
                }
            };
        }
        Kind::Infinity if !sign(v) => {
            return match kind(y) {
                Kind::Zero => x.invalid(),
                _ => infinity(sign(y)),
            };
        }
        Kind::Finite(f) if !f.sign => f,
        _ => return x.invalid(),
    };
    let one = f.exponent == 0 && f.significand == 1 << 63;
    match kind(y) {
        Kind::Infinity if one => x.invalid(),
        _ if one => zero(sign(y)),
        // An exact power of two.
        Kind::Finite(g) if f.significand == 1 << 63 => {
            let product = Wide::from(g).mul(Wide::integer(f.exponent));
            x.finish(Exact {
                more: false,
                ..product.into()
            })
        }
        _ => times(x, y, log2(f)),
    }
}

/// `y * log2(v + 1)`.
fn logarithm_of_one_and(x: &mut Context, y: Extended, v: Extended) -> Extended {
    let least = Finite {
        sign: true,
        exponent: -1,
        significand: u64::MAX,
    };
    match kind(v) {
        Kind::Zero => match kind(y) {
            Kind::Infinity => x.invalid(),
            _ => zero(sign(y) != sign(v)),
        },
        Kind::Infinity if !sign(v) => match kind(y) {
            Kind::Zero => x.invalid(),
            _ => infinity(sign(y)),
        },
        Kind::Finite(f) if f.sign && f.exponent > least.exponent => x.invalid(),
        Kind::Finite(f) => times(x, y, log2p1(f)),
        _ => x.invalid(),
    }
}

fn angle(x: &mut Context, y: Extended, v: Extended) -> Extended {
    let quarter = Wide::PI.scaled(-2);
    let signed = |angle: Wide| Wide {
        sign: sign(y),
        ..angle
    };
    let flat = match (kind(y), kind(v)) {
        (Kind::Infinity, Kind::Infinity) => {
            let three = quarter.mul(Wide::integer(3));
            Some(if sign(v) { three } else { quarter })
        }
        (Kind::Infinity, _) => Some(quarter.scaled(1)),
        (Kind::Finite(_), Kind::Zero) => Some(quarter.scaled(1)),
        (Kind::Finite(_) | Kind::Zero, Kind::Infinity) | (Kind::Zero, _) => match sign(v) {
            true => Some(Wide::PI),
            false => return zero(sign(y)),
        },
        _ => None,
    };
    if let Some(flat) = flat {
        return x.finish(signed(flat).into());
    }
    match (kind(y), kind(v)) {
        (Kind::Finite(a), Kind::Finite(b)) => x.finish(arctan2(a, b).into()),
        _ => x.invalid(),
    }
}

/// FSIN, FCOS, FSINCOS and FPTAN.
fn circular(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_begin(i)?;
    let m = i.mnemonic();
    let pushes = matches!(m, M::Fsincos | M::Fptan);
    let empty = c.fpu.is_empty(0);
    c.fpu.status &= !C2;
    if empty || pushes && !c.fpu.is_empty(7) {
        if c.stack_fault(!empty) {
            c.fpu.set_st(0, INDEFINITE);
            if pushes {
                let top = c.fpu.top();
                c.fpu.set_top(top + 7);
                c.fpu.set_st(0, INDEFINITE);
            }
        }
        return Ok(());
    }
    let v = c.fpu.st(0);
    let mut x = c.x87_context().full();
    let (first, second) = match special(&mut x, &[v]) {
        Some(nan) => (nan, nan),
        None => match kind(v) {
            Kind::Infinity => (x.invalid(), INDEFINITE),
            Kind::Zero if m == M::Fcos => (ONE, ONE),
            Kind::Finite(f) => {
                let Some((sine, cosine)) = sine_cosine(f) else {
                    c.fpu.status |= C2;
                    return Ok(());
                };
                match m {
                    M::Fcos => (x.finish(cosine.into()), ONE),
                    M::Fsin => (x.finish(sine.into()), ONE),
                    M::Fptan => (x.finish(sine.div(cosine).into()), ONE),
                    _ => (x.finish(sine.into()), x.finish(cosine.into())),
                }
            }
            _ => (v, ONE),
        },
    };
    if c.x87_result(&x, 0, first) && pushes {
        c.x87_push(second);
    }
    Ok(())
}
