//! CR4.VME in virtual-8086 mode and CR4.PVI at CPL 3: the instructions that act on VIF where IOPL keeps IF from them.

mod common;

use std::sync::Arc;

use common::{Ram, TestBus};
use kvm_ops_cpu::{Cause, CodePages, Cpu, CpuidTable, Segment, Stopped};

const CODE: u64 = 0x8000;
const STACK: u64 = 0x7000;
const HANDLER: u64 = 0x6000;
const TSS: u64 = 0x3000;
/// The I/O map, and with it the 32 bytes of the redirection bitmap in front of it.
const IO_MAP: u16 = 0x88;

const VME: u64 = 1;
const PVI: u64 = 2;
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
const IOPL: u64 = 3 << 12;
const VM: u64 = 1 << 17;
const VIF: u64 = 1 << 19;
const VIP: u64 = 1 << 20;
/// HLT, which faults at CPL 3: the end of code that did not fault before. The address says which.
const END: u8 = 0xf4;

/// Where code stopped by #GP, and the flags and the stack pointer then.
struct After {
    rip: u64,
    flags: u64,
    sp: u64,
    cpu: Cpu,
    ram: Arc<Ram>,
}

impl After {
    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 2];
        self.ram.read(at, &mut bytes);
        u16::from_le_bytes(bytes).into()
    }
}

/// Runs code at CPL 3 up to its first #GP. `stack` are words at SS:SP.
fn run(code: &[u8], cr4: u64, flags: u64, stack: &[u16]) -> After {
    let ram = Ram::new(0x10_0000);
    ram.write(CODE, &[code, &[END]].concat());
    ram.write(HANDLER, &[END]);
    // INT 21H of the 8086 program, and the task's bitmap: its bit is 0, that of 22H is 1.
    ram.write(0x21 * 4, &(HANDLER as u32).to_le_bytes());
    ram.write(TSS + 0x66, &IO_MAP.to_le_bytes());
    ram.write(TSS + u64::from(IO_MAP) - 32 + 0x22 / 8, &[1 << (0x22 % 8)]);
    let words: Vec<u8> = stack.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(STACK, &words);
    let bus = TestBus::new(&ram);
    let mut cpu = Cpu::new(Box::new(bus), CodePages::new(256), CpuidTable::intel());
    let mut r = cpu.registers();
    let vm86 = flags & VM != 0;
    let rights = if vm86 { 0xf3 } else { 0xc0f3 };
    r.segments = [Segment {
        selector: 0,
        base: 0,
        limit: if vm86 { 0xffff } else { u32::MAX },
        rights,
    }; 6];
    if !vm86 {
        r.segments[1].rights = 0xc0fb;
    }
    r.tr = Segment {
        selector: 0x18,
        base: TSS,
        limit: 0x100,
        rights: 0x8b,
    };
    (r.cr0, r.cr4, r.rip, r.rflags) = (0x11, cr4, CODE, flags | 2);
    r.gpr[4] = STACK;
    cpu.set_registers(&r);
    cpu.controls_mut().exceptions = 1 << 13;
    let Stopped::Exit(exit) = cpu.run(100) else {
        panic!("no exit")
    };
    let Cause::Exception(event) = exit.cause else {
        panic!("{exit:?}")
    };
    assert_eq!((event.vector, event.code), (13, Some(0)));
    After {
        rip: cpu.rip(),
        flags: cpu.rflags(),
        sp: cpu.gpr(4),
        cpu,
        ram,
    }
}

const CLI: &[u8] = &[0xfa];
const STI: &[u8] = &[0xfb];
const PUSHF: &[u8] = &[0x9c];
const POPF: &[u8] = &[0x9d];
const IRET: &[u8] = &[0xcf];

#[test]
fn cli_and_sti_change_if_or_vif_or_fault_by_iopl_and_cr4() {
    for (mode, bit) in [(VM, VME), (0, PVI)] {
        for (cr4, iopl, changed) in [
            (0, IOPL, Some(IF)),
            (bit, IOPL, Some(IF)),
            (bit, 0, Some(VIF)),
            (0, 0, None),
            // The other mode's bit does not count.
            (bit ^ (VME | PVI), 0, None),
        ] {
            let case = format!("mode {mode:#x}, CR4 {cr4:#x}, IOPL {iopl:#x}");
            let on = run(STI, cr4, mode | iopl, &[]);
            let off = run(CLI, cr4, mode | iopl | IF | VIF, &[]);
            let Some(changed) = changed else {
                assert_eq!((on.rip, off.rip), (CODE, CODE), "{case}");
                continue;
            };
            assert_eq!((on.rip, off.rip), (CODE + 1, CODE + 1), "{case}");
            assert_eq!(on.flags & (IF | VIF), changed, "{case}");
            assert_eq!(off.flags & (IF | VIF), (IF | VIF) & !changed, "{case}");
        }
    }
}

