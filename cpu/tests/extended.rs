//! XSAVEC, XSAVES, XRSTOR of the compacted format, MOVDIRI, MOVDIR64B and SERIALIZE (Intel SDM volume 1, 13.10 to
//! 13.12, and volume 2).

mod common;

use std::sync::Arc;

use common::Ram;
use common::long_mode::{CODE, machine};
use kvm_ops_cpu::{Cause, Cpu, Stopped, XSAVE_BYTES, XSAVE_PKRU};

const AREA: u64 = 0x6000;
const GP: u8 = 13;
const AVX: u64 = 1 << 2;
const PKRU: u64 = 1 << 9;
const FORMAT: u64 = 1 << 63;

/// `[rbx]`, with and without REX.W.
const XSAVEC: [u8; 4] = [0x48, 0x0f, 0xc7, 0x23];
const XSAVES: [u8; 4] = [0x48, 0x0f, 0xc7, 0x2b];
const XRSTORS: [u8; 4] = [0x48, 0x0f, 0xc7, 0x1b];
const XRSTOR: [u8; 4] = [0x48, 0x0f, 0xae, 0x2b];
const XSAVE: [u8; 4] = [0x48, 0x0f, 0xae, 0x23];

/// A machine with AVX on, RBX at the area, and EDX:EAX as given.
fn prepared(code: &[u8], mask: u64) -> (Cpu, Arc<Ram>) {
    let (mut cpu, ram) = machine(&[code, &[0xf4]].concat(), &[0xf4]);
    cpu.controls_mut().exceptions = u32::MAX;
    let mut r = cpu.registers();
    r.cr4 |= 0x4_0600;
    r.xcr0 = 7;
    r.gpr[0] = mask & 0xffff_ffff;
    r.gpr[2] = mask >> 32;
    r.gpr[3] = AREA;
    cpu.set_registers(&r);
    (cpu, ram)
}

