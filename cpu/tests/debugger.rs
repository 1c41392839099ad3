//! Debuggers outside of the guest: what leaves to them, and that the guest sees nothing of it.

mod common;

use common::long_mode::{CODE, HANDLER, machine};
use kvm_ops_cpu::{Cause, Cpu, Debugger, Event, Exception, Stopped};

const DB: u8 = 1;
const BP: u8 = 3;
/// DR6: single step, general detect.
const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;
const DATA: u64 = 0x6000;
const HLT: u8 = 0xf4;

const STEP: Debugger = Debugger {
    step: true,
    int3: false,
    breakpoints: None,
    hold_events: false,
};

/// A processor at code that ends with HLT, with a debugger. RBX is at the data.
fn debugged(code: &[&[u8]], debugger: Debugger) -> Cpu {
    let code = [&code.concat()[..], &[HLT]].concat();
    let (mut cpu, _) = machine(&code, &[HLT]);
    cpu.set_gpr(3, DATA);
    cpu.set_debugger(debugger);
    cpu
}

/// A breakpoint in one of the four registers, with its bits of DR7.
fn at(n: usize, address: u64, kind: u64) -> Debugger {
    let mut addresses = [0; 4];
    addresses[n] = address;
    Debugger {
        breakpoints: Some((addresses, 0x400 | 2 << (2 * n) | kind << (16 + 4 * n))),
        ..Debugger::default()
    }
}

/// Runs to an exit to the debugger: vector, bits of DR6, and the instruction from the start of the code.
#[track_caller]
fn left(cpu: &mut Cpu) -> (u8, u64, u64) {
    match cpu.run(1000) {
        Stopped::Exit(exit) => match exit.cause {
            Cause::Exception(event) => (event.vector, event.address.unwrap_or(0), cpu.rip() - CODE),
            cause => panic!("{cause:?}"),
        },
        stopped => panic!("{stopped:?} at {:#x}", cpu.rip()),
    }
}

#[test]
fn each_instruction_is_a_step_and_the_guest_sees_no_trap_flag() {
    // sti; xor eax, eax; cpuid; pushfq; pop rsi; cli
    let code: [&[u8]; 6] = [
        &[0xfb],
        &[0x31, 0xc0],
        &[0x0f, 0xa2],
        &[0x9c],
        &[0x5e],
        &[0xfa],
    ];
    let mut cpu = debugged(&code, STEP);
    let mut rip = 0;
    for instruction in code {
        rip += instruction.len() as u64;
        assert_eq!(left(&mut cpu), (DB, BS, rip));
    }
    assert_eq!(cpu.gpr(6) & 0x300, 0x200, "IF and no TF");
    let registers = cpu.registers();
    assert_eq!(
        (registers.dr6, registers.rflags & 0x1_0100),
        (0xffff_0ff0, 0)
    );
    cpu.set_debugger(Debugger::default());
    assert_eq!(cpu.run(1000), Stopped::Halted);
}

#[test]
fn an_element_of_a_repeated_instruction_is_a_step() {
    // mov ecx, 3; mov rdi, rbx; rep stosb
    let code: [&[u8]; 3] = [&[0xb9, 3, 0, 0, 0], &[0x48, 0x89, 0xdf], &[0xf3, 0xaa]];
    let mut cpu = debugged(&code, STEP);
    let steps: Vec<u64> = (0..5).map(|_| left(&mut cpu).2).collect();
    assert_eq!(steps, [5, 8, 8, 8, 10]);
}

#[test]
fn int3_leaves_at_the_instruction_or_is_the_guests() {
    let taken = Debugger {
        int3: true,
        ..Debugger::default()
    };
    let code: &[u8] = &[0x90, 0xcc];
    let mut cpu = debugged(&[code], taken);
    for _ in 0..2 {
        assert_eq!(left(&mut cpu), (BP, 0, 1), "again, until RIP is set");
    }
    cpu.set_rip(CODE + 2);
    assert_eq!(cpu.run(1000), Stopped::Halted);
    // Its handler halts.
    let mut cpu = debugged(&[code], at(0, DATA, 1));
    assert_eq!(cpu.run(1000), Stopped::Halted);
    assert_eq!(cpu.rip(), HANDLER + 1);
}

#[test]
fn an_injected_exception_goes_to_the_guest() {
    let mut cpu = debugged(&[&[0x90]], STEP);
    assert_eq!(cpu.inject(Event::exception(Exception::plain(DB))), None);
    assert_eq!(cpu.rip(), HANDLER);
}

#[test]
fn the_debuggers_breakpoints_are_met_in_each_register() {
    // mov [rbx], ecx; nop
    let code: [&[u8]; 2] = [&[0x89, 0x0b], &[0x90]];
    for n in 0..4 {
        let bit = 1 << n;
        let mut cpu = debugged(&code, at(n, CODE + 2, 0));
        for _ in 0..2 {
            assert_eq!(left(&mut cpu), (DB, bit, 2), "again, for RF is not set");
        }
        let mut cpu = debugged(&code, at(n, DATA, 0xd));
        assert_eq!(left(&mut cpu), (DB, bit, 2), "behind the store");
        assert_eq!(cpu.registers().dr6, 0xffff_0ff0);
        assert_eq!(cpu.run(1000), Stopped::Halted);
    }
}

#[test]
fn the_guest_keeps_debug_registers_of_its_own() {
    // mov rax, 5000H; mov dr0, rax; mov rsi, dr0; mov [rbx], ecx
    let code: [&[u8]; 4] = [
        &[0x48, 0xc7, 0xc0, 0, 0x50, 0, 0],
        &[0x0f, 0x23, 0xc0],
        &[0x0f, 0x21, 0xc6],
        &[0x89, 0x0b],
    ];
    let mut cpu = debugged(&code, at(0, DATA, 0xd));
    assert_eq!(
        left(&mut cpu),
        (DB, 1, 15),
        "the debugger's breakpoint stays"
    );
    assert_eq!(
        (cpu.gpr(6), cpu.registers().breakpoints[0]),
        (0x5000, 0x5000)
    );
}

#[test]
fn general_detect_of_the_debugger_leaves_in_front_of_the_move() {
    // mov rax, dr0
    let detect = Debugger {
        breakpoints: Some(([0; 4], 0x400 | BD)),
        ..Debugger::default()
    };
    let mut cpu = debugged(&[&[0x90], &[0x0f, 0x21, 0xc0]], detect);
    assert_eq!(left(&mut cpu), (DB, BD, 1));
}

#[test]
fn held_events_wait_for_the_debugger() {
    let held = Debugger {
        hold_events: true,
        ..Debugger::default()
    };
    // sti; nop; nop
    let mut cpu = debugged(&[&[0xfb, 0x90, 0x90]], held);
    cpu.interrupt(0x30);
    assert_eq!(cpu.run(3), Stopped::Budget);
    assert_eq!(cpu.rip(), CODE + 3);
    cpu.set_debugger(Debugger::default());
    assert_eq!(cpu.run(1), Stopped::Halted);
    assert_eq!(cpu.rip(), HANDLER + 1);
}
