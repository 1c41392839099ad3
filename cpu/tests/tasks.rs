//! Hardware task switches of 32-bit code: the registers saved and loaded, busy bits, NT, and exits.

mod common;

use std::sync::Arc;

use common::{Ram, TestBus};
use kvm_ops_cpu::{Cause, CodePages, Cpu, CpuidTable, Segment, Stopped};

const CODE: u64 = 0x8000;
const TASK: u64 = 0x9000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
/// The segments of the running task and of the other one, and their selectors.
const OLD: u64 = 0x3000;
const NEW: u64 = 0x4000;
const OLD_SELECTOR: u16 = 0x18;
const NEW_SELECTOR: u16 = 0x20;
/// A task gate for the new task.
const GATE: u16 = 0x28;

fn tss(base: u64, kind: u64) -> u64 {
    0x67 | base << 16 | (0x80 | kind) << 40
}

fn write_u32(ram: &Ram, at: u64, value: u32) {
    ram.write(at, &value.to_le_bytes());
}

fn read_u32(ram: &Ram, at: u64) -> u32 {
    let mut data = [0; 4];
    ram.read(at, &mut data);
    u32::from_le_bytes(data)
}

/// 32-bit code without paging, and a task that has ECX 7 and its own stack.
fn machine(code: &[u8], task: &[u8]) -> (Cpu, Arc<Ram>) {
    let ram = Ram::new(0x10_0000);
    ram.write(CODE, code);
    ram.write(TASK, task);
    for (selector, descriptor) in [
        (8, 0x00cf_9b00_0000_ffff),
        (0x10, 0x00cf_9300_0000_ffff),
        (OLD_SELECTOR, tss(OLD, 11)),
        (NEW_SELECTOR, tss(NEW, 9)),
        (GATE, u64::from(NEW_SELECTOR) << 16 | 0x85 << 40),
    ] {
        ram.write_u64(GDT + u64::from(selector), descriptor);
    }
    // #DE and vector 21H by task gates.
    for vector in [0, 0x21] {
        ram.write_u64(IDT + vector * 8, u64::from(NEW_SELECTOR) << 16 | 0x85 << 40);
    }
    // EIP, EFLAGS, ECX, ESP, then ES, CS, SS, DS, FS, GS.
    for (at, value) in [(0x20, TASK as u32), (0x24, 2), (0x2c, 7), (0x38, 0x6000)] {
        write_u32(&ram, NEW + at, value);
    }
    for (n, selector) in [0x10, 8, 0x10, 0x10, 0, 0].into_iter().enumerate() {
        write_u32(&ram, NEW + 0x48 + n as u64 * 4, selector);
    }
    let bus = TestBus::new(&ram);
    let mut cpu = Cpu::new(Box::new(bus), CodePages::new(256), CpuidTable::intel());
    let mut r = cpu.registers();
    let flat = |selector, rights| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    };
    r.segments = [flat(0x10, 0xc093); 6];
    r.segments[1] = flat(8, 0xc09b);
    r.tr = Segment {
        selector: OLD_SELECTOR,
        base: OLD,
        limit: 0x67,
        rights: 0x8b,
    };
    (r.gdtr.base, r.gdtr.limit) = (GDT, 0x2f);
    (r.idtr.base, r.idtr.limit) = (IDT, 0x7ff);
    r.cr0 = 0x11;
    r.rip = CODE;
    r.gpr[4] = 0x7000;
    cpu.set_registers(&r);
    (cpu, ram)
}

fn busy(ram: &Ram, selector: u16) -> bool {
    ram.read_u64(GDT + u64::from(selector)) >> 41 & 1 != 0
}

/// `call selector:0`, then `inc ebx; hlt`.
fn far_call(selector: u16) -> Vec<u8> {
    let [low, high] = selector.to_le_bytes();
    vec![0x9a, 0, 0, 0, 0, low, high, 0xff, 0xc3, 0xf4]
}

