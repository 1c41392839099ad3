//! Makes instructions of a form with random operands.

use iced_x86::{
    Code, Encoder, Instruction, MemoryOperand, OpCodeOperandKind as K, OpKind, Register,
};

use crate::random::Random;

/// Base register of all memory operands.
pub(crate) const BASE: Register = Register::R15;

fn pick(rng: &mut Random, first: Register, high_bytes: bool) -> Register {
    loop {
        let n = rng.below(15) as usize;
        // RSP and R15 keep their meaning.
        if n == 4 {
            continue;
        }
        if first == Register::AL {
            let reg = match n {
                0..=3 if high_bytes && rng.below(4) == 0 => Register::AH as usize + n,
                0..=3 => Register::AL as usize + n,
                _ => Register::SPL as usize + n - 4,
            };
            return Register::try_from(reg).expect("a byte register");
        }
        return first + n as u32;
    }
}

fn memory(i: &mut Instruction, n: u32, rng: &mut Random) {
    i.set_op_kind(n, OpKind::Memory);
    i.set_memory_base(BASE);
    let displacement = rng.below(256) * 16;
    i.set_memory_displacement64(displacement);
    // 8 stands for 32 bits that are extended to 64.
    i.set_memory_displ_size(if displacement == 0 { 0 } else { 8 });
}

/// An instruction with operands; `None` if the kinds are not made here.
pub(crate) fn make(code: Code, rng: &mut Random) -> Option<Instruction> {
    let info = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    for n in 0..info.op_count() {
        let either = rng.below(2) == 0;
        let reg = match info.op_kind(n) {
            K::r8_reg | K::r8_opcode => pick(rng, Register::AL, true),
            K::r16_reg | K::r16_rm | K::r16_opcode => pick(rng, Register::AX, false),
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => pick(rng, Register::EAX, false),
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => pick(rng, Register::RAX, false),
            K::r8_or_mem if either => pick(rng, Register::AL, true),
            K::r16_or_mem if either => pick(rng, Register::AX, false),
            K::r32_or_mem if either => pick(rng, Register::EAX, false),
            K::r64_or_mem if either => pick(rng, Register::RAX, false),
            K::xmm_or_mem if either => Register::XMM0 + rng.below(16) as u32,
            K::xmm_reg | K::xmm_rm => Register::XMM0 + rng.below(16) as u32,
            K::st0 => Register::ST0,
            K::sti_opcode => Register::ST0 + rng.below(8) as u32,
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                Register::YMM0 + rng.below(16) as u32
            }
            K::xmm_vvvv | K::xmm_is4 => Register::XMM0 + rng.below(16) as u32,
            K::ymm_or_mem if either => Register::YMM0 + rng.below(16) as u32,
            K::mm_reg | K::mm_rm => Register::MM0 + rng.below(8) as u32,
            K::mm_or_mem if either => Register::MM0 + rng.below(8) as u32,
            K::mem_vsib32x | K::mem_vsib64x => {
                memory(&mut i, n, rng);
                i.set_memory_index(Register::XMM0 + rng.below(16) as u32);
                i.set_memory_index_scale(1);
                continue;
            }
            K::mem_vsib32y | K::mem_vsib64y => {
                memory(&mut i, n, rng);
                i.set_memory_index(Register::YMM0 + rng.below(16) as u32);
                i.set_memory_index_scale(1);
                continue;
            }
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::dx => Register::DX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::mem
            | K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::mm_or_mem => {
                memory(&mut i, n, rng);
                continue;
            }
            K::imm8 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(rng.edge() as u8);
                continue;
            }
            K::imm8_const_1 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(1);
                continue;
            }
            K::imm8sex16 => {
                i.set_op_kind(n, OpKind::Immediate8to16);
                i.set_immediate8to16(rng.edge() as i8 as i16);
                continue;
            }
            K::imm8sex32 => {
                i.set_op_kind(n, OpKind::Immediate8to32);
                i.set_immediate8to32(rng.edge() as i8 as i32);
                continue;
            }
            K::imm8sex64 => {
                i.set_op_kind(n, OpKind::Immediate8to64);
                i.set_immediate8to64(rng.edge() as i8 as i64);
                continue;
            }
            K::imm16 => {
                i.set_op_kind(n, OpKind::Immediate16);
                i.set_immediate16(rng.edge() as u16);
                continue;
            }
            K::imm32 => {
                i.set_op_kind(n, OpKind::Immediate32);
                i.set_immediate32(rng.edge() as u32);
                continue;
            }
            K::imm32sex64 => {
                i.set_op_kind(n, OpKind::Immediate32to64);
                i.set_immediate32to64(rng.edge() as i32 as i64);
                continue;
            }
            K::imm64 => {
                i.set_op_kind(n, OpKind::Immediate64);
                i.set_immediate64(rng.edge());
                continue;
            }
            K::seg_rSI => {
                i.set_op_kind(n, OpKind::MemorySegRSI);
                continue;
            }
            K::es_rDI => {
                i.set_op_kind(n, OpKind::MemoryESRDI);
                continue;
            }
            K::seg_rDI => {
                i.set_op_kind(n, OpKind::MemorySegRDI);
                continue;
            }
            K::seg_rBX_al => {
                let operand = MemoryOperand::with_base_index(Register::RBX, Register::AL);
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(operand.base);
                i.set_memory_index(operand.index);
                continue;
            }
            _ => return None,
        };
        i.set_op_kind(n, OpKind::Register);
        i.set_op_register(n, reg);
    }
    Some(i)
}

/// Encodes for address `at`.
pub(crate) fn encode(i: &Instruction, at: u64) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(i, at).ok()?;
    Some(encoder.take_buffer())
}
