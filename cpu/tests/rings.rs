//! Changes of privilege outside of interrupts: call gates, far returns, SYSENTER, and virtual-8086 mode.

mod common;

use std::sync::Arc;

use common::{Ram, TestBus};
use kvm_ops_cpu::{Cause, CodePages, Cpu, CpuidTable, Exit, Registers, Segment, Stopped};

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
/// Where far pointers of 64-bit code lie.
const POINTER: u64 = 0x4000;
const INNER_STACK: u64 = 0x6008;
const STACK: u64 = 0x7000;
const CODE: u64 = 0x8000;
const HANDLER: u64 = 0x9000;
const PML4: u64 = 0x10000;

const KERNEL_CODE: u16 = 0x8;
const KERNEL_DATA: u16 = 0x10;
const USER_CODE: u16 = 0x1b;
const USER_DATA: u16 = 0x23;
const TASK: u16 = 0x28;
const CONFORMING: u16 = 0x30;
/// Kernel code and data of 4 KiB.
const SHORT_CODE: u16 = 0x38;
const SHORT_DATA: u16 = 0x40;
const ABSENT_CODE: u16 = 0x48;
const ABSENT_DATA: u16 = 0x50;
const GATE: u16 = 0x58;

const NARROW: u64 = 4;
const WIDE: u64 = 12;

const UD2: [u8; 2] = [0x0f, 0x0b];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Protected,
    Long,
}

struct Machine {
    cpu: Cpu,
    ram: Arc<Ram>,
}

/// Flat code at `cpl` whose exceptions exit.
fn machine(mode: Mode, cpl: u16) -> Machine {
    machine_of(CpuidTable::intel(), mode, cpl)
}

fn machine_of(cpuid: CpuidTable, mode: Mode, cpl: u16) -> Machine {
    let ram = Ram::new(0x10_0000);
    let size: u64 = match mode {
        Mode::Protected => 0x40,
        Mode::Long => 0x20,
    };
    let flat = |rights: u64| 0xffff | rights << 40 | (0x8f | size) << 48;
    let short = |rights: u64| 0xfff | rights << 40 | size << 48;
    for (selector, descriptor) in [
        (KERNEL_CODE, flat(0x9b)),
        (KERNEL_DATA, flat(0x93)),
        (USER_CODE & !3, flat(0xfb)),
        (USER_DATA & !3, flat(0xf3)),
        (CONFORMING, flat(0x9f)),
        (SHORT_CODE, short(0x9b)),
        (SHORT_DATA, short(0x93)),
        (ABSENT_CODE, flat(0x1b)),
        (ABSENT_DATA, flat(0x13)),
    ] {
        ram.write_u64(GDT + u64::from(selector), descriptor);
    }
    match mode {
        Mode::Protected => {
            ram.write_u64(TSS + 4, INNER_STACK | u64::from(KERNEL_DATA) << 32);
        }
        Mode::Long => {
            ram.write_u64(TSS + 4, INNER_STACK);
            // The first 2 MiB, for users too.
            ram.write_u64(PML4, 0x11007);
            ram.write_u64(0x11000, 0x12007);
            ram.write_u64(0x12000, 0x87);
        }
    }
    let bus = TestBus::new(&ram);
    let mut cpu = Cpu::new(Box::new(bus), CodePages::new(256), cpuid);
    let mut r = cpu.registers();
    let dpl = u32::from(cpl) << 5;
    let segment = |selector, rights| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    };
    let user = cpl == 3;
    r.segments = [segment(if user { USER_DATA } else { KERNEL_DATA }, 0xc093 | dpl); 6];
    let long = mode == Mode::Long;
    let rights = if long { 0xa09b } else { 0xc09b };
    r.segments[1] = segment(if user { USER_CODE } else { KERNEL_CODE }, rights | dpl);
    r.tr = Segment {
        selector: TASK,
        base: TSS,
        limit: 0x67,
        rights: 0x8b,
    };
    (r.gdtr.base, r.gdtr.limit) = (GDT, GATE + 15);
    (r.idtr.base, r.idtr.limit) = (IDT, 0x1ff);
    (r.rip, r.gpr[4]) = (CODE, STACK);
    if long {
        (r.cr0, r.cr3, r.cr4, r.efer) = (0x8000_0011, PML4, 0x20, 0x500);
    } else {
        r.cr0 = 0x11;
    }
    cpu.set_registers(&r);
    cpu.controls_mut().exceptions = u32::MAX;
    Machine { cpu, ram }
}

