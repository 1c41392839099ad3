//! F16C: numbers of 16 bits to single precision and back.

use iced_x86::{Instruction, Mnemonic as M, OpKind};
use rustc_apfloat::ieee::{Half, Single};

use super::{halves, lanes};
use crate::exec::Exec;
use crate::exec::vector::Context;
use crate::state::{Core, R};

pub(super) fn select(i: &Instruction) -> Option<Exec> {
    Some(match i.mnemonic() {
        M::Vcvtph2ps => to_single,
        M::Vcvtps2ph => to_half,
        _ => return None,
    })
}

/// VCVTPH2PS. Half-precision denormals are numbers like others: no flag, and no zeros by MXCSR.DAZ.
fn to_single(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let from = c.source(i, 1)?;
    let mut context = Context::of_halves(c.fpu.mxcsr);
    let mut result = [0; 2];
    for n in 0..halves(i) as u32 * 4 {
        let v = context.convert::<Half, Single>(lanes::lane(&from, n, 2).into());
        lanes::put(&mut result, n, 4, v as u64);
    }
    context.ignore_denormals();
    c.raise(&context)?;
    c.set_vector(i.op0_register(), result);
    Ok(())
}

/// VCVTPS2PH, rounded as the immediate says or, with its bit 2, as MXCSR does.
fn to_half(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let from = c.vector(i.op1_register());
    let count = if i.op1_register().is_ymm() { 8 } else { 4 };
    let mut context = Context::to_halves(c.fpu.mxcsr, i.immediate8());
    let mut result = [0; 2];
    for n in 0..count {
        let v = context.convert::<Single, Half>(lanes::lane(&from, n, 4).into());
        lanes::put(&mut result, n, 2, v as u64);
    }
    if i.op0_kind() == OpKind::Memory {
        let seg = Core::operand_segment(i);
        let offset = c.offset(i);
        // A fault of the access comes before the flags.
        let at = c.linear(seg, offset, u64::from(count) * 2, true)?;
        c.probe_write(seg, at, count as usize * 2)?;
        c.raise(&context)?;
        return c.write_halves(i, count as usize * 2, result);
    }
    c.raise(&context)?;
    c.set_vector(i.op0_register(), result);
    Ok(())
}
