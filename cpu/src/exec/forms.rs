//! The forms that decode and are not executed: `not_executed.txt` has them by CPUID feature, and can only
//! become shorter.

extern crate std;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use iced_x86::{
    Code, CpuidFeature as F, EncodingKind, Instruction, OpCodeOperandKind as K, OpKind, Register,
};

use super::implementation;
use crate::CpuidTable;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/exec/not_executed.txt");

/// A register for an operand that must or can be one.
fn register(kind: K) -> Option<Register> {
    Some(match kind {
        K::r8_reg | K::r8_opcode | K::r8_or_mem | K::al => Register::AL,
        K::cl => Register::CL,
        K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode | K::r16_or_mem | K::ax => {
            Register::AX
        }
        K::dx => Register::DX,
        K::r32_reg
        | K::r32_reg_mem
        | K::r32_rm
        | K::r32_opcode
        | K::r32_vvvv
        | K::r32_or_mem
        | K::r32_or_mem_mpx
        | K::eax => Register::EAX,
        K::r64_reg
        | K::r64_reg_mem
        | K::r64_rm
        | K::r64_opcode
        | K::r64_vvvv
        | K::r64_or_mem
        | K::r64_or_mem_mpx
        | K::rax => Register::RAX,
        K::es => Register::ES,
        K::cs => Register::CS,
        K::ss => Register::SS,
        K::ds | K::seg_reg => Register::DS,
        K::fs => Register::FS,
        K::gs => Register::GS,
        K::cr_reg => Register::CR0,
        K::dr_reg => Register::DR0,
        K::tr_reg => Register::TR3,
        K::bnd_reg | K::bnd_or_mem_mpx => Register::BND0,
        K::mm_reg | K::mm_rm | K::mm_or_mem => Register::MM1,
        K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 | K::xmm_or_mem => {
            Register::XMM1
        }
        K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 | K::ymm_or_mem => {
            Register::YMM1
        }
        K::st0 => Register::ST0,
        K::sti_opcode => Register::ST1,
        K::tmm_reg | K::tmm_rm | K::tmm_vvvv => Register::TMM0,
        K::k_reg | K::k_rm | K::k_vvvv | K::k_or_mem => Register::K1,
        _ => return None,
    })
}

fn other(kind: K) -> OpKind {
    match kind {
        K::imm8 | K::imm8_const_1 | K::imm4_m2z => OpKind::Immediate8,
        K::imm8sex16 => OpKind::Immediate8to16,
        K::imm8sex32 => OpKind::Immediate8to32,
        K::imm8sex64 => OpKind::Immediate8to64,
        K::imm16 => OpKind::Immediate16,
        K::imm32 => OpKind::Immediate32,
        K::imm32sex64 => OpKind::Immediate32to64,
        K::imm64 => OpKind::Immediate64,
        K::seg_rSI => OpKind::MemorySegRSI,
        K::es_rDI => OpKind::MemoryESRDI,
        K::seg_rDI => OpKind::MemorySegRDI,
        K::farbr2_2 | K::farbr4_2 => OpKind::FarBranch32,
        K::br16_1
        | K::br16_2
        | K::br32_1
        | K::br32_4
        | K::br64_1
        | K::br64_4
        | K::xbegin_2
        | K::xbegin_4
        | K::brdisp_2
        | K::brdisp_4 => OpKind::NearBranch64,
        _ => OpKind::Memory,
    }
}

fn instruction(code: Code) -> Instruction {
    let mut i = Instruction::default();
    i.set_code(code);
    let info = code.op_code();
    for n in 0..info.op_count() {
        match register(info.op_kind(n)) {
            Some(register) => {
                i.set_op_kind(n, OpKind::Register);
                i.set_op_register(n, register);
            }
            None => i.set_op_kind(n, other(info.op_kind(n))),
        }
    }
    i
}

/// What this crate's decoder gives: no EVEX, XOP, 3DNow! and MVEX.
fn decodes(code: Code) -> bool {
    let info = code.op_code();
    let encoding = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    encoding
        && info.is_instruction()
        // WAIT decodes as an instruction before the one that waits.
        && !info.fwait()
        && (info.mode64() || info.mode32() || info.mode16())
        && !code.cpuid_features().contains(&F::KNC)
}

/// Codes that are not executed, by the CPUID features that they need.
fn missing() -> BTreeMap<String, BTreeSet<String>> {
    let mut list = BTreeMap::<_, BTreeSet<_>>::new();
    for code in Code::values().filter(|code| decodes(*code)) {
        if implementation(&instruction(code)).is_none() {
            let features: Vec<String> = code
                .cpuid_features()
                .iter()
                .map(|f| format!("{f:?}"))
                .collect();
            list.entry(features.join("+"))
                .or_default()
                .insert(format!("{:?}", code.mnemonic()).to_lowercase());
        }
    }
    list
}