#[test]
fn sti_faults_while_a_virtual_interrupt_is_pending_and_cli_does_not() {
    for (mode, cr4) in [(VM, VME), (0, PVI)] {
        assert_eq!(run(STI, cr4, mode | VIP, &[]).rip, CODE);
        assert_eq!(run(CLI, cr4, mode | VIP, &[]).rip, CODE + 1);
        // IF is changed where IOPL lets it, whatever waits.
        assert_eq!(run(STI, cr4, mode | VIP | IOPL, &[]).rip, CODE + 1);
    }
}

#[test]
fn pushf_in_virtual_8086_mode_shows_vif_as_if_and_an_iopl_of_3() {
    for (vif, pushed) in [(0, 0), (VIF, IF)] {
        let after = run(PUSHF, VME, VM | vif | IF ^ pushed, &[]);
        assert_eq!((after.rip, after.sp), (CODE + 1, STACK - 2));
        assert_eq!(after.word(STACK - 2) & (IF | IOPL), pushed | IOPL);
    }
    // Not with 32 bits, and not without VME.
    assert_eq!(run(&[0x66, 0x9c], VME, VM, &[]).rip, CODE);
    assert_eq!(run(PUSHF, 0, VM, &[]).rip, CODE);
    // With IOPL 3 as they are.
    let after = run(PUSHF, VME, VM | IOPL | VIF, &[]);
    assert_eq!(after.word(STACK - 2) & (IF | IOPL), IOPL);
}

#[test]
fn popf_and_iret_in_virtual_8086_mode_take_if_into_vif() {
    for (code, stack, moved) in [(POPF, 0, 2), (IRET, 2, 6)] {
        let words = |image: u64| {
            let [ip, cs] = [CODE as u16 + 1, 0];
            let mut words = [ip, cs, 0];
            words[stack] = image as u16;
            match stack {
                0 => vec![image as u16],
                _ => words.to_vec(),
            }
        };
        for (image, vif) in [(IF, VIF), (0, 0)] {
            let before = VM | VIF ^ vif | IF ^ image;
            let after = run(code, VME, before, &words(image | IOPL | 1));
            assert_eq!((after.rip, after.sp), (CODE + 1, STACK + moved));
            let kept = IF | IOPL | VM;
            assert_eq!(after.flags & kept, before & kept);
            assert_eq!(after.flags & (VIF | 1), vif | 1);
        }
        // A pending interrupt and IF, or TF, fault and leave the stack alone.
        for (before, image, faults) in [
            (VIP, IF, true),
            (VIP, 0, false),
            (0, TF, true),
            (VIP | IOPL, IF, false),
        ] {
            let after = run(code, VME, VM | before, &words(image));
            let end = if faults { CODE } else { CODE + 1 };
            assert_eq!(after.rip, end, "{before:#x} {image:#x}");
            assert_eq!(after.sp == STACK, faults, "{before:#x} {image:#x}");
        }
        // Not with 32 bits, and not without VME.
        assert_eq!(run(&[&[0x66], code].concat(), VME, VM, &[]).rip, CODE);
        assert_eq!(run(code, 0, VM, &words(0)).rip, CODE);
    }
}

#[test]
fn int_n_goes_to_the_8086_program_where_the_task_s_bitmap_has_a_0() {
    for (iopl, on, cleared) in [(0, VIF, VIF), (IOPL, IF, IF)] {
        let before = VM | iopl | IF | VIF;
        let after = run(&[0xcd, 0x21], VME, before, &[]);
        assert_eq!((after.rip, after.sp), (HANDLER, STACK - 6));
        assert_eq!(after.flags & (IF | VIF), (IF | VIF) & !cleared);
        assert_eq!(after.word(STACK - 6), CODE + 2);
        assert_eq!(after.word(STACK - 4), 0);
        let pushed = after.word(STACK - 2);
        assert_eq!(pushed & (IF | IOPL), IF | IOPL, "{on:#x} was set");
        assert_eq!(after.cpu.registers().segments[1].base, 0);
    }
    // The pushed IF is VIF.
    let after = run(&[0xcd, 0x21], VME, VM | IF, &[]);
    assert_eq!(after.word(STACK - 2) & IF, 0);
}

#[test]
fn other_interrupts_of_virtual_8086_mode_are_the_monitors() {
    // Those with a 1 in the bitmap, and all without VME, fault by IOPL.
    assert_eq!(run(&[0xcd, 0x22], VME, VM, &[]).rip, CODE);
    assert_eq!(run(&[0xcd, 0x21], 0, VM, &[]).rip, CODE);
}

#[test]
fn cpuid_tells_of_vme_and_cr4_takes_both_bits() {
    for table in [CpuidTable::intel(), CpuidTable::amd()] {
        assert_ne!(table.get(1, 0).edx & 2, 0);
    }
    assert_eq!(Cpu::cr4_bits() & (VME | PVI), VME | PVI);
}
