//! MMX: the 64-bit registers in the significands of the x87's, computed with as halves of XMM registers.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};

use crate::exec::Exec;
use crate::exec::vector::{self, Packed};
use crate::operand::operand_size;
use crate::state::{CR0_EM, Core, R};

/// Exponent and sign of a register that MMX wrote.
const EXPONENT: u128 = 0xffff << 64;
const LOW: u128 = u64::MAX as u128;

fn is_mmx(i: &Instruction) -> bool {
    // Of memory, these name no MMX register.
    let of_integers = matches!(i.mnemonic(), M::Cvtpi2ps | M::Cvtpi2pd);
    of_integers
        || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm())
}

pub(super) fn select(i: &Instruction) -> Option<Exec> {
    if i.mnemonic() == M::Emms {
        return Some(emms);
    }
    if !is_mmx(i) {
        return None;
    }
    Some(match i.mnemonic() {
        M::Movd | M::Movq | M::Movntq | M::Movdq2q | M::Movq2dq => transfer,
        M::Pmovmskb => |c, i| {
            let v = c.mmx_source(i, 1)?;
            let mask = (0..8).fold(0, |mask, n| mask | (v >> (n * 8 + 7) & 1) << n);
            c.put(i, 0, mask)
        },
        M::Pextrw => |c, i| {
            let v = c.mmx_source(i, 1)?;
            let shift = u32::from(i.immediate8() & 3) * 16;
            c.put(i, 0, v >> shift & 0xffff)
        },
        M::Pinsrw => |c, i| {
            let word = c.get(i, 1)? & 0xffff;
            let shift = u32::from(i.immediate8() & 3) * 16;
            let v = c.mmx_source(i, 0)?;
            c.mmx_result(i, v & !(0xffff << shift) | word << shift)
        },
        M::Maskmovq => masked_store,
        M::Cvtpi2ps | M::Cvtpi2pd => from_integers,
        M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi => to_integers,
        m if operation(m).is_some() => packed,
        _ => return None,
    })
}

/// Operations whose operands are put side by side, or whose result is the upper half, before the operation
/// on XMM registers is theirs.
fn operation(m: M) -> Option<Packed> {
    Some(match m {
        M::Packsswb => |a, b, i| vector_operation(M::Packsswb, a | b << 64, 0, i),
        M::Packssdw => |a, b, i| vector_operation(M::Packssdw, a | b << 64, 0, i),
        M::Packuswb => |a, b, i| vector_operation(M::Packuswb, a | b << 64, 0, i),
        M::Phaddw => |a, b, i| vector_operation(M::Phaddw, a | b << 64, 0, i),
        M::Phaddd => |a, b, i| vector_operation(M::Phaddd, a | b << 64, 0, i),
        M::Phaddsw => |a, b, i| vector_operation(M::Phaddsw, a | b << 64, 0, i),
        M::Phsubw => |a, b, i| vector_operation(M::Phsubw, a | b << 64, 0, i),
        M::Phsubd => |a, b, i| vector_operation(M::Phsubd, a | b << 64, 0, i),
        M::Phsubsw => |a, b, i| vector_operation(M::Phsubsw, a | b << 64, 0, i),
        M::Punpckhbw => |a, b, i| vector_operation(M::Punpcklbw, a, b, i) >> 64,
        M::Punpckhwd => |a, b, i| vector_operation(M::Punpcklwd, a, b, i) >> 64,
        M::Punpckhdq => |a, b, i| vector_operation(M::Punpckldq, a, b, i) >> 64,
        M::Pshufw => |_, b, i| vector_operation(M::Pshuflw, 0, b, i),
        M::Pshufb => |a, b, i| {
            let index = 0x8787_8787_8787_8787;
            vector_operation(M::Pshufb, a, b & index, i)
        },
        M::Palignr => |a, b, i| match u32::from(i) {
            n @ 0..16 => (a << 64 | b) >> (n * 8),
            _ => 0,
        },
        _ => return vector::operation(m),
    })
}

fn vector_operation(m: M, a: u128, b: u128, imm: u8) -> u128 {
    vector::operation(m).map_or(0, |f| f(a, b, imm))
}

fn number(r: Register) -> usize {
    r.number() & 7
}

impl Core {
    /// #UD, #NM and #MF; then the stack begins at its first register, and all are in use.
    fn mmx(&mut self) -> R<()> {
        if self.cr0 & CR0_EM != 0 {
            return Err(self.ud());
        }
        self.x87()?;
        self.x87_pending()
    }

    fn mmx_used(&mut self) {
        self.fpu.status &= !0x3800;
        self.fpu.tags = 0xff;
    }

    fn mmx_register(&self, r: Register) -> u64 {
        self.fpu.st[number(r)] as u64
    }