/// The exception at which the code stops, if there is one.
fn vector(cpu: &mut Cpu) -> Option<u8> {
    match cpu.run(100) {
        Stopped::Halted => None,
        Stopped::Exit(exit) => match exit.cause {
            Cause::Exception(event) => Some(event.vector),
            other => panic!("exit {other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

fn load(cpu: &mut Cpu, change: impl FnOnce(&mut [u8])) {
    let mut area = cpu.save_xsave();
    change(&mut area);
    cpu.load_xsave(&area).expect("a state of this processor");
}

#[test]
fn only_components_in_use_are_written_and_the_header_says_which() {
    for code in [XSAVEC, XSAVES] {
        let (mut cpu, ram) = prepared(&code, u64::MAX);
        ram.write(AREA, &[0xaa; 832]);
        // YMM3's upper half; x87 and SSE stay in their initial state.
        load(&mut cpu, |area| {
            area[512] = 4;
            area[576 + 48] = 0x55;
        });
        assert_eq!(vector(&mut cpu), None);
        assert_eq!(ram.read_u64(AREA + 512), 4, "XSTATE_BV");
        assert_eq!(ram.read_u64(AREA + 520), FORMAT | 7, "XCOMP_BV");
        assert_eq!(ram.read_u64(AREA + 576 + 48), 0x55);
        for untouched in [0, 24, 160, 464, 528] {
            assert_eq!(ram.read_u64(AREA + untouched), 0xaaaa_aaaa_aaaa_aaaa);
        }
    }
}

#[test]
fn mxcsr_alone_brings_sse_into_use() {
    let (mut cpu, ram) = prepared(&XSAVEC, 3);
    load(&mut cpu, |area| area[24..26].copy_from_slice(&[0x80, 0x3f]));
    assert_eq!(vector(&mut cpu), None);
    assert_eq!(ram.read_u64(AREA + 512), 2);
    assert_eq!(ram.read_u64(AREA + 520), FORMAT | 3);
    assert_eq!(ram.read_u64(AREA + 24), 0xffff_0000_3f80);
}

#[test]
fn what_xsaves_wrote_comes_back_by_xrstors_and_by_xrstor() {
    for restore in [XRSTORS, XRSTOR] {
        let code = [&XSAVES[..], &restore[..]].concat();
        let (mut cpu, _) = prepared(&code, 7);
        load(&mut cpu, |area| {
            area[..2].copy_from_slice(&[0x7f, 0x02]);
            area[24..26].copy_from_slice(&[0x80, 0x5f]);
            area[160..832].fill(0);
            area[512] = 7;
            (area[160], area[600]) = (1, 2);
        });
        let before = cpu.save_xsave();
        assert_eq!(vector(&mut cpu), None);
        assert_eq!(cpu.save_xsave(), before);
    }
}

#[test]
fn a_component_that_is_asked_for_and_not_there_becomes_initial_mxcsr_too() {
    let (mut cpu, ram) = prepared(&XRSTORS, 7);
    load(&mut cpu, |area| {
        area[24..26].copy_from_slice(&[0x80, 0x5f]);
        area[512] = 7;
        (area[160], area[600]) = (1, 2);
    });
    ram.write_u64(AREA + 520, FORMAT | 7);
    assert_eq!(vector(&mut cpu), None);
    let after = cpu.save_xsave();
    assert_eq!((after[512], &after[24..26]), (0, &[0x80, 0x1f][..]));
}

/// A machine whose PKRU is a state component and has this value.
fn with_pkru(code: &[u8], mask: u64, value: u32) -> (Cpu, Arc<Ram>) {
    let (mut cpu, ram) = prepared(code, mask);
    assert!(cpu.set_xcr0(7 | PKRU));
    load(&mut cpu, |area| {
        area[512..520].copy_from_slice(&PKRU.to_le_bytes());
        area[XSAVE_PKRU..XSAVE_PKRU + 4].copy_from_slice(&value.to_le_bytes());
    });
    (cpu, ram)
}

/// PKRU, as the area says it.
fn pkru(cpu: &Cpu) -> (u64, [u8; 4]) {
    let area = cpu.save_xsave();
    let bits = u64::from_le_bytes(*area[512..].first_chunk().expect("a header"));
    let value = area[XSAVE_PKRU..].first_chunk().expect("a component");
    (bits & PKRU, *value)
}

#[test]
fn pkru_has_its_place_behind_avx512_or_behind_what_the_compacted_format_has() {
    const VALUE: u32 = 0x5555_5554;
    let behind_avx = 832;
    for (code, mask, place) in [
        (XSAVE, u64::MAX, XSAVE_PKRU as u64),
        (XSAVEC, u64::MAX, behind_avx),
        (XSAVES, PKRU | AVX, behind_avx),
        (XSAVEC, PKRU, 576),
    ] {
        let (mut cpu, ram) = with_pkru(&code, mask, VALUE);
        assert_eq!(vector(&mut cpu), None);
        assert_eq!(ram.read_u64(AREA + 512) & PKRU, PKRU);
        assert_eq!(
            ram.read_u64(AREA + place),
            VALUE.into(),
            "{code:02x?} {mask:#x}"
        );
    }
}

#[test]
fn pkru_comes_back_with_each_form_and_becomes_0_where_the_area_lacks_it() {
    for (save, restore) in [(XSAVE, XRSTOR), (XSAVEC, XRSTOR), (XSAVES, XRSTORS)] {
        // WRPKRU gives another value in between: EAX, which is the mask too.
        let code = [&save[..], &[0x0f, 0x01, 0xef], &restore].concat();
        let (mut cpu, ram) = with_pkru(&code, PKRU, 0);
        let mut r = cpu.registers();
        r.cr4 |= 1 << 22;
        cpu.set_registers(&r);
        cpu.set_gpr(1, 0);
        load(&mut cpu, |area| {
            area[512..520].copy_from_slice(&PKRU.to_le_bytes());
            area[XSAVE_PKRU] = 0x3c;
        });
        assert_eq!(vector(&mut cpu), None);
        assert_eq!(pkru(&cpu), (PKRU, [0x3c, 0, 0, 0]));
        let compacted = ram.read_u64(AREA + 520);
        let (mut cpu, ram) = with_pkru(&restore, PKRU, 0x3c);
        ram.write_u64(AREA + 512, 0);
        ram.write_u64(AREA + 520, compacted);
        assert_eq!(vector(&mut cpu), None);
        assert_eq!(pkru(&cpu), (0, [0; 4]));
    }
}

/// CPUID leaf 0xd tells the places and sizes that the instructions have.
#[test]
fn cpuid_tells_where_pkru_is_and_the_sizes_of_both_formats() {
    let (mut cpu, _) = prepared(&[], 0);
    let component = cpu.cpuid(0xd, 9);
    assert_eq!((component.eax, component.ebx as usize), (8, XSAVE_PKRU));
    for (xcr0, standard, compacted) in [
        (3, 576, 576),
        (7, 832, 832),
        (7 | PKRU, XSAVE_BYTES, 840),
        (3 | PKRU, XSAVE_BYTES, 584),
    ] {
        assert!(cpu.set_xcr0(xcr0));
        assert_eq!(cpu.cpuid(0xd, 0).ebx as usize, standard, "{xcr0:#x}");
        assert_eq!(cpu.cpuid(0xd, 1).ebx, compacted, "{xcr0:#x}");
    }
}

#[test]
fn headers_that_are_none_are_refused() {
    let cases: [(&[u8], u64, u64, u64); 6] = [
        // The standard format is none of XRSTORS.
        (&XRSTORS, 0, 0, 0),
        // A component that is not in the area, or that XCR0 lacks.
        (&XRSTOR, 4, FORMAT | 3, 0),
        (&XRSTORS, 0, FORMAT | 8, 0),
        (&XRSTOR, 8, 0, 0),
        // Reserved bytes.
        (&XRSTORS, 0, FORMAT | 7, 1),
        (&XRSTOR, 0, 7, 0),
    ];
    for (code, bits, compact, reserved) in cases {
        let (mut cpu, ram) = prepared(code, 7);
        ram.write_u64(AREA + 512, bits);
        ram.write_u64(AREA + 520, compact);
        ram.write_u64(AREA + 528, reserved);
        assert_eq!(vector(&mut cpu), Some(GP), "{bits:#x} {compact:#x}");
    }
}

#[test]
fn supervisor_forms_fault_in_user_mode() {
    for (code, expected) in [(XSAVES, Some(GP)), (XRSTORS, Some(GP)), (XSAVEC, None)] {
        let (mut cpu, ram) = prepared(&code, 7);
        // All of memory is the user's, and CS and SS have DPL 3.
        for table in [0x10000, 0x11000, 0x12000] {
            ram.write_u64(table, ram.read_u64(table) | 4);
        }
        let mut r = cpu.registers();
        r.segments[1].rights |= 3 << 5;
        r.segments[2].rights |= 3 << 5;
        r.segments[1].selector |= 3;
        r.segments[2].selector |= 3;
        cpu.set_registers(&r);
        ram.write_u64(AREA + 520, FORMAT | 7);
        match expected {
            Some(_) => assert_eq!(vector(&mut cpu), expected, "{code:02x?}"),
            // HLT is the next one that is privileged.
            None => {
                assert_eq!(vector(&mut cpu), Some(GP));
                assert_eq!(cpu.rip(), CODE + 4);
            }
        }
    }
}

#[test]
fn direct_stores_write_and_the_wide_one_needs_a_line() {
    // movdiri [rbx], rcx
    let (mut cpu, ram) = prepared(&[0x48, 0x0f, 0x38, 0xf9, 0x0b], 0);
    cpu.set_gpr(1, 0x1122_3344_5566_7788);
    assert_eq!(vector(&mut cpu), None);
    assert_eq!(ram.read_u64(AREA), 0x1122_3344_5566_7788);
    // movdir64b rsi, [rbx]
    for (target, expected) in [(0x6100, None), (0x6108, Some(GP))] {
        let (mut cpu, ram) = prepared(&[0x66, 0x0f, 0x38, 0xf8, 0x33], 0);
        let data: Vec<u8> = (0..64).collect();
        ram.write(AREA, &data);
        cpu.set_gpr(6, target);
        assert_eq!(vector(&mut cpu), expected);
        let mut there = vec![0; 64];
        ram.read(target, &mut there);
        assert_eq!(there == data, expected.is_none());
    }
}

#[test]
fn serialize_does_nothing_else() {
    let (mut cpu, _) = prepared(&[0x0f, 0x01, 0xe8], 0);
    assert_eq!(vector(&mut cpu), None);
    assert_eq!(cpu.retired(), 2);
}