#[test]
fn a_call_of_a_task_or_its_gate_nests_and_iret_comes_back() {
    for selector in [NEW_SELECTOR, GATE] {
        // inc ecx; hlt; iretd
        let (mut cpu, ram) = machine(&far_call(selector), &[0x41, 0xf4, 0xcf]);
        assert_eq!(cpu.run(100), Stopped::Halted);
        let r = cpu.registers();
        assert_eq!((r.gpr[1], r.gpr[4], r.tr.base), (8, 0x6000, NEW));
        assert_ne!(r.rflags & 1 << 14, 0, "NT");
        assert_ne!(r.cr0 & 8, 0, "TS");
        assert!(busy(&ram, OLD_SELECTOR) && busy(&ram, NEW_SELECTOR));
        assert_eq!(read_u32(&ram, NEW) as u16, OLD_SELECTOR, "the way back");
        assert_eq!(read_u32(&ram, OLD + 0x20), CODE as u32 + 7);
        assert_eq!(read_u32(&ram, OLD + 0x38), 0x7000);
        // IRET: what the task had is saved, and it is free again.
        let activity = kvm_ops_cpu::Activity::default();
        cpu.set_activity(activity);
        assert_eq!(cpu.run(100), Stopped::Halted);
        let r = cpu.registers();
        assert_eq!((r.gpr[3], r.gpr[4], r.tr.base), (1, 0x7000, OLD));
        assert_eq!(r.rflags & 1 << 14, 0);
        assert!(busy(&ram, OLD_SELECTOR) && !busy(&ram, NEW_SELECTOR));
        assert_eq!(read_u32(&ram, NEW + 0x2c), 8);
    }
}

#[test]
fn a_jump_leaves_the_old_task_free_and_does_not_nest() {
    // jmp NEW:0
    let (mut cpu, ram) = machine(&[0xea, 0, 0, 0, 0, 0x20, 0], &[0xf4]);
    assert_eq!(cpu.run(100), Stopped::Halted);
    assert_eq!(cpu.rflags() & 1 << 14, 0);
    assert!(!busy(&ram, OLD_SELECTOR) && busy(&ram, NEW_SELECTOR));
}

#[test]
fn a_task_gate_of_the_interrupt_table_takes_faults_and_int_n() {
    // int 21H returns behind it; a division by zero would be done again.
    for (code, next) in [(&[0xcd, 0x21][..], 2), (&[0xf7, 0xf6], 0)] {
        let (mut cpu, ram) = machine(code, &[0xf4]);
        assert_eq!(cpu.run(100), Stopped::Halted);
        assert_eq!(cpu.registers().tr.base, NEW);
        assert_eq!(read_u32(&ram, OLD + 0x20), CODE as u32 + next);
    }
}

#[test]
fn a_busy_task_is_refused_and_the_old_one_goes_on_to_the_fault() {
    let (mut cpu, ram) = machine(&far_call(OLD_SELECTOR), &[0xf4]);
    cpu.controls_mut().exceptions = u32::MAX;
    let Stopped::Exit(exit) = cpu.run(100) else {
        panic!("no exit")
    };
    let Cause::Exception(event) = exit.cause else {
        panic!("{exit:?}")
    };
    assert_eq!((event.vector, event.code), (13, Some(OLD_SELECTOR.into())));
    assert_eq!(cpu.rip(), CODE);
    assert!(busy(&ram, OLD_SELECTOR));
}

#[test]
fn a_host_that_asks_gets_the_switch_as_an_exit() {
    let (mut cpu, _) = machine(&far_call(GATE), &[0xf4]);
    cpu.controls_mut().task_switches = true;
    let Stopped::Exit(exit) = cpu.run(100) else {
        panic!("no exit")
    };
    let vmx = exit.vmx().expect("an exit of VMX");
    assert_eq!(
        (vmx.reason, vmx.qualification),
        (9, u64::from(NEW_SELECTOR))
    );
    assert_eq!((cpu.rip(), exit.len), (CODE, 7));
}
