//! Operands of decoded instructions, read and written by number.

use iced_x86::{Instruction, OpKind, Register};

use crate::state::{Core, R};

/// Number of a general register, or of the high byte of one.
#[derive(Clone, Copy)]
pub(crate) struct Gpr {
    pub(crate) number: usize,
    pub(crate) high: bool,
}

/// A general register's number; `None` for other registers.
pub(crate) fn gpr(reg: Register) -> Option<Gpr> {
    if !reg.is_gpr() {
        return None;
    }
    let n = reg.number();
    Some(if reg.is_gpr8() {
        match n {
            4..=7 => Gpr {
                number: n - 4,
                high: true,
            },
            8.. => Gpr {
                number: n - 4,
                high: false,
            },
            _ => Gpr {
                number: n,
                high: false,
            },
        }
    } else {
        Gpr {
            number: n,
            high: false,
        }
    })
}

/// Number of a segment register, DS for none.
pub(crate) fn segment_number(reg: Register) -> usize {
    match reg {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    }
}

/// Size in bytes of an operand.
pub(crate) fn operand_size(i: &Instruction, n: u32) -> u32 {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size() as u32,
        OpKind::Memory
        | OpKind::MemorySegSI
        | OpKind::MemorySegESI
        | OpKind::MemorySegRSI
        | OpKind::MemorySegDI
        | OpKind::MemorySegEDI
        | OpKind::MemorySegRDI
        | OpKind::MemoryESDI
        | OpKind::MemoryESEDI
        | OpKind::MemoryESRDI => i.memory_size().size() as u32,
        OpKind::Immediate8 | OpKind::Immediate8_2nd => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
        _ => 8,
    }
}

/// Bits of the address size of a memory operand: 16, 32 or 64.
pub(crate) fn address_bits(i: &Instruction) -> u32 {
    let base = if i.memory_base() != Register::None {
        i.memory_base()
    } else {
        i.memory_index()
    };
    match base.size() {
        2 => 16,
        4 => 32,
        8 => 64,
        _ => match i.memory_displ_size() {
            2 => 16,
            8 => 64,
            _ => 32,
        },
    }
}

impl Core {
    /// Reads a general register of any size.
    pub(crate) fn reg(&self, reg: Register) -> u64 {
        let Some(g) = gpr(reg) else { return 0 };
        let value = self.r[g.number & 15];
        match reg.size() {
            1 if g.high => value >> 8 & 0xff,
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }

    /// Writes a general register; 32-bit writes clear the upper half.
    pub(crate) fn set_reg(&mut self, reg: Register, value: u64) {
        let Some(g) = gpr(reg) else { return };
        let old = self.r[g.number & 15];
        self.r[g.number & 15] = match reg.size() {
            1 if g.high => old & !0xff00 | (value & 0xff) << 8,
            1 => old & !0xff | value & 0xff,
            2 => old & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Writes a general register by number.
    pub(crate) fn set_gpr(&mut self, n: usize, size: u32, value: u64) {
        let old = self.r[n & 15];
        self.r[n & 15] = match size {
            1 => old & !0xff | value & 0xff,
            2 => old & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Offset of a memory operand in its segment.
    pub(crate) fn offset(&self, i: &Instruction) -> u64 {
        let (base, index) = (i.memory_base(), i.memory_index());
        let mut offset = i.memory_displacement64();
        // RIP-relative operands come with the target as displacement.
        if base != Register::None && base != Register::RIP && base != Register::EIP {
            offset = offset.wrapping_add(self.reg(base));
        }
        if index != Register::None {
            offset =
                offset.wrapping_add(self.reg(index).wrapping_mul(i.memory_index_scale().into()));
        }
        match address_bits(i) {
            16 => offset & 0xffff,
            32 => offset & 0xffff_ffff,
            _ => offset,
        }
    }

    /// Segment register of a memory operand.
    pub(crate) fn operand_segment(i: &Instruction) -> usize {
        segment_number(i.memory_segment())
    }

    /// Reads operand `n`, zero-extended; immediates are sign-extended as the form says.
    pub(crate) fn get(&mut self, i: &Instruction, n: u32) -> R<u64> {
        Ok(match i.op_kind(n) {
            OpKind::Register => {
                let reg = i.op_register(n);
                if reg.is_segment_register() {
                    self.seg[segment_number(reg)].selector.into()
                } else {
                    self.reg(reg)
                }
            }
            OpKind::Memory => {
                let size = i.memory_size().size() as u32;
                self.read(Self::operand_segment(i), self.offset(i), size)?
            }
            _ => i.try_immediate(n).unwrap_or(0),
        })
    }

    /// Reads operand `n`, which the instruction writes after that.
    pub(crate) fn get_update(&mut self, i: &Instruction, n: u32) -> R<u64> {
        if i.op_kind(n) != OpKind::Memory {
            return self.get(i, n);
        }
        let size = i.memory_size().size() as u32;
        self.read_update(Self::operand_segment(i), self.offset(i), size)
    }

    /// Reads operand `n` cut to `size` bytes.
    pub(crate) fn get_sized(&mut self, i: &Instruction, n: u32, size: u32) -> R<u64> {
        Ok(crate::flags::zero(self.get(i, n)?, size))
    }

    /// Writes operand `n`, a general register or memory.
    pub(crate) fn put(&mut self, i: &Instruction, n: u32, value: u64) -> R<()> {
        if i.op_kind(n) == OpKind::Register {
            self.set_reg(i.op_register(n), value);
            return Ok(());
        }
        let size = i.memory_size().size() as u32;
        self.write(Self::operand_segment(i), self.offset(i), size, value)
    }
}
