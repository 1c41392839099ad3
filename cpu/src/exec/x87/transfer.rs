//! Loads, stores, constants and moves between registers of the stack.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::stack_register;
use crate::exec::Exec;
use crate::fpu::Extended;
use crate::paging::{READ, WRITE};
use crate::state::{Core, R};
use crate::x87::convert::{DOUBLE, SINGLE, from_decimal, from_integer};
use crate::x87::number::{BIAS, INDEFINITE, pack, zero};
use crate::x87::round::{Context, Rounding};

pub(super) fn select(m: M) -> Option<Exec> {
    Some(match m {
        M::Fld | M::Fild | M::Fbld => load,
        M::Fld1 | M::Fldl2t | M::Fldl2e | M::Fldpi | M::Fldlg2 | M::Fldln2 | M::Fldz => constant,
        M::Fst | M::Fstp | M::Fstpnce => store,
        M::Fist | M::Fistp | M::Fisttp => store_integer,
        M::Fbstp => store_decimal,
        M::Fxch => exchange,
        M::Fcmovb
        | M::Fcmove
        | M::Fcmovbe
        | M::Fcmovu
        | M::Fcmovnb
        | M::Fcmovne
        | M::Fcmovnbe
        | M::Fcmovnu => conditional_move,
        M::Ffree => |c, i| free(c, i, false),
        M::Ffreep => |c, i| free(c, i, true),
        M::Fincstp => |c, i| turn(c, i, 1),
        M::Fdecstp => |c, i| turn(c, i, 7),
        M::Fnop => |c, i| c.x87_remember(i),
        _ => return None,
    })
}

/// Bytes of a register in memory.
const WIDE: usize = 10;

impl Core {
    pub(super) fn read_extended(&mut self, i: &Instruction) -> R<Extended> {
        let seg = Self::operand_segment(i);
        let offset = self.offset(i);
        let at = self.linear(seg, offset, WIDE as u64, false)?;
        let mut data = [0; 16];
        self.read_linear(seg, at, &mut data[..WIDE], READ)?;
        Ok(Extended::from_le_bytes(data))
    }

    pub(super) fn write_extended(&mut self, i: &Instruction, value: Extended) -> R<()> {
        let seg = Self::operand_segment(i);
        let offset = self.offset(i);
        let at = self.linear(seg, offset, WIDE as u64, true)?;
        self.write_linear(seg, at, &value.to_le_bytes()[..WIDE], WRITE)
    }
}

fn load(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_wait()?;
    let mut x = c.x87_context();
    let size = i.memory_size().size();
    let (value, empty) = match (i.mnemonic(), i.op_count()) {
        // Some forms name ST(0) first.
        (M::Fld, n) if i.op_kind(n - 1) == OpKind::Register => {
            let from = stack_register(i.op_register(n - 1));
            (c.fpu.st(from), c.fpu.is_empty(from))
        }
        (M::Fbld, _) => (from_decimal(c.read_extended(i)?), false),
        (M::Fld, _) if size == WIDE => (c.read_extended(i)?, false),
        (M::Fld, _) => {
            let format = if size == 4 { SINGLE } else { DOUBLE };
            (x.load(c.get(i, 0)?, format), false)
        }
        _ => {
            let value = crate::flags::sign(c.get(i, 0)?, size as u32) as i64;
            (from_integer(value), false)
        }
    };
    c.x87_begin(i)?;
    // A stack fault comes before what the number raises.
    if empty || !c.fpu.is_empty(7) {
        if c.stack_fault(!empty) {
            c.fpu.set_top(c.fpu.top() + 7);
            c.fpu.set_st(0, INDEFINITE);
        }
        return Ok(());
    }
    if c.x87_raise(&x) {
        c.x87_push(value);
    }
    Ok(())
}

/// Significand and exponent of a constant, rounded to nearest, and if that is above the constant.
fn number(m: M) -> Option<(u64, i32, bool)> {
    Some(match m {
        M::Fldl2t => (0xd49a_784b_cd1b_8afe, 1, false),
        M::Fldl2e => (0xb8aa_3b29_5c17_f0bc, 0, true),
        M::Fldpi => (0xc90f_daa2_2168_c235, 1, true),
        M::Fldlg2 => (0x9a20_9a84_fbcf_f799, -2, true),
        M::Fldln2 => (0xb172_17f7_d1cf_79ac, -1, true),
        _ => return None,
    })
}

fn constant(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_begin(i)?;
    let value = match (i.mnemonic(), number(i.mnemonic())) {
        (_, Some((significand, exponent, above))) => {
            let nearest = pack(false, (BIAS + exponent) as u16, significand);
            c.x87_context().constant(nearest, above)
        }
        (M::Fld1, _) => pack(false, BIAS as u16, 1 << 63),
        _ => zero(false),
    };
    c.x87_push(value);
    Ok(())
}

/// Writes what was rounded to memory, takes what that raised, and pops.
fn finish_store(
    c: &mut Core,
    i: &Instruction,
    x: &Context,
    value: Option<u64>,
    pops: bool,
) -> R<()> {
    if let Some(value) = value {
        c.put(i, 0, value)?;
    }
    c.x87_begin(i)?;
    c.x87_raise(x);
    if value.is_some() && pops {
        c.fpu.pop();
    }
    Ok(())
}

