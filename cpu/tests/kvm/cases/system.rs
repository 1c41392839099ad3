//! Instructions of the system, at CPL 0 and 3.

use super::{CR0, CR4, Case};
use crate::machine::{DATA, ELSEWHERE, STACK};

/// The first address that is not canonical with 48 bits.
const NOT_CANONICAL: u64 = 0x8000_0000_0000;

/// Instructions without operands, or with RAX, RBX (address of 16 bytes of operands), RCX and RDX as they stand.
const PLAIN: &[(&str, &[u8])] = &[
    ("nop", &[0x90]),
    ("hlt", &[0xf4]),
    ("cli", &[0xfa]),
    ("sti", &[0xfb]),
    ("pushfq", &[0x9c]),
    ("clts", &[0x0f, 0x06]),
    ("wbinvd", &[0x0f, 0x09]),
    ("ud2", &[0x0f, 0x0b]),
    ("int3", &[0xcc]),
    ("int 80h", &[0xcd, 0x80]),
    ("icebp", &[0xf1]),
    ("invlpg [rbx]", &[0x0f, 0x01, 0x3b]),
    ("sgdt [rbx]", &[0x0f, 0x01, 0x03]),
    ("sidt [rbx]", &[0x0f, 0x01, 0x0b]),
    ("lgdt [rbx]", &[0x0f, 0x01, 0x13]),
    ("lidt [rbx]", &[0x0f, 0x01, 0x1b]),
    ("sldt rax", &[0x48, 0x0f, 0x00, 0xc0]),
    ("str rax", &[0x48, 0x0f, 0x00, 0xc8]),
    ("smsw rax", &[0x48, 0x0f, 0x01, 0xe0]),
    ("swapgs", &[0x0f, 0x01, 0xf8]),
    ("sysretq", &[0x48, 0x0f, 0x07]),
    ("syscall", &[0x0f, 0x05]),
    ("push cs (not in 64-bit mode)", &[0x0e]),
    ("into (not in 64-bit mode)", &[0xce]),
    ("lock nop", &[0xf0, 0x90]),
    ("lock mov", &[0xf0, 0x89, 0x03]),
    ("mov cs, ax", &[0x8e, 0xc8]),
    ("mov rax, es:[rbx]", &[0x26, 0x48, 0x8b, 0x03]),
    (
        "fifteen bytes",
        &[
            0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
            0x90,
        ],
    ),
    (
        "sixteen bytes",
        &[
            0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
            0x66, 0x90,
        ],
    ),
    ("in al, dx", &[0xec]),
    ("out dx, al", &[0xee]),
    ("out 80h, eax", &[0xe7, 0x80]),
];

pub(crate) fn all() -> impl Iterator<Item = Case> {
    let mut cases = Vec::new();
    for cpl in [0, 3] {
        for (name, code) in PLAIN {
            for iopl in 0..4u64 {
                let mut case = Case::new(format!("{name}, CPL {cpl}, IOPL {iopl}"), code)
                    .cpl(cpl)
                    .gpr(2, 0x80)
                    .gpr(1, ELSEWHERE)
                    .gpr(3, DATA)
                    .words(DATA, &[0x0fff_0000_0000_01ff, 0]);
                case.rflags = iopl << 12;
                case.msrs = vec![
                    (0xc000_0081, 0x0010_0008 << 32),
                    (0xc000_0082, ELSEWHERE),
                    (0xc000_0084, 0x47700),
                    (0xc000_0102, 0x1234_5000),
                ];
                cases.push(case);
            }
        }
        control_registers(cpl, &mut cases);
        debug_registers(cpl, &mut cases);
        msrs(cpl, &mut cases);
        flags(cpl, &mut cases);
        addresses(cpl, &mut cases);
        system_calls(cpl, &mut cases);
    }
    cases.into_iter()
}

