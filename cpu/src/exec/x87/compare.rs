//! Comparisons and examination.

use core::cmp::Ordering;

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::{C0, C1, C2, C3, stack_register};
use crate::exec::Exec;
use crate::flags;
use crate::state::{Core, R};
use crate::x87::number::{Kind, is_denormal, kind, sign, zero};

pub(super) fn select(m: M) -> Option<Exec> {
    Some(match m {
        M::Fcom | M::Ficom | M::Fucom => |c, i| codes(c, i, 0),
        M::Fcomp | M::Ficomp | M::Fucomp => |c, i| codes(c, i, 1),
        M::Fcompp | M::Fucompp => |c, i| codes(c, i, 2),
        M::Fcomi | M::Fucomi => |c, i| eflags(c, i, 0),
        M::Fcomip | M::Fucomip => |c, i| eflags(c, i, 1),
        M::Ftst => test,
        M::Fxam => examine,
        _ => return None,
    })
}

fn condition(order: Option<Ordering>) -> u16 {
    match order {
        None => C3 | C2 | C0,
        Some(Ordering::Less) => C0,
        Some(Ordering::Equal) => C3,
        Some(Ordering::Greater) => 0,
    }
}

fn ignores_quiet(m: M) -> bool {
    matches!(
        m,
        M::Fucom | M::Fucomp | M::Fucompp | M::Fucomi | M::Fucomip
    )
}

/// The register that ST(0) is compared with.
fn other(i: &Instruction) -> usize {
    let last = i.op_count().saturating_sub(1);
    match i.op_count() {
        0 => 1,
        _ => stack_register(i.op_register(last)),
    }
}

fn codes(c: &mut Core, i: &Instruction, pops: usize) -> R<()> {
    c.x87_wait()?;
    let mut x = c.x87_context();
    let (value, empty) = if i.op_count() > 0 && i.op0_kind() == OpKind::Memory {
        (c.x87_operand(i, &mut x)?, false)
    } else {
        let n = other(i);
        (c.fpu.st(n), c.fpu.is_empty(n))
    };
    c.x87_begin(i)?;
    let order = if empty || c.fpu.is_empty(0) {
        if !c.stack_fault(false) {
            return Ok(());
        }
        None
    } else {
        let order = x.compare(c.fpu.st(0), value, ignores_quiet(i.mnemonic()));
        if !c.x87_raise(&x) {
            return Ok(());
        }
        order
    };
    c.fpu.set_condition(C3 | C2 | C0, condition(order));
    c.fpu.pops(pops);
    Ok(())
}

fn eflags(c: &mut Core, i: &Instruction, pops: usize) -> R<()> {
    c.x87_begin(i)?;
    let mut x = c.x87_context();
    let n = other(i);
    let order = if c.fpu.is_empty(n) || c.fpu.is_empty(0) {
        if !c.stack_fault(false) {
            return Ok(());
        }
        None
    } else {
        let order = x.compare(c.fpu.st(0), c.fpu.st(n), ignores_quiet(i.mnemonic()));
        if !c.x87_raise(&x) {
            return Ok(());
        }
        order
    };
    c.f.set(match order {
        None => flags::ZF | flags::PF | flags::CF,
        Some(Ordering::Less) => flags::CF,
        Some(Ordering::Equal) => flags::ZF,
        Some(Ordering::Greater) => 0,
    });
    c.fpu.pops(pops);
    Ok(())
}

fn test(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_begin(i)?;
    let mut x = c.x87_context();
    let order = if c.fpu.is_empty(0) {
        if !c.stack_fault(false) {
            return Ok(());
        }
        None
    } else {
        let order = x.compare(c.fpu.st(0), zero(false), false);
        if !c.x87_raise(&x) {
            return Ok(());
        }
        order
    };
    c.fpu.set_condition(C3 | C2 | C0, condition(order));
    Ok(())
}

fn examine(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_begin(i)?;
    let v = c.fpu.st(0);
    let class = if c.fpu.is_empty(0) {
        C3 | C0
    } else {
        match kind(v) {
            Kind::Unsupported => 0,
            Kind::Quiet | Kind::Signalling => C0,
            Kind::Infinity => C2 | C0,
            Kind::Zero => C3,
            Kind::Finite(_) if is_denormal(v) => C3 | C2,
            Kind::Finite(_) => C2,
        }
    };
    let negative = if sign(v) { C1 } else { 0 };
    c.fpu.set_condition(C0 | C1 | C2 | C3, class | negative);
    Ok(())
}