impl Machine {
    fn change(&mut self, change: impl FnOnce(&mut Registers)) {
        let mut r = self.cpu.registers();
        change(&mut r);
        self.cpu.set_registers(&r);
    }

    /// A present call gate to `target`:`offset` that callers of CPL 3 may use.
    fn gate(&self, kind: u64, target: u16, offset: u64, parameters: u64) {
        let rights = 0xe0 | kind;
        let low = offset & 0xffff
            | u64::from(target) << 16
            | parameters << 32
            | rights << 40
            | (offset >> 16 & 0xffff) << 48;
        self.ram.write_u64(GDT + u64::from(GATE), low);
        self.ram.write_u64(GDT + u64::from(GATE) + 8, offset >> 32);
    }

    /// Runs to an exception: its vector and error code.
    fn exception(&mut self) -> (u8, Option<u32>) {
        match self.cpu.run(100) {
            Stopped::Exit(Exit {
                cause: Cause::Exception(e),
                ..
            }) => (e.vector, e.code),
            other => panic!("{other:?}"),
        }
    }

    fn ends(&mut self) {
        assert_eq!(self.exception(), (6, None), "the end is UD2");
    }
}

/// `call selector:0` or `jmp selector:0` of 32-bit code.
fn far(call: bool, selector: u16) -> Vec<u8> {
    let [low, high] = selector.to_le_bytes();
    vec![if call { 0x9a } else { 0xea }, 0, 0, 0, 0, low, high]
}

/// The same through a pointer in memory, of 64-bit code.
fn far_indirect(m: &Machine, call: bool, selector: u16) -> Vec<u8> {
    m.ram.write_u64(POINTER, u64::from(selector) << 32);
    let mut code = vec![0xff, if call { 0x1c } else { 0x2c }, 0x25];
    code.extend((POINTER as u32).to_le_bytes());
    code
}

#[test]
fn a_call_gate_leads_inside_with_parameters_and_retf_drops_them_on_both_stacks() {
    // push 0x11; push 0x22; call; ud2. The handler: mov ecx, ss; mov edx, esp; its parameters to EAX and EBX; retf.
    let wide: [&[u8]; 2] = [
        &[0x6a, 0x11, 0x6a, 0x22],
        &[0x8b, 0x44, 0x24, 8, 0x8b, 0x5c, 0x24, 12, 0xca, 8, 0],
    ];
    let narrow: [&[u8]; 2] = [
        &[0x66, 0x6a, 0x11, 0x66, 0x6a, 0x22],
        &[
            0x66, 0x8b, 0x44, 0x24, 4, 0x66, 0x8b, 0x5c, 0x24, 6, 0x66, 0xca, 4, 0,
        ],
    ];
    for (kind, [pushes, body], size) in [(WIDE, wide, 4), (NARROW, narrow, 2)] {
        let mut m = machine(Mode::Protected, 3);
        m.gate(kind, KERNEL_CODE, HANDLER, 2);
        m.ram
            .write(CODE, &[pushes, &far(true, GATE | 3), &UD2].concat());
        m.ram
            .write(HANDLER, &[&[0x8c, 0xd1, 0x89, 0xe2], body].concat());
        m.ends();
        let r = m.cpu.registers();
        assert_eq!((r.gpr[0], r.gpr[3]), (0x22, 0x11), "type {kind}");
        assert_eq!(
            (r.gpr[1], r.gpr[2]),
            (KERNEL_DATA.into(), INNER_STACK - 6 * size)
        );
        assert_eq!(
            (m.cpu.cpl(), r.gpr[4], r.segments[2].selector),
            (3, STACK, USER_DATA)
        );
    }
}