/// The indefinite number to memory after a stack fault, if that is masked.
fn store_underflow(c: &mut Core, i: &Instruction, indefinite: u64, pops: bool) -> R<()> {
    let masked = c.fpu.control & 1 != 0;
    if masked {
        c.put(i, 0, indefinite)?;
    }
    c.x87_begin(i)?;
    c.stack_fault(false);
    if masked && pops {
        c.fpu.pop();
    }
    Ok(())
}

fn store(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_wait()?;
    let pops = i.mnemonic() != M::Fst;
    if i.op0_kind() == OpKind::Register {
        c.x87_begin(i)?;
        let to = stack_register(i.op0_register());
        if c.fpu.is_empty(0) {
            // The form that is not documented pops and does no more.
            if i.mnemonic() != M::Fstpnce && !c.x87_underflow(to) {
                return Ok(());
            }
        } else {
            let value = c.fpu.st(0);
            c.fpu.set_st(to, value);
        }
        if pops {
            c.fpu.pop();
        }
        return Ok(());
    }
    let format = match i.memory_size().size() {
        4 => SINGLE,
        8 => DOUBLE,
        _ => return store_extended(c, i),
    };
    if c.fpu.is_empty(0) {
        let indefinite = match format.bits {
            24 => 0xffc0_0000,
            _ => 0xfff8_0000_0000_0000,
        };
        return store_underflow(c, i, indefinite, pops);
    }
    let mut x = c.x87_context();
    let value = x.narrow(c.fpu.st(0), format);
    finish_store(c, i, &x, value, pops)
}

/// FSTP with 80 bits, which changes nothing and so raises nothing.
fn store_extended(c: &mut Core, i: &Instruction) -> R<()> {
    let empty = c.fpu.is_empty(0);
    let value = if empty { INDEFINITE } else { c.fpu.st(0) };
    let stored = !empty || c.fpu.control & 1 != 0;
    if stored {
        c.write_extended(i, value)?;
    }
    c.x87_begin(i)?;
    if empty {
        c.stack_fault(false);
    }
    if stored {
        c.fpu.pop();
    }
    Ok(())
}

fn store_integer(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_wait()?;
    let bits = i.memory_size().size() as u32 * 8;
    let pops = i.mnemonic() != M::Fist;
    if c.fpu.is_empty(0) {
        return store_underflow(c, i, 1 << (bits - 1), pops);
    }
    let mut x = c.x87_context();
    if i.mnemonic() == M::Fisttp {
        x.rounding = Rounding::Zero;
    }
    let value = x.integer_of(c.fpu.st(0), bits);
    finish_store(c, i, &x, value, pops)
}

fn store_decimal(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_wait()?;
    let empty = c.fpu.is_empty(0);
    let mut x = c.x87_context();
    // No number of this size has 18 digits.
    let value = if empty { INDEFINITE } else { c.fpu.st(0) };
    let decimal = x.decimal_of(value);
    if let Some(decimal) = decimal {
        c.write_extended(i, decimal)?;
    }
    c.x87_begin(i)?;
    if empty {
        c.stack_fault(false);
    } else {
        c.x87_raise(&x);
    }
    if decimal.is_some() {
        c.fpu.pop();
    }
    Ok(())
}

fn exchange(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_begin(i)?;
    let other = stack_register(i.op_register(i.op_count() - 1));
    let empty = [c.fpu.is_empty(0), c.fpu.is_empty(other)];
    if empty[0] || empty[1] {
        if !c.stack_fault(false) {
            return Ok(());
        }
        for (n, is_empty) in [0, other].into_iter().zip(empty) {
            if is_empty {
                c.fpu.set_st(n, INDEFINITE);
            }
        }
    }
    let (a, b) = (c.fpu.st(0), c.fpu.st(other));
    c.fpu.set_st(0, b);
    c.fpu.set_st(other, a);
    Ok(())
}

fn conditional_move(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_remember(i)?;
    let from = stack_register(i.op_register(i.op_count() - 1));
    if c.fpu.is_empty(0) || c.fpu.is_empty(from) {
        c.x87_underflow(0);
        return Ok(());
    }
    let flags = c.f.get();
    let (bits, wanted) = match i.mnemonic() {
        M::Fcmovb => (crate::flags::CF, true),
        M::Fcmove => (crate::flags::ZF, true),
        M::Fcmovbe => (crate::flags::CF | crate::flags::ZF, true),
        M::Fcmovu => (crate::flags::PF, true),
        M::Fcmovnb => (crate::flags::CF, false),
        M::Fcmovne => (crate::flags::ZF, false),
        M::Fcmovnbe => (crate::flags::CF | crate::flags::ZF, false),
        _ => (crate::flags::PF, false),
    };
    if (flags & bits != 0) == wanted {
        let value = c.fpu.st(from);
        c.fpu.set_st(0, value);
    }
    Ok(())
}

fn free(c: &mut Core, i: &Instruction, pops: bool) -> R<()> {
    c.x87_begin(i)?;
    c.fpu.free(stack_register(i.op0_register()));
    if pops {
        c.fpu.pop();
    }
    Ok(())
}

/// Moves TOP; no register becomes empty or full.
fn turn(c: &mut Core, i: &Instruction, by: usize) -> R<()> {
    c.x87_begin(i)?;
    let top = c.fpu.top();
    c.fpu.set_top(top + by);
    Ok(())
}
