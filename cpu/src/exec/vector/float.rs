//! Floating-point instructions of SSE.

use iced_x86::{Instruction, Mnemonic as M, Register};
use rustc_apfloat::ieee::{Double, Single};
use rustc_apfloat::{Float, Round};

use super::ieee::{Context, DENORMAL, INVALID, Op, ZERO_DIVIDE, widen};
use super::number;
use crate::exec::Exec;
use crate::fault::Exception;
use crate::flags::{self, sign};
use crate::operand::operand_size;
use crate::state::{CR4_OSXMMEXCPT, Core, R};

/// Operation, lane size and scalar or not.
fn arithmetic_of(m: M) -> Option<(Op, u32, bool)> {
    Some(match m {
        M::Addps => (Op::Add, 4, false),
        M::Addpd => (Op::Add, 8, false),
        M::Addss => (Op::Add, 4, true),
        M::Addsd => (Op::Add, 8, true),
        M::Subps => (Op::Sub, 4, false),
        M::Subpd => (Op::Sub, 8, false),
        M::Subss => (Op::Sub, 4, true),
        M::Subsd => (Op::Sub, 8, true),
        M::Mulps => (Op::Mul, 4, false),
        M::Mulpd => (Op::Mul, 8, false),
        M::Mulss => (Op::Mul, 4, true),
        M::Mulsd => (Op::Mul, 8, true),
        M::Divps => (Op::Div, 4, false),
        M::Divpd => (Op::Div, 8, false),
        M::Divss => (Op::Div, 4, true),
        M::Divsd => (Op::Div, 8, true),
        M::Minps => (Op::Min, 4, false),
        M::Minpd => (Op::Min, 8, false),
        M::Minss => (Op::Min, 4, true),
        M::Minsd => (Op::Min, 8, true),
        M::Maxps => (Op::Max, 4, false),
        M::Maxpd => (Op::Max, 8, false),
        M::Maxss => (Op::Max, 4, true),
        M::Maxsd => (Op::Max, 8, true),
        M::Sqrtps => (Op::Sqrt, 4, false),
        M::Sqrtpd => (Op::Sqrt, 8, false),
        M::Sqrtss => (Op::Sqrt, 4, true),
        M::Sqrtsd => (Op::Sqrt, 8, true),
        _ => return None,
    })
}

pub(super) fn select(m: M) -> Option<Exec> {
    if arithmetic_of(m).is_some() {
        return Some(arithmetic);
    }
    Some(match m {
        M::Cmpps | M::Cmppd | M::Cmpss | M::Cmpsd => compare,
        M::Comiss | M::Comisd | M::Ucomiss | M::Ucomisd => compare_flags,
        M::Cvtsi2ss | M::Cvtsi2sd => from_integer,
        M::Cvtss2si | M::Cvtsd2si | M::Cvttss2si | M::Cvttsd2si => to_integer,
        M::Cvtss2sd | M::Cvtsd2ss | M::Cvtps2pd | M::Cvtpd2ps => between_formats,
        M::Cvtdq2ps | M::Cvtdq2pd => packed_from_integers,
        M::Cvtps2dq | M::Cvttps2dq | M::Cvtpd2dq | M::Cvttpd2dq => packed_to_integers,
        M::Roundps | M::Roundpd | M::Roundss | M::Roundsd => round,
        M::Haddps | M::Haddpd | M::Hsubps | M::Hsubpd | M::Addsubps | M::Addsubpd => across,
        M::Dpps | M::Dppd => dot_product,
        M::Rcpps | M::Rcpss | M::Rsqrtps | M::Rsqrtss => reciprocal,
        _ => return None,
    })
}

fn lane(v: u128, n: u32, size: u32) -> u128 {
    v >> (n * size * 8) & u128::MAX >> (128 - size * 8)
}

impl Core {
    /// Sets MXCSR's flags; #XM if one is not masked.
    pub(in crate::exec) fn raise(&mut self, x: &Context) -> R<()> {
        // Results do not count if the operands already fault.
        let early = x.raised & (INVALID | DENORMAL | ZERO_DIVIDE);
        let unmasked = !(self.fpu.mxcsr >> 7);
        let raised = if early & unmasked != 0 {
            early
        } else {
            x.raised
        };
        self.fpu.mxcsr |= raised;
        if raised & unmasked & 0x3f != 0 {
            if self.cr4 & CR4_OSXMMEXCPT == 0 {
                return Err(self.ud());
            }
            return Err(self.fault(Exception::plain(Exception::XM)));
        }
        Ok(())
    }
}