#[test]
fn a_call_gate_of_long_mode_takes_a_null_stack_segment_and_does_not_align() {
    let mut m = machine(Mode::Long, 3);
    m.gate(WIDE, KERNEL_CODE, HANDLER, 2);
    let call = far_indirect(&m, true, GATE | 3);
    m.ram.write(CODE, &[&call[..], &UD2].concat());
    // mov ecx, ss; mov rdx, rsp; retfq
    m.ram
        .write(HANDLER, &[0x8c, 0xd1, 0x48, 0x89, 0xe2, 0x48, 0xcb]);
    m.ends();
    let r = m.cpu.registers();
    assert_eq!((r.gpr[1], r.gpr[2]), (0, INNER_STACK - 32));
    assert_eq!(
        (m.cpu.cpl(), r.gpr[4], r.segments[2].selector),
        (3, STACK, USER_DATA)
    );
    assert_eq!(m.ram.read_u64(INNER_STACK - 8), USER_DATA.into());
    assert_eq!(m.ram.read_u64(INNER_STACK - 16), STACK);
}

#[test]
fn a_gate_to_the_same_privilege_keeps_the_stack_and_conforming_code_keeps_the_level() {
    for (cpl, target, call) in [
        (0, KERNEL_CODE, true),
        (0, KERNEL_CODE, false),
        (3, USER_CODE, true),
        (3, USER_CODE, false),
        (3, CONFORMING, true),
        (3, CONFORMING, false),
    ] {
        for mode in [Mode::Protected, Mode::Long] {
            let mut m = machine(mode, cpl);
            m.gate(WIDE, target, HANDLER, 5);
            let code = match mode {
                Mode::Protected => far(call, GATE | cpl),
                Mode::Long => far_indirect(&m, call, GATE | cpl),
            };
            m.ram.write(CODE, &code);
            m.ram.write(HANDLER, &UD2);
            m.ends();
            let r = m.cpu.registers();
            let size = if mode == Mode::Long { 8 } else { 4 };
            let pushed = if call { 2 * size } else { 0 };
            let told = format!("{mode:?}, CPL {cpl}, {target:#x}, call {call}");
            assert_eq!((r.rip, r.gpr[4]), (HANDLER, STACK - pushed), "{told}");
            assert_eq!(r.segments[1].selector, target & !3 | cpl, "{told}");
            assert_eq!(u16::from(m.cpu.cpl()), cpl, "{told}");
        }
    }
}

