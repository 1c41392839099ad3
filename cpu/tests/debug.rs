//! Breakpoints by debug registers: when #DB comes, and what DR6 says.

mod common;

use std::sync::Arc;

use common::Ram;
use common::long_mode::{CODE, STACK, machine};
use kvm_ops_cpu::{Cpu, Stopped};

/// Counts in EAX, lets the instruction run by RF, and returns:
/// inc eax; or dword [rsp + 16], 10000H; iretq.
const HANDLER: [u8; 12] = [0xff, 0xc0, 0x81, 0x4c, 0x24, 0x10, 0, 0, 1, 0, 0x48, 0xcf];
const DATA: u64 = 0x6000;
/// `mov [rbx], ecx`, with RBX at the data.
const STORE: [u8; 2] = [0x89, 0x0b];
const LOAD: [u8; 2] = [0x8b, 0x0b];

/// Runs code with these DR0 and DR7 to its HLT.
fn run(code: &[&[u8]], dr0: u64, dr7: u64) -> (Cpu, Arc<Ram>) {
    let code = [&code.concat()[..], &[0xf4]].concat();
    let (mut cpu, ram) = machine(&code, &HANDLER);
    let mut r = cpu.registers();
    (r.breakpoints[0], r.dr7) = (dr0, 0x400 | dr7);
    r.gpr[3] = DATA;
    r.gpr[2] = 0xe9;
    // Debug extensions, for breakpoints on ports.
    r.cr4 |= 8;
    cpu.set_registers(&r);
    assert_eq!(cpu.run(1000), Stopped::Halted);
    (cpu, ram)
}

/// #DBs, the RIP that the last one's frame holds, and DR6.
fn seen((cpu, ram): &(Cpu, Arc<Ram>)) -> (u64, u64, u64) {
    (
        cpu.gpr(0),
        ram.read_u64(STACK - 40).wrapping_sub(CODE),
        cpu.registers().dr6,
    )
}

const NONE: u64 = 0xffff_0ff0;
/// Enables DR0: for execution, writes of 4 bytes, ports (1 byte), reads and writes of 4 bytes.
const EXECUTE: u64 = 2;
const WRITE: u64 = 2 | 0xd << 16;
const PORT: u64 = 2 | 0x2 << 16;
const BOTH: u64 = 2 | 0xf << 16;

#[test]
fn execution_stops_before_the_instruction_and_goes_on_with_rf() {
    let nops: &[u8] = &[0x90; 3];
    let end = run(&[nops], CODE + 1, EXECUTE);
    assert_eq!(seen(&end), (1, 1, NONE | 1));
    // Without an enable bit nothing happens.
    assert_eq!(run(&[nops], CODE + 1, 0).0.gpr(0), 0);
}

#[test]
fn data_is_trapped_after_the_instruction_by_kind_and_place() {
    for (code, kind, hit) in [
        (STORE, WRITE, true),
        (LOAD, WRITE, false),
        (STORE, BOTH, true),
        (LOAD, BOTH, true),
    ] {
        for (at, near) in [(DATA, true), (DATA + 4, false), (DATA - 4, false)] {
            let end = run(&[&code, &[0x90]], at, kind);
            let expected = if hit && near { (1, 2) } else { (0, 0) };
            let (count, rip, dr6) = seen(&end);
            assert_eq!(count, expected.0, "{code:x?} {kind:x} {at:x}");
            if count != 0 {
                assert_eq!((rip, dr6), (expected.1, NONE | 1));
            }
        }
    }
}

#[test]
fn a_trap_of_mov_ss_comes_after_the_next_instruction() {
    // mov ss, [rbx] (a null selector is allowed in 64-bit mode); inc esi; nop
    let code: [&[u8]; 2] = [&[0x8e, 0x13], &[0xff, 0xc6, 0x90]];
    let end = run(&code, DATA, BOTH);
    assert_eq!(seen(&end), (1, 4, NONE | 1));
    assert_eq!(end.0.gpr(6), 1);
    // A breakpoint on that next instruction is not taken.
    assert_eq!(run(&code, CODE + 2, EXECUTE).0.gpr(0), 0);
}

#[test]
fn ports_are_trapped_with_debug_extensions() {
    // out dx, al; nop
    let end = run(&[&[0xee, 0x90]], 0xe9, PORT);
    assert_eq!(seen(&end), (1, 1, NONE | 1));
}

#[test]
fn each_element_of_a_repeated_store_is_trapped() {
    // mov edi, ebx; mov ecx, 4; rep stosd
    let code = [0x89, 0xdf, 0xb9, 4, 0, 0, 0, 0xf3, 0xab];
    let end = run(&[&code], DATA + 8, WRITE);
    assert_eq!(seen(&end), (1, 7, NONE | 1));
    // RDI is behind the element that was hit, and the rest is stored all the same.
    assert_eq!(end.0.gpr(7), DATA + 16);
}

#[test]
fn general_detect_stops_a_move_and_clears_itself() {
    // mov rsi, dr7
    let end = run(&[&[0x0f, 0x21, 0xfe]], 0, 1 << 13);
    let (count, rip, dr6) = seen(&end);
    assert_eq!((count, rip, dr6), (1, 0, NONE | 1 << 13));
    assert_eq!(end.0.gpr(6), 0x400, "the move was done after it");
}
