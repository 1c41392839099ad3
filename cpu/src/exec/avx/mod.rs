//! AVX, AVX2, FMA and F16C: instructions with VEX prefixes on XMM and YMM registers.
//!
//! Most compute with each half of their operands what an instruction of SSE does. Their operands are copied to
//! [scratch registers](crate::fpu::SCRATCH), and that instruction, their *twin*, runs on these.

mod fma;
mod half;
mod lanes;
mod moves;
mod twin;

use iced_x86::{EncodingKind, Instruction, OpKind, Register};

use crate::exec::Exec;
use crate::exec::xstate::{AVX, SSE};
use crate::fault::Exception;
use crate::paging::WRITE;
use crate::state::{CR0_TS, CR4_OSXSAVE, Core, R};

/// Both halves of a YMM register; the upper one is zero for an XMM register.
type Halves = [u128; 2];

const HALF: u64 = 16;

/// Chooses among encodings with a VEX prefix that name vector registers.
pub(super) fn select(i: &Instruction) -> Option<Exec> {
    if i.encoding() != EncodingKind::VEX {
        return None;
    }
    moves::select(i)
        .or_else(|| lanes::select(i))
        .or_else(|| fma::select(i))
        .or_else(|| half::select(i))
        .or_else(|| twin::select(i))
}

fn is_vector(r: Register) -> bool {
    r.is_xmm() || r.is_ymm()
}

fn number(r: Register) -> usize {
    r.number() & 15
}

/// True for 256 bits: an operand is a YMM register or as wide in memory.
fn wide(i: &Instruction) -> bool {
    let ymm = |n: u32| i.op_kind(n) == OpKind::Register && i.op_register(n).is_ymm();
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    (0..i.op_count()).any(ymm) || memory && i.memory_size().size() == 32
}

fn halves(i: &Instruction) -> usize {
    if wide(i) { 2 } else { 1 }
}

impl Core {
    /// Checks that AVX can be used: #UD unless XCR0 enables it and in modes without VEX, #NM with CR0.TS.
    pub(crate) fn avx(&mut self) -> R<()> {
        let enabled = SSE | AVX;
        let known = self.cr4 & CR4_OSXSAVE != 0 && self.fpu.xcr0 & enabled == enabled;
        if !known || self.paragraphs() {
            return Err(self.ud());
        }
        if self.cr0 & CR0_TS != 0 {
            return Err(self.fault(Exception::plain(Exception::NM)));
        }
        Ok(())
    }

    fn vector(&self, r: Register) -> Halves {
        let n = number(r);
        let high = if r.is_ymm() { self.fpu.high[n] } else { 0 };
        [self.fpu.xmm[n], high]
    }

    /// Writes a vector register. What is above the vector becomes zero.
    fn set_vector(&mut self, r: Register, value: Halves) {
        let n = number(r);
        self.fpu.xmm[n] = value[0];
        self.fpu.high[n] = if r.is_ymm() { value[1] } else { 0 };
    }

    /// Reads memory of up to 32 bytes, which need not be aligned.
    fn read_halves(&mut self, i: &Instruction, bytes: usize) -> R<Halves> {
        let seg = Self::operand_segment(i);
        let offset = self.offset(i);
        if bytes <= 16 {
            return Ok([self.read_wide(seg, offset, bytes)?, 0]);
        }
        let low = self.read_wide(seg, offset, 16)?;
        Ok([low, self.read_wide(seg, offset.wrapping_add(HALF), 16)?])
    }

    /// Writes memory of 16 or 32 bytes: all or nothing.
    fn write_halves(&mut self, i: &Instruction, bytes: usize, value: Halves) -> R<()> {
        let seg = Self::operand_segment(i);
        let offset = self.offset(i);
        if bytes <= 16 {
            return self.write_wide(seg, offset, bytes, value[0]);
        }
        let at = self.linear(seg, offset, 32, true)?;
        if self
            .tlb
            .room(self.set, at, true)
            .is_some_and(|room| room >= 32)
        {
            self.write_wide(seg, offset, 16, value[0])?;
            return self.write_wide(seg, offset.wrapping_add(HALF), 16, value[1]);
        }
        let mut data = [0; 32];
        data[..16].copy_from_slice(&value[0].to_le_bytes());
        data[16..].copy_from_slice(&value[1].to_le_bytes());
        self.write_linear(seg, at, &data, WRITE)
    }

    /// An operand: a vector register, or memory with zeros above.
    fn source(&mut self, i: &Instruction, n: u32) -> R<Halves> {
        match i.op_kind(n) {
            OpKind::Register if is_vector(i.op_register(n)) => Ok(self.vector(i.op_register(n))),
            OpKind::Memory => self.read_halves(i, i.memory_size().size()),
            _ => Ok([0; 2]),
        }
    }
}