#[test]
fn what_is_wrong_with_a_gate_gives_the_error_code_of_the_manual_and_changes_nothing() {
    const GP: u8 = 13;
    const NP: u8 = 11;
    const TS: u8 = 10;
    const SS: u8 = 12;
    type Change = fn(&mut Machine);
    let usual: Change = |m| m.gate(WIDE, KERNEL_CODE, HANDLER, 0);
    let cases: [(&str, Mode, u16, bool, Change, u8, u16); 19] = [
        (
            "DPL of the gate",
            Mode::Protected,
            3,
            true,
            |m| with_rights(m, 0x8c),
            GP,
            GATE,
        ),
        (
            "RPL above the gate",
            Mode::Protected,
            0,
            true,
            |m| with_rights(m, 0xcc),
            GP,
            GATE,
        ),
        (
            "gate not present",
            Mode::Protected,
            3,
            true,
            |m| with_rights(m, 0x6c),
            NP,
            GATE,
        ),
        (
            "null target",
            Mode::Protected,
            3,
            true,
            |m| m.gate(WIDE, 3, HANDLER, 0),
            GP,
            0,
        ),
        (
            "target behind the table",
            Mode::Protected,
            3,
            true,
            |m| m.gate(WIDE, 0x80, 0, 0),
            GP,
            0x80,
        ),
        (
            "data as target",
            Mode::Protected,
            3,
            true,
            |m| m.gate(WIDE, KERNEL_DATA, 0, 0),
            GP,
            KERNEL_DATA,
        ),
        (
            "outer code",
            Mode::Protected,
            0,
            true,
            |m| m.gate(WIDE, USER_CODE, 0, 0),
            GP,
            USER_CODE & !3,
        ),
        (
            "jump inside",
            Mode::Protected,
            3,
            false,
            usual,
            GP,
            KERNEL_CODE,
        ),
        (
            "absent code",
            Mode::Protected,
            3,
            true,
            |m| m.gate(WIDE, ABSENT_CODE, 0, 0),
            NP,
            ABSENT_CODE,
        ),
        (
            "offset above the limit",
            Mode::Protected,
            3,
            true,
            |m| m.gate(WIDE, SHORT_CODE, 0x1000, 0),
            GP,
            0,
        ),
        (
            "short task state",
            Mode::Protected,
            3,
            true,
            |m| {
                m.gate(WIDE, KERNEL_CODE, HANDLER, 0);
                m.change(|r| r.tr.limit = 8);
            },
            TS,
            TASK,
        ),
        (
            "null stack",
            Mode::Protected,
            3,
            true,
            |m| inner_stack(m, 0),
            TS,
            0,
        ),
        (
            "stack of users",
            Mode::Protected,
            3,
            true,
            |m| inner_stack(m, USER_DATA),
            TS,
            USER_DATA & !3,
        ),
        (
            "absent stack",
            Mode::Protected,
            3,
            true,
            |m| inner_stack(m, ABSENT_DATA),
            SS,
            ABSENT_DATA,
        ),
        (
            "no room",
            Mode::Protected,
            3,
            true,
            |m| inner_stack(m, SHORT_DATA),
            SS,
            SHORT_DATA,
        ),
        (
            "type in the upper half",
            Mode::Long,
            3,
            true,
            |m| {
                m.gate(WIDE, KERNEL_CODE, HANDLER, 0);
                m.ram.write(GDT + u64::from(GATE) + 13, &[1]);
            },
            GP,
            GATE,
        ),
        (
            "upper half outside",
            Mode::Long,
            3,
            true,
            |m| {
                m.gate(WIDE, KERNEL_CODE, HANDLER, 0);
                m.change(|r| r.gdtr.limit = GATE + 14);
            },
            GP,
            GATE,
        ),
        (
            "gate of 16-bit code",
            Mode::Long,
            3,
            true,
            |m| m.gate(NARROW, KERNEL_CODE, HANDLER, 0),
            GP,
            GATE,
        ),
        (
            "offset not canonical",
            Mode::Long,
            3,
            true,
            |m| m.gate(WIDE, KERNEL_CODE, 1 << 47, 0),
            GP,
            0,
        ),
    ];
    for (name, mode, cpl, call, change, vector, code) in cases {
        let mut m = machine(mode, cpl);
        change(&mut m);
        let bytes = match mode {
            Mode::Protected => far(call, GATE | 3),
            Mode::Long => far_indirect(&m, call, GATE | 3),
        };
        m.ram.write(CODE, &bytes);
        let before = m.cpu.registers();
        assert_eq!(m.exception(), (vector, Some(code.into())), "{name}");
        assert_eq!(m.cpu.registers(), before, "{name}");
    }
}

/// The gate to the kernel's code, with other access rights.
fn with_rights(m: &mut Machine, rights: u8) {
    m.gate(WIDE, KERNEL_CODE, HANDLER, 0);
    m.ram.write(GDT + u64::from(GATE) + 5, &[rights]);
}

