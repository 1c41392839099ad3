//! #NM, #MF and #UD of every x87 and MMX form: by CR0.TS and CR0.EM, and by an exception that waits (Intel SDM
//! volume 3, tables 2-3 and 14-1).

mod common;
#[path = "native/forms.rs"]
#[allow(dead_code, unreachable_pub)]
mod forms;
#[path = "native/random.rs"]
#[allow(dead_code, unreachable_pub)]
mod random;

use common::long_mode::{CODE, machine};
use iced_x86::{Code, CpuidFeature as F, Instruction, Mnemonic as M, OpKind};
use kvm_ops_cpu::{Cause, Cpu, Stopped};
use random::Random;

const EM: u64 = 1 << 2;
const TS: u64 = 1 << 3;
const UD: u8 = 6;
const NM: u8 = 7;
const MF: u8 = 16;
/// Place of the memory operands.
const DATA: u64 = 0x6000;

fn is_x87(code: Code) -> bool {
    let x87 = |f: &F| matches!(f, F::FPU | F::FPU287 | F::FPU387);
    code.cpuid_features().iter().any(x87)
}

fn names_mmx(i: &Instruction) -> bool {
    let mm = |n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm();
    (0..i.op_count()).any(mm)
}

/// Those that do not wait for exceptions.
fn does_not_wait(m: M) -> bool {
    use M::{Fnclex, Fndisi, Fneni, Fninit, Fnsave, Fnsetpm, Fnstcw, Fnstenv, Fnstsw};
    matches!(
        m,
        Fnclex | Fndisi | Fneni | Fninit | Fnsave | Fnsetpm | Fnstcw | Fnstenv | Fnstsw
    )
}

/// An instruction of each form that `wanted` takes, encoded.
fn instructions(wanted: impl Fn(&Instruction) -> bool) -> Vec<(Instruction, Vec<u8>)> {
    let mut rng = Random(7);
    let mut made = |code: Code| {
        // Operands are chosen at random; a few tries give a register where there can be one.
        (0..64).find_map(|_| {
            let i = forms::make(code, &mut rng).filter(|i| wanted(i))?;
            let bytes = forms::encode(&i, CODE)?;
            // WAIT and an instruction are two.
            (bytes.len() == 1 || bytes[0] != 0x9b).then_some((i, bytes))
        })
    };
    let codes = Code::values().filter(|code| code.op_code().mode64());
    codes.filter_map(&mut made).collect()
}

/// The exception of an instruction with these bits of CR0; `pending`: the x87 has one that is not masked.
fn vector(bytes: &[u8], cr0: u64, pending: bool) -> Option<u8> {
    let (mut cpu, _) = machine(&[bytes, &[0xf4]].concat(), &[0xf4]);
    cpu.controls_mut().exceptions = u32::MAX;
    let mut r = cpu.registers();
    r.cr0 |= cr0;
    r.cr4 |= 0x600;
    r.gpr[15] = DATA;
    r.gpr[7] = DATA;
    cpu.set_registers(&r);
    set_x87(&mut cpu, pending);
    match cpu.run(2) {
        Stopped::Exit(exit) => match exit.cause {
            Cause::Exception(event) => Some(event.vector),
            other => panic!("exit {other:?}"),
        },
        _ => None,
    }
}

fn set_x87(cpu: &mut Cpu, pending: bool) {
    let mut area = cpu.save_xsave();
    let (control, status): (u16, u16) = if pending { (0x37e, 0x8081) } else { (0x37f, 0) };
    area[0..2].copy_from_slice(&control.to_le_bytes());
    area[2..4].copy_from_slice(&status.to_le_bytes());
    area[512] |= 1;
    cpu.load_xsave(&area).expect("a state of this processor");
}

#[test]
fn every_x87_form_is_not_available_with_ts_or_em() {
    let list = instructions(|i| is_x87(i.code()) && i.mnemonic() != M::Wait);
    assert!(list.len() >= 95, "{} forms", list.len());
    for (i, bytes) in list {
        for cr0 in [EM, TS, EM | TS] {
            assert_eq!(vector(&bytes, cr0, true), Some(NM), "{i}, {cr0:#x}");
        }
        assert_eq!(vector(&bytes, 0, false), None, "{i}");
    }
}

#[test]
fn an_exception_that_waits_comes_before_every_x87_form_that_waits() {
    for (i, bytes) in instructions(|i| is_x87(i.code())) {
        let expected = (!does_not_wait(i.mnemonic())).then_some(MF);
        assert_eq!(vector(&bytes, 0, true), expected, "{i}");
    }
}

#[test]
fn wait_looks_at_ts_only_with_mp() {
    // MP is set in the machine's CR0; EM does nothing.
    assert_eq!(vector(&[0x9b], TS, true), Some(NM));
    assert_eq!(vector(&[0x9b], EM, true), Some(MF));
    assert_eq!(vector(&[0x9b], EM, false), None);
}

#[test]
fn every_mmx_form_is_undefined_with_em_and_waits_for_x87_exceptions() {
    let list = instructions(|i| names_mmx(i) || i.code() == Code::Emms);
    assert!(list.len() >= 100, "{} forms", list.len());
    for (i, bytes) in list {
        assert_eq!(vector(&bytes, EM, false), Some(UD), "{i}");
        assert_eq!(vector(&bytes, EM | TS, true), Some(UD), "{i}");
        assert_eq!(vector(&bytes, TS, true), Some(NM), "{i}");
        assert_eq!(vector(&bytes, 0, true), Some(MF), "{i}");
        assert_eq!(vector(&bytes, 0, false), None, "{i}");
    }
}