/// MOV to and from CR0, CR2, CR3, CR4 and numbers that do not exist. (CR8 is the APIC's, which KVM has outside.)
fn control_registers(cpl: u8, cases: &mut Vec<Case>) {
    for n in (0..16u8).filter(|n| *n != 8) {
        let rex = if n < 8 { 0x48 } else { 0x4c };
        let read = [rex, 0x0f, 0x20, 0xc0 | (n & 7) << 3];
        cases.push(Case::new(format!("mov rax, cr{n}, CPL {cpl}"), &read).cpl(cpl));
    }
    let bits = |base: u64| (0..64).map(move |bit| base ^ 1 << bit);
    // Without paging or in another size of the tables, there would be no next instruction to look at.
    let cr0 = bits(CR0).chain([0x8001_0031 | 0x6000_0000, CR0 | 0x2000_0000, 0x10]);
    let cr4 = bits(CR4).filter(|value| value & MCE != 0 && *value != CR4 ^ 1 << 18);
    let cr3 = (0..64)
        .filter(|bit| !(12..46).contains(bit))
        .map(|bit| 0x1_0000 ^ 1u64 << bit);
    let cr3: Vec<u64> = cr3.filter(|value| *value != 0).collect();
    for (n, values) in [
        (0u8, cr0.collect::<Vec<_>>()),
        (2, vec![0, UPPER_HALF]),
        (3, cr3),
        (4, cr4.collect()),
    ] {
        for value in values {
            let name = format!("mov cr{n}, {value:#x}, CPL {cpl}");
            let write = [0x0f, 0x22, 0xc0 | n << 3];
            cases.push(Case::new(name, &write).cpl(cpl).gpr(0, value));
        }
    }
    for word in [0u64, 1, 2, 4, 8, 0xe, 0xf, 0xfff1] {
        let name = format!("lmsw {word:#x}, CPL {cpl}");
        cases.push(Case::new(name, &[0x0f, 0x01, 0xf0]).cpl(cpl).gpr(0, word));
    }
}

/// Of CR4.
const MCE: u64 = 1 << 6;
const UPPER_HALF: u64 = 0xffff_8000_0000_0000;

fn debug_registers(cpl: u8, cases: &mut Vec<Case>) {
    for n in 0..8u8 {
        let read = [0x0f, 0x21, 0xc0 | n << 3];
        cases.push(Case::new(format!("mov rax, dr{n}, CPL {cpl}"), &read).cpl(cpl));
        for value in [
            0,
            0x400,
            0x1000,
            0xffff_0ff0,
            1 << 32,
            NOT_CANONICAL,
            u64::MAX,
        ] {
            // Breakpoints that are switched on would hit: only values without them.
            if n == 7 && value & 0xff != 0 {
                continue;
            }
            let name = format!("mov dr{n}, {value:#x}, CPL {cpl}");
            let write = [0x0f, 0x23, 0xc0 | n << 3];
            let mut case = Case::new(name, &write).cpl(cpl).gpr(0, value);
            cases.push(case.clone());
            // CR4.DE: no aliases of DR6 and DR7.
            case.cr4 |= 8;
            case.name += ", CR4.DE";
            cases.push(case);
        }
    }
}

fn msrs(cpl: u8, cases: &mut Vec<Case>) {
    // SYSENTER, PAT, EFER, STAR to FMASK, bases, and numbers that do not exist.
    let known = [
        0x174,
        0x175,
        0x176,
        0x277,
        0xc000_0080,
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084,
    ];
    let bases = [0xc000_0100, 0xc000_0101, 0xc000_0102];
    let unknown = [0x4000_ffff, 0xc000_1234, 0x1234_5678];
    for index in known.into_iter().chain(bases).chain(unknown) {
        let name = format!("rdmsr {index:#x}, CPL {cpl}");
        cases.push(Case::new(name, &[0x0f, 0x32]).cpl(cpl).gpr(1, index));
        for value in [
            0,
            1,
            0x500,
            0xd00,
            0xd01,
            0x501,
            0x7_0406,
            0x0007_0406_0007_0406,
            0x0707_0707_0707_0703,
            0x0108_0000,
            0xffff_0000,
            0x7fff_ffff_f000,
            NOT_CANONICAL,
            UPPER_HALF,
            u64::MAX,
        ] {
            let name = format!("wrmsr {index:#x}, {value:#x}, CPL {cpl}");
            let case = Case::new(name, &[0x0f, 0x30]).cpl(cpl).gpr(1, index);
            cases.push(case.gpr(0, value & 0xffff_ffff).gpr(2, value >> 32));
        }
    }
}