/// The gate to the kernel's code, with another stack segment in the task state.
fn inner_stack(m: &mut Machine, selector: u16) {
    m.gate(WIDE, KERNEL_CODE, HANDLER, 0);
    m.ram.write(TSS + 8, &selector.to_le_bytes());
}

#[test]
fn a_far_return_outward_takes_the_stack_and_drops_the_kernels_segments() {
    for mode in [Mode::Protected, Mode::Long] {
        let mut m = machine(mode, 0);
        let size = if mode == Mode::Long { 8 } else { 4 };
        // RETF 8: two elements of 4 bytes, or one of 8, are dropped on each stack.
        let values = [HANDLER, USER_CODE.into(), 0, 0, 0x5000, USER_DATA.into()];
        let dropped = 8 / size as usize;
        let frame = [&values[..2], &values[2..2 + dropped], &values[4..]].concat();
        for (n, value) in frame.iter().enumerate() {
            m.ram.write(
                STACK + n as u64 * size,
                &value.to_le_bytes()[..size as usize],
            );
        }
        let retf: &[u8] = &[0x48, 0xca, 8, 0];
        m.ram.write(CODE, &retf[usize::from(size == 4)..]);
        m.ram.write(HANDLER, &UD2);
        m.ends();
        let r = m.cpu.registers();
        assert_eq!(
            (m.cpu.cpl(), r.rip, r.gpr[4]),
            (3, HANDLER, 0x5008),
            "{mode:?}"
        );
        assert_eq!(r.segments[2].selector, USER_DATA);
        for n in [0, 3, 4, 5] {
            assert_ne!(
                r.segments[n].rights & 1 << 16,
                0,
                "{mode:?}: segment {n} is unusable"
            );
        }
    }
}

#[test]
fn a_return_inward_is_refused() {
    let mut m = machine(Mode::Protected, 3);
    m.ram
        .write_u64(STACK, HANDLER | u64::from(KERNEL_CODE) << 32);
    m.ram.write(CODE, &[0xcb]);
    assert_eq!(m.exception(), (13, Some(KERNEL_CODE.into())));
}

const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const SYSENTER: [u8; 2] = [0x0f, 0x34];

#[test]
fn sysenter_and_sysexit_set_flat_segments_beside_the_msrs_selector() {
    for (mode, exit, outer) in [
        (Mode::Protected, &[0x0f, 0x35][..], 0x18),
        (Mode::Long, &[0x0f, 0x35], 0x18),
        (Mode::Long, &[0x48, 0x0f, 0x35], 0x28),
    ] {
        let mut m = machine(mode, 3);
        for (msr, value) in [
            (SYSENTER_CS, u64::from(KERNEL_CODE)),
            (SYSENTER_ESP, INNER_STACK),
            (SYSENTER_EIP, HANDLER),
        ] {
            m.cpu.write_msr(msr, value).expect("an MSR");
        }
        m.cpu.set_rflags(0x202);
        m.ram.write(CODE, &SYSENTER);
        assert_eq!(m.cpu.run(1), Stopped::Budget);
        let r = m.cpu.registers();
        assert_eq!((m.cpu.cpl(), r.rip, r.gpr[4]), (0, HANDLER, INNER_STACK));
        assert_eq!(r.rflags & 0x200, 0, "interrupts are off");
        assert_eq!(
            (r.segments[1].selector, r.segments[2].selector),
            (KERNEL_CODE, KERNEL_CODE + 8)
        );
        m.ram.write(HANDLER, exit);
        m.cpu.set_gpr(1, STACK);
        m.cpu.set_gpr(2, CODE + 0x100);
        m.ram.write(CODE + 0x100, &UD2);
        m.ends();
        let r = m.cpu.registers();
        assert_eq!((m.cpu.cpl(), r.rip, r.gpr[4]), (3, CODE + 0x100, STACK));
        let selector = outer + 3;
        assert_eq!(
            (r.segments[1].selector, r.segments[2].selector),
            (selector, selector + 8)
        );
        assert_eq!(
            r.segments[1].rights & 1 << 13 != 0,
            outer == 0x28,
            "64-bit code"
        );
    }
}

