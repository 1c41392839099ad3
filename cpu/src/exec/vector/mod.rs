//! SSE to SSE4.2, AES, PCLMULQDQ and SHA on XMM registers.

mod crypto;
mod float;
mod fused;
mod ieee;
mod lanes;
mod moves;
mod shuffle;
mod text;

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

pub(in crate::exec) use ieee::Context;

use crate::exec::Exec;
use crate::fault::Exception;
use crate::fpu::MXCSR_MM;
use crate::operand::operand_size;
use crate::paging::{READ, WRITE};
use crate::state::{CR0_EM, CR0_TS, CR4_OSFXSR, Core, R};

/// An operation on the destination, the source and an immediate.
pub(super) type Packed = fn(u128, u128, u8) -> u128;

/// Chooses among the legacy encodings; those on MMX registers are not here.
pub(super) fn select(i: &Instruction) -> Option<Exec> {
    let vector = |n: u32| i.op_kind(n) == OpKind::Register && i.op_register(n).is_xmm();
    let mmx = |n: u32| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm();
    let operands = i.op_count();
    // Conversions from memory to a general register name no XMM register.
    let to_general = matches!(
        i.mnemonic(),
        M::Cvtss2si | M::Cvtsd2si | M::Cvttss2si | M::Cvttsd2si
    );
    if (0..operands).any(mmx) || !(0..operands).any(vector) && !to_general {
        return None;
    }
    if i.encoding() != iced_x86::EncodingKind::Legacy {
        return None;
    }
    moves::select(i)
        .or_else(|| float::select(i.mnemonic()))
        .or_else(|| text::select(i.mnemonic()))
        .or_else(|| operation(i.mnemonic()).map(|_| packed as Exec))
        .or_else(|| (i.mnemonic() == M::Ptest).then_some(ptest as Exec))
}

pub(super) fn operation(m: M) -> Option<Packed> {
    lanes::operation(m)
        .or_else(|| shuffle::operation(m))
        .or_else(|| crypto::operation(m))
}

fn packed(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let n = number(i.op0_register());
    let b = c.vector_operand(i, 1)?;
    let imm = match i.op_count() {
        3 if i.op2_kind() == OpKind::Immediate8 => i.immediate8(),
        _ if i.op1_kind() == OpKind::Immediate8 => i.immediate8(),
        _ => 0,
    };
    // Three operations have XMM0 as a third operand.
    let selector = c.fpu.xmm[0];
    let a = c.fpu.xmm[n];
    c.fpu.xmm[n] = match i.mnemonic() {
        M::Pblendvb => shuffle::blend(a, b, selector, 1),
        M::Blendvps => shuffle::blend(a, b, selector, 4),
        M::Blendvpd => shuffle::blend(a, b, selector, 8),
        M::Sha256rnds2 => crypto::sha256_rounds(a, b, selector),
        m => match operation(m) {
            Some(f) => f(a, b, imm),
            None => return Err(c.missing(i.code())),
        },
    };
    Ok(())
}

fn ptest(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let a = c.fpu.xmm[number(i.op0_register())];
    let b = c.vector_operand(i, 1)?;
    let zf = if a & b == 0 { crate::flags::ZF } else { 0 };
    let cf = if !a & b == 0 { crate::flags::CF } else { 0 };
    c.f.set(zf | cf);
    Ok(())
}

/// Number of an XMM register.
fn number(r: Register) -> usize {
    r.number() & 31
}

impl Core {
    /// Checks that SSE can be used: #UD without CR4.OSFXSR or with CR0.EM, #NM with CR0.TS.
    pub(crate) fn sse(&mut self) -> R<()> {
        if self.cr0 & CR0_EM != 0 || self.cr4 & CR4_OSFXSR == 0 {
            return Err(self.ud());
        }
        if self.cr0 & CR0_TS != 0 {
            return Err(self.fault(Exception::plain(Exception::NM)));
        }
        Ok(())
    }

    /// Reads memory of up to 16 bytes.
    pub(crate) fn read_wide(&mut self, seg: usize, offset: u64, size: usize) -> R<u128> {
        let at = self.linear(seg, offset, size as u64, false)?;
        if size <= 8 {
            return self.load_sized(seg, at, size as u32).map(u128::from);
        }
        let mut data = [0; 16];
        if let (Some(low), Some(high)) = self.tlb.load_pair(self.set, at) {
            return Ok(u128::from(low) | u128::from(high) << 64);
        }
        self.read_linear(seg, at, &mut data[..size], READ)?;
        Ok(u128::from_le_bytes(data))
    }

    /// Writes memory of up to 16 bytes.
    pub(crate) fn write_wide(&mut self, seg: usize, offset: u64, size: usize, v: u128) -> R<()> {
        let at = self.linear(seg, offset, size as u64, true)?;
        if size <= 8 {
            return self.store_sized(seg, at, size as u32, v as u64);
        }
        if self
            .tlb
            .room(self.set, at, true)
            .is_some_and(|room| room >= 16)
        {
            self.store_sized(seg, at, 8, v as u64)?;
            self.store_sized(seg, at + 8, 8, (v >> 64) as u64)?;
            return Ok(());
        }
        self.write_linear(seg, at, &v.to_le_bytes()[..size], WRITE)
    }

    /// #GP(0) unless a 16-byte operand is aligned.
    pub(crate) fn aligned_operand(&mut self, i: &Instruction) -> R<()> {
        self.aligned_to(i, 16)
    }

    /// #GP(0) unless a memory operand is at a multiple of `bytes`.
    pub(crate) fn aligned_to(&mut self, i: &Instruction, bytes: u64) -> R<()> {
        let seg = Self::operand_segment(i);
        let offset = self.offset(i);
        let base = if self.bits == 64 {
            self.base[seg]
        } else {
            self.seg[seg].base
        };
        if offset.wrapping_add(base) & (bytes - 1) != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    /// A vector operand: an XMM register, or memory zero-extended. 16 bytes must be aligned.
    pub(crate) fn vector_operand(&mut self, i: &Instruction, n: u32) -> R<u128> {
        match i.op_kind(n) {
            OpKind::Register if i.op_register(n).is_xmm() => {
                Ok(self.fpu.xmm[number(i.op_register(n))])
            }
            OpKind::Register => Ok(self.reg(i.op_register(n)).into()),
            OpKind::Memory => {
                let size = operand_size(i, n) as usize;
                if size == 16 && self.fpu.mxcsr & MXCSR_MM == 0 {
                    self.aligned_operand(i)?;
                }
                let offset = self.offset(i);
                self.read_wide(Self::operand_segment(i), offset, size)
            }
            _ => Ok(0),
        }
    }
}