fn one(x: &mut Context, op: Op, size: u32, a: u128, b: u128) -> u128 {
    if size == 4 {
        x.arithmetic::<Single>(op, a, b)
    } else {
        x.arithmetic::<Double>(op, a, b)
    }
}

fn arithmetic(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let Some((op, size, scalar)) = arithmetic_of(i.mnemonic()) else {
        return Err(c.missing(i.code()));
    };
    let b = c.vector_operand(i, 1)?;
    let n = number(i.op0_register());
    let mut r = c.fpu.xmm[n];
    let mut x = Context::new(c.fpu.mxcsr);
    for k in 0..if scalar { 1 } else { 16 / size } {
        let v = one(&mut x, op, size, lane(r, k, size), lane(b, k, size));
        r = put(r, k, size, v);
    }
    c.raise(&x)?;
    c.fpu.xmm[n] = r;
    Ok(())
}

/// Replaces a lane.
fn put(v: u128, n: u32, size: u32, lane: u128) -> u128 {
    let mask = u128::MAX >> (128 - size * 8) << (n * size * 8);
    v & !mask | lane << (n * size * 8) & mask
}

/// Outcomes of a comparison, as bits: less, equal, greater, unordered.
const UNORDERED: u8 = 8;

/// The outcomes for which a predicate holds, and if quiet NaNs are no exception.
fn relation(predicate: u8) -> (u8, bool) {
    const TRUTH: [u8; 16] = [2, 1, 3, 8, 13, 14, 12, 7, 10, 9, 11, 0, 5, 6, 4, 15];
    // Predicates 1, 2, 5, 6, 9, 10, 13 and 14 signal; from 16 on it is the other way round.
    let signals = matches!(predicate & 3, 1 | 2);
    (
        TRUTH[usize::from(predicate & 15)],
        signals == (predicate & 16 != 0),
    )
}

fn compare(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let (size, scalar) = match i.mnemonic() {
        M::Cmpps => (4, false),
        M::Cmppd => (8, false),
        M::Cmpss => (4, true),
        _ => (8, true),
    };
    // VEX forms, which run on scratch registers, have 32 predicates.
    let known = if i.op0_register() == Register::XMM16 {
        31
    } else {
        7
    };
    let predicate = i.immediate8() & known;
    let (truth, quiet) = relation(predicate);
    let b = c.vector_operand(i, 1)?;
    let n = number(i.op0_register());
    let mut r = c.fpu.xmm[n];
    let mut x = Context::new(c.fpu.mxcsr);
    for k in 0..if scalar { 1 } else { 16 / size } {
        let (p, q) = (lane(r, k, size), lane(b, k, size));
        let order = if size == 4 {
            x.compare::<Single>(p, q, quiet)
        } else {
            x.compare::<Double>(p, q, quiet)
        };
        let bit = order.map_or(UNORDERED, |o| 1 << (o as i8 + 1));
        let all = if truth & bit != 0 { u128::MAX } else { 0 };
        r = put(r, k, size, all);
    }
    c.raise(&x)?;
    c.fpu.xmm[n] = r;
    Ok(())
}

fn compare_flags(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let b = c.vector_operand(i, 1)?;
    let a = c.fpu.xmm[number(i.op0_register())];
    let quiet = matches!(i.mnemonic(), M::Ucomiss | M::Ucomisd);
    let mut x = Context::new(c.fpu.mxcsr);
    let order = if matches!(i.mnemonic(), M::Comiss | M::Ucomiss) {
        x.compare::<Single>(lane(a, 0, 4), lane(b, 0, 4), quiet)
    } else {
        x.compare::<Double>(lane(a, 0, 8), lane(b, 0, 8), quiet)
    };
    c.raise(&x)?;
    use core::cmp::Ordering as O;
    c.f.set(match order {
        None => flags::ZF | flags::PF | flags::CF,
        Some(O::Greater) => 0,
        Some(O::Less) => flags::CF,
        Some(O::Equal) => flags::ZF,
    });
    Ok(())
}