#[test]
fn sysenter_and_sysexit_are_refused_without_a_selector_outside_of_their_level_and_on_amd_in_long_mode()
 {
    let sysexit = [0x0f, 0x35];
    for (cpl, code, selector) in [(3, SYSENTER, 0), (0, sysexit, 0), (3, sysexit, KERNEL_CODE)] {
        let mut m = machine(Mode::Protected, cpl);
        m.cpu
            .write_msr(SYSENTER_CS, selector.into())
            .expect("an MSR");
        m.ram.write(CODE, &code);
        assert_eq!(m.exception(), (13, Some(0)));
    }
    for (cpl, code) in [(3, SYSENTER), (0, sysexit)] {
        let mut m = machine_of(CpuidTable::amd(), Mode::Long, cpl);
        m.cpu
            .write_msr(SYSENTER_CS, KERNEL_CODE.into())
            .expect("an MSR");
        m.ram.write(CODE, &code);
        assert_eq!(m.exception(), (6, None));
    }
}

const VM: u64 = 1 << 17;
const IOPL: u64 = 3 << 12;
/// Segments of virtual-8086 code in the order of IRET's frame: SS, ES, DS, FS, GS. CS is that of `CODE`.
const PARAGRAPHS: [u64; 5] = [0x600, 0x610, 0x620, 0x630, 0x640];

/// Virtual-8086 code with these flags, entered by IRETD; its stack pointer is 0xf00.
fn virtual_8086(code: &[u8], flags: u64) -> Machine {
    let mut m = machine(Mode::Protected, 0);
    let [ss, es, ds, fs, gs] = PARAGRAPHS;
    let frame = [0x10, CODE >> 4, flags | VM | 2, 0xf00, ss, es, ds, fs, gs];
    for (n, value) in frame.into_iter().enumerate() {
        m.ram
            .write(STACK + n as u64 * 4, &(value as u32).to_le_bytes());
    }
    // iretd
    m.ram.write(HANDLER, &[0xcf]);
    m.ram.write(CODE + 0x10, code);
    m.cpu.set_rip(HANDLER);
    assert_eq!(m.cpu.run(1), Stopped::Budget);
    m
}

#[test]
fn iret_enters_virtual_8086_mode_with_paragraphs_as_segments() {
    // mov ax, 0x1234; mov ds, ax; mov bl, [5]; ud2
    let mut m = virtual_8086(
        &[0xb8, 0x34, 0x12, 0x8e, 0xd8, 0x8a, 0x1e, 5, 0, 0x0f, 0x0b],
        0,
    );
    let r = m.cpu.registers();
    let selectors = [0, 2, 3, 4, 5].map(|n| u64::from(r.segments[n].selector));
    assert_eq!(selectors, [0x610, 0x600, 0x620, 0x630, 0x640]);
    assert_eq!((m.cpu.cpl(), r.gpr[4]), (3, 0xf00));
    m.ram.write(0x12345, &[42]);
    m.ends();
    assert_eq!(m.cpu.gpr(3) & 0xff, 42);
    assert_eq!(m.cpu.rip(), 0x19);
}