    fn set_mmx_register(&mut self, r: Register, value: u64) {
        self.mmx_used();
        self.fpu.st[number(r)] = EXPONENT | u128::from(value);
    }

    /// An operand: an MMX register, the low half of an XMM register, a general register, or memory.
    fn mmx_source(&mut self, i: &Instruction, n: u32) -> R<u64> {
        self.mmx()?;
        let value = match i.op_kind(n) {
            OpKind::Register if i.op_register(n).is_mm() => self.mmx_register(i.op_register(n)),
            OpKind::Register if i.op_register(n).is_xmm() => self.vector_operand(i, n)? as u64,
            _ => self.get(i, n)?,
        };
        self.mmx_used();
        Ok(value)
    }

    fn mmx_result(&mut self, i: &Instruction, value: u64) -> R<()> {
        self.set_mmx_register(i.op0_register(), value);
        Ok(())
    }
}

fn emms(c: &mut Core, _: &Instruction) -> R<()> {
    c.mmx()?;
    c.fpu.tags = 0;
    Ok(())
}

fn transfer(c: &mut Core, i: &Instruction) -> R<()> {
    if matches!(i.mnemonic(), M::Movdq2q | M::Movq2dq) {
        c.sse()?;
    }
    c.mmx()?;
    // A store that faults leaves the stack as it is.
    if i.op0_kind() == OpKind::Register {
        let value = c.mmx_source(i, 1)?;
        let to = i.op0_register();
        if to.is_mm() {
            return c.mmx_result(i, value);
        }
        if to.is_xmm() {
            c.fpu.xmm[to.number() & 15] = value.into();
            return Ok(());
        }
        return c.put(i, 0, value);
    }
    let value = c.mmx_register(i.op1_register());
    c.put(i, 0, value)?;
    c.mmx_used();
    Ok(())
}

fn packed(c: &mut Core, i: &Instruction) -> R<()> {
    c.mmx()?;
    let Some(f) = operation(i.mnemonic()) else {
        return Err(c.missing(i.code()));
    };
    let b = match i.op1_kind() {
        OpKind::Immediate8 => 0,
        // Half of a register is read where that is all that counts.
        OpKind::Memory if operand_size(i, 1) == 4 => c.get(i, 1)?,
        _ => c.mmx_source(i, 1)?,
    };
    let imm = match i.op_count() {
        3 => i.immediate8(),
        _ if i.op1_kind() == OpKind::Immediate8 => i.immediate8(),
        _ => 0,
    };
    let a = c.mmx_register(i.op0_register());
    let r = f(a.into(), b.into(), imm) & LOW;
    c.mmx_result(i, r as u64)
}

/// Two integers of an MMX register, or of memory, which leaves the x87's stack alone if they become doubles.
fn from_integers(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let double = i.mnemonic() == M::Cvtpi2pd;
    let v = match i.op1_kind() {
        OpKind::Memory if double => c.get(i, 1)?,
        _ => c.mmx_source(i, 1)?,
    };
    let to = i.op0_register().number() & 15;
    let old = c.fpu.xmm[to];
    c.fpu.xmm[to] = match double {
        true => c.twin(Code::Cvtdq2pd_xmm_xmmm64, 0, v.into(), None)?,
        false => {
            let r = c.twin(Code::Cvtdq2ps_xmm_xmmm128, 0, v.into(), None)?;
            old & !LOW | r & LOW
        }
    };
    Ok(())
}

fn to_integers(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    c.mmx()?;
    let v = c.vector_operand(i, 1)?;
    let (code, v) = match i.mnemonic() {
        M::Cvtps2pi => (Code::Cvtps2dq_xmm_xmmm128, v & LOW),
        M::Cvttps2pi => (Code::Cvttps2dq_xmm_xmmm128, v & LOW),
        M::Cvtpd2pi => (Code::Cvtpd2dq_xmm_xmmm128, v),
        _ => (Code::Cvttpd2dq_xmm_xmmm128, v),
    };
    let r = c.twin(code, 0, v, None)?;
    c.mmx_result(i, r as u64)
}

fn masked_store(c: &mut Core, i: &Instruction) -> R<()> {
    c.mmx()?;
    let value = c.mmx_register(i.op1_register());
    let mask = c.mmx_register(i.op2_register());
    let seg = Core::operand_segment(i);
    let base = match i.op0_kind() {
        OpKind::MemorySegRDI => c.r[7],
        OpKind::MemorySegEDI => c.r[7] & 0xffff_ffff,
        _ => c.r[7] & 0xffff,
    };
    for n in (0..8).filter(|n| mask >> (n * 8 + 7) & 1 != 0) {
        c.write(seg, base.wrapping_add(n), 1, value >> (n * 8) & 0xff)?;
    }
    c.mmx_used();
    Ok(())
}