fn from_integer(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let value = i128::from(sign(c.get(i, 1)?, operand_size(i, 1)) as i64);
    let n = number(i.op0_register());
    let mut x = Context::new(c.fpu.mxcsr);
    let r = if i.mnemonic() == M::Cvtsi2ss {
        let r = Single::from_i128_r(value, x.round());
        put(
            c.fpu.xmm[n],
            0,
            4,
            x.finish(r.status, r.value, || widen(r.value)),
        )
    } else {
        let r = Double::from_i128_r(value, x.round());
        put(
            c.fpu.xmm[n],
            0,
            8,
            x.finish(r.status, r.value, || widen(r.value)),
        )
    };
    c.raise(&x)?;
    c.fpu.xmm[n] = r;
    Ok(())
}

fn to_integer(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let single = matches!(i.mnemonic(), M::Cvtss2si | M::Cvttss2si);
    let truncates = matches!(i.mnemonic(), M::Cvttss2si | M::Cvttsd2si);
    let from = if single { 4 } else { 8 };
    let a = lane(c.vector_operand(i, 1)?, 0, from);
    let mut x = Context::new(c.fpu.mxcsr);
    let round = if truncates {
        Round::TowardZero
    } else {
        x.round()
    };
    let size = operand_size(i, 0);
    let r = if single {
        x.integer::<Single>(a, size, round)
    } else {
        x.integer::<Double>(a, size, round)
    };
    c.raise(&x)?;
    c.put(i, 0, r)
}

fn between_formats(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let b = c.vector_operand(i, 1)?;
    let n = number(i.op0_register());
    let old = c.fpu.xmm[n];
    let mut x = Context::new(c.fpu.mxcsr);
    let r = match i.mnemonic() {
        M::Cvtss2sd => put(old, 0, 8, x.convert::<Single, Double>(lane(b, 0, 4))),
        M::Cvtsd2ss => put(old, 0, 4, x.convert::<Double, Single>(lane(b, 0, 8))),
        M::Cvtps2pd => {
            let low = x.convert::<Single, Double>(lane(b, 0, 4));
            low | x.convert::<Single, Double>(lane(b, 1, 4)) << 64
        }
        _ => {
            let low = x.convert::<Double, Single>(lane(b, 0, 8));
            low | x.convert::<Double, Single>(lane(b, 1, 8)) << 32
        }
    };
    c.raise(&x)?;
    c.fpu.xmm[n] = r;
    Ok(())
}

fn packed_from_integers(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let b = c.vector_operand(i, 1)?;
    let mut x = Context::new(c.fpu.mxcsr);
    let mut r = 0;
    let double = i.mnemonic() == M::Cvtdq2pd;
    for k in 0..if double { 2 } else { 4 } {
        let value = i128::from(lane(b, k, 4) as i32);
        if double {
            r = put(r, k, 8, Double::from_i128(value).value.to_bits());
        } else {
            let v = Single::from_i128_r(value, x.round());
            r = put(r, k, 4, x.finish(v.status, v.value, || widen(v.value)));
        }
    }
    c.raise(&x)?;
    c.fpu.xmm[number(i.op0_register())] = r;
    Ok(())
}

fn packed_to_integers(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let m = i.mnemonic();
    let b = c.vector_operand(i, 1)?;
    let mut x = Context::new(c.fpu.mxcsr);
    let truncates = matches!(m, M::Cvttps2dq | M::Cvttpd2dq);
    let round = if truncates {
        Round::TowardZero
    } else {
        x.round()
    };
    let mut r = 0;
    if matches!(m, M::Cvtps2dq | M::Cvttps2dq) {
        for k in 0..4 {
            r = put(r, k, 4, x.integer::<Single>(lane(b, k, 4), 4, round).into());
        }
    } else {
        for k in 0..2 {
            r = put(r, k, 4, x.integer::<Double>(lane(b, k, 8), 4, round).into());
        }
    }
    c.raise(&x)?;
    c.fpu.xmm[number(i.op0_register())] = r;
    Ok(())
}