/// POPF and IRET with every bit of RFLAGS, under every IOPL.
fn flags(cpl: u8, cases: &mut Vec<Case>) {
    // Not TF, whose trap comes before the HLT, and not VM.
    for bit in (0..22u64).filter(|bit| ![8, 17].contains(bit)) {
        for iopl in 0..4u64 {
            let name = format!("popfq, bit {bit}, CPL {cpl}, IOPL {iopl}");
            // lea rsp, [rsp - 8]; popfq
            let code = [0x48, 0x8d, 0x64, 0x24, 0xf8, 0x9d];
            let mut case = Case::new(name, &code)
                .cpl(cpl)
                .words(STACK - 8, &[1 << bit]);
            case.rflags = iopl << 12;
            cases.push(case);
        }
    }
}

/// Addresses that are not canonical, by the instructions that take some.
fn addresses(cpl: u8, cases: &mut Vec<Case>) {
    let rows: [(&str, &[u8], usize); 11] = [
        ("mov al, [rbx]", &[0x8a, 0x03], 3),
        ("mov [rbx], al", &[0x88, 0x03], 3),
        ("mov al, [rbp]", &[0x8a, 0x45, 0x00], 5),
        ("mov rsp, rbx; push rax", &[0x48, 0x89, 0xdc, 0x50], 3),
        ("mov rsp, rbx; pop rax", &[0x48, 0x89, 0xdc, 0x58], 3),
        ("mov rsp, rbx; ret", &[0x48, 0x89, 0xdc, 0xc3], 3),
        ("mov rsp, rbx; int 30h", &[0x48, 0x89, 0xdc, 0xcd, 0x30], 3),
        ("jmp rbx", &[0xff, 0xe3], 3),
        ("call rbx", &[0xff, 0xd3], 3),
        ("lgdt [rbx]", &[0x0f, 0x01, 0x13], 3),
        ("invlpg [rbx]", &[0x0f, 0x01, 0x3b], 3),
    ];
    for (name, code, register) in rows {
        for address in [
            NOT_CANONICAL,
            NOT_CANONICAL - 1,
            u64::MAX,
            !0 << 47,
            (!0 << 47) - 1,
            0x40_0000,
        ] {
            let name = format!("{name} with {address:#x}, CPL {cpl}");
            cases.push(Case::new(name, code).cpl(cpl).gpr(register, address));
        }
    }
    for (name, code) in [
        ("lgdt [rbx]", [0x0f, 0x01, 0x13]),
        ("lidt [rbx]", [0x0f, 0x01, 0x1b]),
    ] {
        for base in [NOT_CANONICAL, u64::MAX, 0x3000] {
            let mut operand = vec![0xff, 0x0f];
            operand.extend(base.to_le_bytes());
            let name = format!("{name}, base {base:#x}, CPL {cpl}");
            cases.push(
                Case::new(name, &code)
                    .cpl(cpl)
                    .gpr(3, DATA)
                    .memory(DATA, operand),
            );
        }
    }
}

/// SYSCALL and SYSRET with and without EFER.SCE, to canonical addresses, in both operand sizes.
fn system_calls(cpl: u8, cases: &mut Vec<Case>) {
    for (name, code) in [
        ("syscall", &[0x0f, 0x05][..]),
        ("sysretq", &[0x48, 0x0f, 0x07]),
        ("sysretl", &[0x0f, 0x07]),
    ] {
        for sce in [0, 1] {
            for r11 in [0u64, 0x202, 0x3000, 0x25_0ed7 & !0x100] {
                for rcx in [ELSEWHERE, 0x40_0000] {
                    let name = format!("{name}, SCE {sce}, R11 {r11:#x}, RCX {rcx:#x}, CPL {cpl}");
                    let mut case = Case::new(name, code).cpl(cpl).gpr(11, r11).gpr(1, rcx);
                    case.efer = case.efer & !1 | sce;
                    case.msrs = vec![
                        (0xc000_0081, 0x0010_0008 << 32),
                        (0xc000_0082, ELSEWHERE),
                        (0xc000_0084, 0x4_7700),
                    ];
                    cases.push(case);
                }
            }
        }
    }
}