fn lines() -> BTreeSet<String> {
    let one = |(feature, names): (&String, &BTreeSet<String>)| {
        names
            .iter()
            .map(|name| format!("{feature} {name}"))
            .collect::<Vec<_>>()
    };
    missing().iter().flat_map(one).collect()
}

#[test]
fn the_list_of_forms_that_are_not_executed_only_becomes_shorter() {
    let now = lines();
    for (feature, names) in missing() {
        let names: Vec<String> = names.into_iter().collect();
        std::println!("{feature}: {}", names.join(" "));
    }
    let text = std::fs::read_to_string(PATH).unwrap_or_default();
    let recorded: BTreeSet<String> = text.lines().map(str::to_string).collect();
    let new: Vec<_> = now.difference(&recorded).collect();
    assert!(
        recorded.is_empty() || new.is_empty(),
        "not executed any more: {new:?}"
    );
    if std::env::var_os("BLESS").is_some() {
        let text: String = now.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(PATH, text).expect("the list can be written");
        return;
    }
    let done: Vec<_> = recorded.difference(&now).collect();
    assert!(
        done.is_empty(),
        "executed now: {done:?}; BLESS=1 takes them out"
    );
}

/// Leaf, register (0 is EAX) and bit of a feature; nothing for what every processor has, or what has no bit in
/// the table's leaves.
fn bit(feature: F) -> Option<(u32, usize, u32)> {
    Some(match feature {
        F::FPU | F::FPU287 | F::FPU387 => (1, 3, 0),
        F::TSC => (1, 3, 4),
        F::MSR => (1, 3, 5),
        F::CX8 => (1, 3, 8),
        F::CMOV => (1, 3, 15),
        F::CLFSH => (1, 3, 19),
        F::MMX => (1, 3, 23),
        F::FXSR => (1, 3, 24),
        F::SSE => (1, 3, 25),
        F::SSE2 => (1, 3, 26),
        F::SSE3 => (1, 2, 0),
        F::PCLMULQDQ => (1, 2, 1),
        F::MONITOR => (1, 2, 3),
        F::VMX => (1, 2, 5),
        F::SMX => (1, 2, 6),
        F::SSSE3 => (1, 2, 9),
        F::FMA => (1, 2, 12),
        F::CMPXCHG16B => (1, 2, 13),
        F::SSE4_1 => (1, 2, 19),
        F::SSE4_2 => (1, 2, 20),
        F::MOVBE => (1, 2, 22),
        F::POPCNT => (1, 2, 23),
        F::AES => (1, 2, 25),
        F::XSAVE => (1, 2, 26),
        F::AVX => (1, 2, 28),
        F::F16C => (1, 2, 29),
        F::RDRAND => (1, 2, 30),
        F::FSGSBASE => (7, 1, 0),
        F::BMI1 => (7, 1, 3),
        F::AVX2 => (7, 1, 5),
        F::BMI2 => (7, 1, 8),
        F::INVPCID => (7, 1, 10),
        F::RTM => (7, 1, 11),
        F::RDSEED => (7, 1, 18),
        F::ADX => (7, 1, 19),
        F::SMAP => (7, 1, 20),
        F::CLFLUSHOPT => (7, 1, 23),
        F::CLWB => (7, 1, 24),
        F::SHA => (7, 1, 29),
        F::PKU => (7, 2, 3),
        F::CET_SS => (7, 2, 7),
        F::GFNI => (7, 2, 8),
        F::VAES => (7, 2, 9),
        F::VPCLMULQDQ => (7, 2, 10),
        F::RDPID => (7, 2, 22),
        F::CLDEMOTE => (7, 2, 25),
        F::MOVDIRI => (7, 2, 27),
        F::MOVDIR64B => (7, 2, 28),
        F::SERIALIZE => (7, 3, 14),
        F::CET_IBT => (7, 3, 20),
        F::LZCNT => (0x8000_0001, 2, 5),
        F::SYSCALL => (0x8000_0001, 3, 11),
        F::RDTSCP => (0x8000_0001, 3, 27),
        F::XSAVEOPT => (0xd, 0, 0),
        F::XSAVEC | F::XSAVES => return None,
        _ => return None,
    })
}

/// Features that every processor of this kind has.
fn is_base(feature: F) -> bool {
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::MULTIBYTENOP
            | F::PAUSE
    )
}

#[test]
fn cpuid_announces_nothing_that_is_not_executed() {
    for table in [CpuidTable::intel(), CpuidTable::amd()] {
        let announced = |feature: &F| match bit(*feature) {
            Some((leaf, register, bit)) => table.has(leaf, register, bit),
            None => is_base(*feature),
        };
        for code in Code::values().filter(|code| decodes(*code)) {
            let missing = implementation(&instruction(code)).is_none();
            let features = code.cpuid_features();
            assert!(
                !missing || !features.iter().all(announced),
                "{code:?} is announced by {features:?}"
            );
        }
    }
}
