//! Handlers of BMI2 shifts, of BZHI and of MUL, and their choice.

use iced_x86::{Instruction, Mnemonic as M};

use crate::alu::{self, SAR, SHL, SHR};
use crate::fast::{get, load, r, set};
use crate::op::{Handlers, Op, Sem};
use crate::operand::{gpr, operand_size};
use crate::select::{Form, form, plain};
use crate::state::{Core, R};

/// SHLX, SHRX and SARX of a register; the immediate is the number of the register with the count.
struct ShiftAloneR<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for ShiftAloneR<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let (a, count) = (get::<S>(c, op.src), r(c, op.imm as u8));
        set::<S>(c, op.dst, alu::shift_alone(O, a, count, S as u32));
        Ok(())
    }
}

/// The same of memory.
struct ShiftAloneM<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for ShiftAloneM<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let (a, count) = (load::<S, SLOW>(c, op)?, r(c, op.imm as u8));
        set::<S>(c, op.dst, alu::shift_alone(O, a, count, S as u32));
        Ok(())
    }
}

/// BZHI of a register; the immediate is the number of the register with the index.
struct BzhiR<const S: usize>;
impl<const S: usize> Sem for BzhiR<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let (a, from) = (get::<S>(c, op.src), r(c, op.imm as u8));
        let v = alu::zero_high(&mut c.f, a, from, S as u32);
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

/// The same of memory.
struct BzhiM<const S: usize>;
impl<const S: usize> Sem for BzhiM<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let (a, from) = (load::<S, SLOW>(c, op)?, r(c, op.imm as u8));
        let v = alu::zero_high(&mut c.f, a, from, S as u32);
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

#[inline(always)]
fn multiply<const S: usize>(c: &mut Core, b: u64) {
    let a = get::<S>(c, 0);
    let (low, high) = alu::wide_mul(&mut c.f, false, a, b, S as u32);
    set::<S>(c, 0, low);
    set::<S>(c, 2, high);
}

/// MUL of a register with RAX.
struct MulR<const S: usize>;
impl<const S: usize> Sem for MulR<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let b = get::<S>(c, op.src);
        multiply::<S>(c, b);
        Ok(())
    }
}

/// MUL of memory with RAX.
struct MulM<const S: usize>;
impl<const S: usize> Sem for MulM<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let b = load::<S, SLOW>(c, op)?;
        multiply::<S>(c, b);
        Ok(())
    }
}

/// The form of one of these instructions.
pub(crate) fn select(i: &Instruction) -> Option<Form> {
    match i.mnemonic() {
        M::Shlx => shift_alone::<SHL>(i),
        M::Shrx => shift_alone::<SHR>(i),
        M::Sarx => shift_alone::<SAR>(i),
        M::Bzhi => bzhi(i),
        M::Mul => mul(i),
        _ => None,
    }
}

fn shift_alone<const O: u8>(i: &Instruction) -> Option<Form> {
    let wide = operand_size(i, 0) == 8;
    let (of_register, of_memory) = if wide {
        let register = Handlers::of::<ShiftAloneR<O, 8>>();
        (register, Handlers::of::<ShiftAloneM<O, 8>>())
    } else {
        let register = Handlers::of::<ShiftAloneR<O, 4>>();
        (register, Handlers::of::<ShiftAloneM<O, 4>>())
    };
    three(i, of_register, of_memory)
}

fn bzhi(i: &Instruction) -> Option<Form> {
    if operand_size(i, 0) == 8 {
        three(i, Handlers::of::<BzhiR<8>>(), Handlers::of::<BzhiM<8>>())
    } else {
        three(i, Handlers::of::<BzhiR<4>>(), Handlers::of::<BzhiM<4>>())
    }
}

/// A destination, a source in a register or in memory, and a register whose number becomes the immediate.
fn three(i: &Instruction, of_register: Handlers, of_memory: Handlers) -> Option<Form> {
    let dst = plain(i, 0)?;
    let imm = gpr(i.op_register(2))?.number as u64;
    Some(match plain(i, 1) {
        Some(src) => Form {
            dst,
            src,
            imm,
            ..form(of_register)
        },
        None => Form {
            dst,
            imm,
            memory: true,
            ..form(of_memory)
        },
    })
}

fn mul(i: &Instruction) -> Option<Form> {
    let (of_register, of_memory) = match operand_size(i, 0) {
        4 => (Handlers::of::<MulR<4>>(), Handlers::of::<MulM<4>>()),
        8 => (Handlers::of::<MulR<8>>(), Handlers::of::<MulM<8>>()),
        _ => return None,
    };
    Some(match plain(i, 0) {
        Some(src) => Form {
            src,
            ..form(of_register)
        },
        None => Form {
            memory: true,
            ..form(of_memory)
        },
    })
}