fn round(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let (size, scalar) = match i.mnemonic() {
        M::Roundps => (4, false),
        M::Roundpd => (8, false),
        M::Roundss => (4, true),
        _ => (8, true),
    };
    let b = c.vector_operand(i, 1)?;
    let n = number(i.op0_register());
    let mut r = c.fpu.xmm[n];
    let mut x = Context::new(c.fpu.mxcsr);
    for k in 0..if scalar { 1 } else { 16 / size } {
        let a = lane(b, k, size);
        let v = if size == 4 {
            x.rounded::<Single>(a, i.immediate8())
        } else {
            x.rounded::<Double>(a, i.immediate8())
        };
        r = put(r, k, size, v);
    }
    c.raise(&x)?;
    c.fpu.xmm[n] = r;
    Ok(())
}

/// RCP and RSQRT, which architecture defines up to a relative error of 1.5 * 2^-12; here the last bit is right.
/// They know no exceptions, and no denormals.
fn reciprocal(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    const ONE: u128 = 0x3f80_0000;
    /// Denormals as zeros, flush to zero, all masked.
    const CONTROL: u32 = 1 << 6 | 1 << 15 | 0x1f80;
    let root = matches!(i.mnemonic(), M::Rsqrtps | M::Rsqrtss);
    let scalar = matches!(i.mnemonic(), M::Rcpss | M::Rsqrtss);
    let b = c.vector_operand(i, 1)?;
    let to = &mut c.fpu.xmm[number(i.op0_register())];
    let mut x = Context::new(CONTROL);
    for k in 0..if scalar { 1 } else { 4 } {
        let mut v = lane(b, k, 4);
        if root {
            v = x.arithmetic::<Single>(Op::Sqrt, v, v);
        }
        *to = put(*to, k, 4, x.arithmetic::<Single>(Op::Div, ONE, v));
    }
    Ok(())
}

/// Horizontal additions and subtractions, and ADDSUB.
fn across(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let m = i.mnemonic();
    let size = if matches!(m, M::Haddps | M::Hsubps | M::Addsubps) {
        4
    } else {
        8
    };
    let b = c.vector_operand(i, 1)?;
    let n = number(i.op0_register());
    let a = c.fpu.xmm[n];
    let mut x = Context::new(c.fpu.mxcsr);
    let lanes = 16 / size;
    let mut r = 0;
    for k in 0..lanes {
        let (op, p, q) = if matches!(m, M::Addsubps | M::Addsubpd) {
            let op = if k & 1 == 0 { Op::Sub } else { Op::Add };
            (op, lane(a, k, size), lane(b, k, size))
        } else {
            let from = if k < lanes / 2 { a } else { b };
            let at = k % (lanes / 2) * 2;
            let op = if matches!(m, M::Haddps | M::Haddpd) {
                Op::Add
            } else {
                Op::Sub
            };
            (op, lane(from, at, size), lane(from, at + 1, size))
        };
        r = put(r, k, size, one(&mut x, op, size, p, q));
    }
    c.raise(&x)?;
    c.fpu.xmm[n] = r;
    Ok(())
}

fn dot_product(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let size = if i.mnemonic() == M::Dpps { 4 } else { 8 };
    let imm = i.immediate8();
    let b = c.vector_operand(i, 1)?;
    let n = number(i.op0_register());
    let a = c.fpu.xmm[n];
    let mut x = Context::new(c.fpu.mxcsr);
    let mut products = [0; 4];
    for k in 0..16 / size {
        if imm >> (4 + k) & 1 != 0 {
            products[k as usize] = one(&mut x, Op::Mul, size, lane(a, k, size), lane(b, k, size));
        }
    }
    let mut sum = one(&mut x, Op::Add, size, products[0], products[1]);
    if size == 4 {
        let upper = one(&mut x, Op::Add, size, products[2], products[3]);
        sum = one(&mut x, Op::Add, size, sum, upper);
    }
    let mut r = 0;
    for k in 0..16 / size {
        if imm >> k & 1 != 0 {
            r = put(r, k, size, sum);
        }
    }
    c.raise(&x)?;
    c.fpu.xmm[n] = r;
    Ok(())
}