#[test]
fn an_interrupt_leaves_virtual_8086_mode_with_its_segments_on_the_stack_and_iret_comes_back() {
    // int 21H; ud2
    let mut m = virtual_8086(&[0xcd, 0x21, 0x0f, 0x0b], IOPL);
    let gate = (HANDLER + 0x100) | u64::from(KERNEL_CODE) << 16 | 0xee << 40;
    m.ram.write_u64(IDT + 0x21 * 8, gate);
    // mov ecx, ds; mov edx, esp; iretd
    m.ram
        .write(HANDLER + 0x100, &[0x8c, 0xd9, 0x89, 0xe2, 0xcf]);
    m.ends();
    let r = m.cpu.registers();
    assert_eq!((r.rip, r.rflags & VM, m.cpu.cpl()), (0x12, VM, 3));
    assert_eq!((r.gpr[1], r.gpr[2]), (0, INNER_STACK - 36));
    let word = |n: u64| m.ram.read_u64(INNER_STACK - 36 + n * 4) & 0xffff_ffff;
    assert_eq!((word(0), word(1)), (0x12, CODE >> 4));
    assert_eq!(word(2) & (VM | IOPL), VM | IOPL);
    assert_eq!([word(4), word(5), word(6), word(7), word(8)], PARAGRAPHS);
    assert_eq!((r.segments[3].selector, r.gpr[4]), (0x620, 0xf00));
}

#[test]
fn virtual_8086_code_needs_iopl_3_for_flags_and_interrupts() {
    for (name, code) in [
        ("CLI", &[0xfa][..]),
        ("STI", &[0xfb]),
        ("PUSHF", &[0x9c]),
        ("POPF", &[0x9d]),
        ("IRET", &[0xcf]),
        ("INT 21H", &[0xcd, 0x21]),
    ] {
        let mut m = virtual_8086(code, 0);
        assert_eq!(m.exception(), (13, Some(0)), "{name} with IOPL 0");
        assert_eq!(m.cpu.rip(), 0x10, "{name}");
        if name != "INT 21H" {
            let mut m = virtual_8086(code, IOPL);
            assert_eq!(m.cpu.run(1), Stopped::Budget, "{name} with IOPL 3");
            assert_eq!(
                m.cpu.rflags() & (VM | IOPL),
                VM | IOPL,
                "{name} keeps VM and IOPL"
            );
        }
    }
}

#[test]
fn virtual_8086_code_has_no_system_instructions() {
    for (name, code, vector) in [
        ("HLT", &[0xf4][..], 13),
        ("LGDT", &[0x0f, 0x01, 0x16, 0, 0], 13),
        ("MOV CR0", &[0x0f, 0x20, 0xc0], 13),
        ("CLTS", &[0x0f, 0x06], 13),
        ("SLDT", &[0x0f, 0x00, 0xc0], 6),
        ("STR", &[0x0f, 0x00, 0xc8], 6),
        ("LLDT", &[0x0f, 0x00, 0xd0], 6),
        ("LTR", &[0x0f, 0x00, 0xd8], 6),
        ("VERR", &[0x0f, 0x00, 0xe0], 6),
        ("LAR", &[0x0f, 0x02, 0xc0], 6),
        ("LSL", &[0x0f, 0x03, 0xc0], 6),
        ("ARPL", &[0x63, 0xc0], 6),
    ] {
        let mut m = virtual_8086(code, IOPL);
        assert_eq!(m.exception().0, vector, "{name}");
    }
}

#[test]
fn virtual_8086_code_is_held_by_its_limit_and_by_the_map_of_ports() {
    // mov ax, [0xffff]
    let mut m = virtual_8086(&[0xa1, 0xff, 0xff], IOPL);
    assert_eq!(m.exception(), (13, Some(0)));
    // in al, 0xe9: IOPL 3 does not replace the map.
    let mut m = virtual_8086(&[0xe4, 0xe9], IOPL);
    m.ram.write(TSS + 0x66, &[0x68, 0]);
    assert_eq!(m.exception(), (13, Some(0)));
    let mut m = virtual_8086(&[0xe4, 0xe9], 0);
    m.ram.write(TSS + 0x66, &[0x68, 0]);
    m.change(|r| r.tr.limit = 0x68 + 0x20);
    assert_eq!(m.cpu.run(1), Stopped::Budget);
    assert_eq!(m.cpu.gpr(0) & 0xff, 0xe9);
}
