//! Instructions that compute.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::{C0, C1, C2, C3, stack_register};
use crate::exec::Exec;
use crate::fpu::Extended;
use crate::state::{Core, R};
use crate::x87::arith::Quotient;
use crate::x87::convert::{DOUBLE, SINGLE, extract, from_integer};
use crate::x87::number::{INDEFINITE, Kind, infinity, is_denormal, kind, quiet};
use crate::x87::round::{Context, DENORMAL, INVALID, ZERO_DIVIDE};

type Operation = fn(&mut Context, Extended, Extended) -> Extended;

/// The operation on destination and source, and if it pops.
fn operation(m: M) -> Option<(Operation, bool)> {
    Some(match m {
        M::Fadd | M::Fiadd => (Context::add, false),
        M::Faddp => (Context::add, true),
        M::Fsub | M::Fisub => (Context::sub, false),
        M::Fsubp => (Context::sub, true),
        M::Fsubr | M::Fisubr => (|x, a, b| x.sub(b, a), false),
        M::Fsubrp => (|x, a, b| x.sub(b, a), true),
        M::Fmul | M::Fimul => (Context::mul, false),
        M::Fmulp => (Context::mul, true),
        M::Fdiv | M::Fidiv => (Context::div, false),
        M::Fdivp => (Context::div, true),
        M::Fdivr | M::Fidivr => (|x, a, b| x.div(b, a), false),
        M::Fdivrp => (|x, a, b| x.div(b, a), true),
        _ => return None,
    })
}

pub(super) fn select(m: M) -> Option<Exec> {
    if operation(m).is_some() {
        return Some(binary);
    }
    Some(match m {
        M::Fsqrt => |c, i| unary(c, i, Context::sqrt),
        M::Frndint => |c, i| unary(c, i, Context::round_to_integer),
        M::Fabs => |c, i| unary(c, i, |_, v| v & !(1 << 79)),
        M::Fchs => |c, i| unary(c, i, |_, v| v ^ 1 << 79),
        M::Fscale => scale,
        M::Fxtract => split,
        M::Fprem => |c, i| remainder(c, i, false),
        M::Fprem1 => |c, i| remainder(c, i, true),
        _ => return None,
    })
}

impl Core {
    /// A memory operand of arithmetic, widened.
    pub(super) fn x87_operand(&mut self, i: &Instruction, x: &mut Context) -> R<Extended> {
        let integer = matches!(
            i.mnemonic(),
            M::Fiadd
                | M::Fisub
                | M::Fisubr
                | M::Fimul
                | M::Fidiv
                | M::Fidivr
                | M::Ficom
                | M::Ficomp
        );
        let value = self.get(i, 0)?;
        let value = match (integer, i.memory_size().size()) {
            (true, 2) => from_integer(i64::from(value as i16)),
            (true, _) => from_integer(i64::from(value as i32)),
            (false, 4) => x.widen(value, SINGLE),
            (false, _) => x.widen(value, DOUBLE),
        };
        // Other exceptions of the operation come before this one.
        x.narrow_denormal = x.raised & DENORMAL != 0;
        x.raised &= !DENORMAL;
        Ok(value)
    }

    /// A result for ST(`to`), unless an exception keeps it.
    pub(super) fn x87_result(&mut self, x: &Context, to: usize, value: Extended) -> bool {
        let used = self.x87_raise(x);
        if used {
            self.fpu.set_st(to, value);
        }
        used
    }

    /// The indefinite number for ST(`to`) after a stack fault, if that is masked.
    pub(super) fn x87_underflow(&mut self, to: usize) -> bool {
        let used = self.stack_fault(false);
        if used {
            self.fpu.set_st(to, INDEFINITE);
        }
        used
    }
}

fn binary(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_wait()?;
    let Some((compute, pops)) = operation(i.mnemonic()) else {
        return Err(c.ud());
    };
    let mut x = c.x87_context();
    let memory = i.op0_kind() == OpKind::Memory;
    let (to, source, empty) = if memory {
        let value = c.x87_operand(i, &mut x)?;
        (0, value, c.fpu.is_empty(0))
    } else {
        let (to, from) = (
            stack_register(i.op0_register()),
            stack_register(i.op1_register()),
        );
        let empty = c.fpu.is_empty(to) || c.fpu.is_empty(from);
        (to, c.fpu.st(from), empty)
    };
    c.x87_begin(i)?;
    let used = if empty {
        c.x87_underflow(to)
    } else {
        let value = compute(&mut x, c.fpu.st(to), source);
        c.x87_result(&x, to, value)
    };
    if used && pops {
        c.fpu.pop();
    }
    Ok(())
}

fn unary(c: &mut Core, i: &Instruction, compute: fn(&mut Context, Extended) -> Extended) -> R<()> {
    c.x87_begin(i)?;
    if c.fpu.is_empty(0) {
        c.x87_underflow(0);
        return Ok(());
    }
    let mut x = c.x87_context();
    let value = compute(&mut x, c.fpu.st(0));
    c.x87_result(&x, 0, value);
    Ok(())
}

fn scale(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_begin(i)?;
    if c.fpu.is_empty(0) || c.fpu.is_empty(1) {
        c.x87_underflow(0);
        return Ok(());
    }
    let mut x = c.x87_context();
    let value = x.scale(c.fpu.st(0), c.fpu.st(1));
    c.x87_result(&x, 0, value);
    Ok(())
}

/// FXTRACT: ST(0) becomes the exponent, and the significand is pushed.
fn split(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_begin(i)?;
    let empty = c.fpu.is_empty(0);
    if empty || !c.fpu.is_empty(7) {
        if c.stack_fault(!empty) {
            c.fpu.set_st(0, INDEFINITE);
            let top = c.fpu.top();
            c.fpu.set_top(top + 7);
            c.fpu.set_st(0, INDEFINITE);
        }
        return Ok(());
    }
    let mut x = c.x87_context();
    let v = c.fpu.st(0);
    let (exponent, significand) = match kind(v) {
        Kind::Zero => {
            x.raise(ZERO_DIVIDE);
            (infinity(true), v)
        }
        Kind::Infinity => (infinity(false), v),
        Kind::Unsupported => {
            x.raise(INVALID);
            (INDEFINITE, INDEFINITE)
        }
        Kind::Signalling => {
            x.raise(INVALID);
            (quiet(v), quiet(v))
        }
        Kind::Quiet => (v, v),
        Kind::Finite(f) => {
            if is_denormal(v) {
                x.raise(DENORMAL);
            }
            extract(f)
        }
    };
    if c.x87_result(&x, 0, exponent) {
        c.x87_push(significand);
    }
    Ok(())
}

fn remainder(c: &mut Core, i: &Instruction, nearest: bool) -> R<()> {
    c.x87_begin(i)?;
    c.fpu.status &= !C2;
    if c.fpu.is_empty(0) || c.fpu.is_empty(1) {
        c.x87_underflow(0);
        return Ok(());
    }
    let mut x = c.x87_context();
    let (value, bits) = x.remainder(c.fpu.st(0), c.fpu.st(1), nearest);
    x.up = false;
    if !c.x87_result(&x, 0, value) {
        return Ok(());
    }
    let codes = match bits {
        Quotient::None => return Ok(()),
        Quotient::Partial => C2,
        Quotient::Bits(q) => {
            let bit = |n: u8, code| if q >> n & 1 != 0 { code } else { 0 };
            bit(2, C0) | bit(1, C3) | bit(0, C1)
        }
    };
    c.fpu.set_condition(C0 | C1 | C2 | C3, codes);
    Ok(())
}
