//! A small assembled program from reset to 64-bit user mode: segments, page tables, exceptions,
//! interrupts of the timer, system calls; run with both ways of dispatch.

mod common;

use common::{Ram, TestBus};
use iced_x86::code_asm::*;
use kvm_ops_cpu::{Cause, CodePages, Cpu, CpuidTable, Dispatch, Stopped};

const REAL: u64 = 0x7000;
const PROTECTED: u64 = 0x8000;
const LONG: u64 = 0x9000;
const USER: u64 = 0xc000;
const HANDLERS: u64 = 0xa000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const PML4: u64 = 0x10000;

fn put(a: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
    for byte in text.bytes() {
        a.mov(al, u32::from(byte))?;
        a.out(0xe9u32, al)?;
    }
    Ok(())
}

fn real() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(ss, ax)?;
    a.mov(sp, 0x6000)?;
    put(&mut a, "R")?;
    // An interrupt through the vector table of real mode.
    a.int(0x21)?;
    a.lgdt(fword_ptr(0xf00))?;
    a.mov(eax, cr0)?;
    a.or(eax, 1)?;
    a.mov(cr0, eax)?;
    a.db(&[0x66, 0xea])?;
    a.dd(&[PROTECTED as u32])?;
    a.dw(&[0x08])?;
    a.assemble(REAL)
}

fn protected() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    a.mov(eax, 0x10)?;
    for seg in [ds, es, ss] {
        a.mov(seg, eax)?;
    }
    a.mov(esp, 0x6000)?;
    put(&mut a, "P")?;
    a.mov(eax, cr4)?;
    a.or(eax, 0x20)?;
    a.mov(cr4, eax)?;
    a.mov(eax, PML4 as u32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, 0xc000_0080u32)?;
    a.rdmsr()?;
    a.or(eax, 0x901)?;
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.or(eax, 0x8000_0000u32 as i32)?;
    a.mov(cr0, eax)?;
    a.db(&[0xea])?;
    a.dd(&[LONG as u32])?;
    a.dw(&[0x18])?;
    a.assemble(PROTECTED)
}

fn long() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut wait = a.create_label();
    a.mov(esp, 0x6000)?;
    put(&mut a, "L")?;
    a.lidt(tbyte_ptr(0xf10))?;
    a.mov(eax, 0x28)?;
    a.ltr(ax)?;
    // A page fault on a page that is not there.
    a.mov(rbx, 0x4000_0000u64)?;
    a.mov(rax, qword_ptr(rbx))?;
    // A division by zero; the handler goes past the two bytes.
    a.xor(ecx, ecx)?;
    a.div(ecx)?;
    // x2APIC, a periodic timer, three interrupts.
    for (msr, value) in [
        (0x1bu32, 0xfee0_0d00u32),
        (0x80f, 0x1ff),
        (0x83e, 0xb),
        (0x832, 0x2_0030),
        (0x838, 50),
    ] {
        a.mov(ecx, msr)?;
        a.xor(edx, edx)?;
        a.mov(eax, value)?;
        a.wrmsr()?;
    }
    a.xor(r12d, r12d)?;
    a.sti()?;
    a.set_label(&mut wait)?;
    a.hlt()?;
    a.cmp(r12d, 3)?;
    a.jb(wait)?;
    a.cli()?;
    // SYSCALL's target, then to user mode.
    for (msr, low, high) in [
        (0xc000_0081u32, 0u32, 0x0023_0018u32),
        (0xc000_0082, (HANDLERS + 0x300) as u32, 0),
        (0xc000_0084, 0x200, 0),
    ] {
        a.mov(ecx, msr)?;
        a.mov(eax, low)?;
        a.mov(edx, high)?;
        a.wrmsr()?;
    }
    a.mov(ecx, USER as u32)?;
    a.mov(r11d, 2)?;
    a.mov(esp, 0x5800)?;
    a.sysretq()?;
    a.assemble(LONG)
}

fn user() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.mov(eax, 0x55)?;
    a.push(rax)?;
    a.pop(rdi)?;
    a.syscall()?;
    // Privileged: #GP to the kernel, which ends the program.
    a.hlt()?;
    a.assemble(USER)
}

fn handler(index: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    match index {
        // #PF: checks CR2 and the error code, goes past the load of 3 bytes.
        0 => {
            a.mov(rax, cr2)?;
            a.cmp(rax, rbx)?;
            let mut bad = a.create_label();
            a.jne(bad)?;
            a.pop(rax)?;
            a.test(rax, rax)?;
            a.jne(bad)?;
            put(&mut a, "F")?;
            a.add(qword_ptr(rsp), 3)?;
            a.iretq()?;
            a.set_label(&mut bad)?;
            a.ud2()?;
        }
        1 => {
            put(&mut a, "D")?;
            a.add(qword_ptr(rsp), 2)?;
            a.iretq()?;
        }
        // Timer.
        2 => {
            a.inc(r12d)?;
            put(&mut a, "T")?;
            a.mov(ecx, 0x80b)?;
            a.xor(eax, eax)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
            a.iretq()?;
        }
        // SYSCALL.
        3 => {
            a.mov(r14, rcx)?;
            a.mov(eax, edi)?;
            a.out(0xe9u32, al)?;
            a.mov(rcx, r14)?;
            a.sysretq()?;
        }
        // #GP from user mode: on the stack of the task state segment.
        _ => {
            put(&mut a, "G")?;
            a.mov(rbx, rsp)?;
            a.cli()?;
            a.hlt()?;
        }
    }
    a.assemble(HANDLERS + index * 0x100)
}

fn gate(ram: &Ram, vector: u64, target: u64, dpl: u64) {
    let low =
        target & 0xffff | 0x18 << 16 | (0x8e | dpl << 5) << 40 | (target >> 16 & 0xffff) << 48;
    ram.write_u64(IDT + vector * 16, low);
    ram.write_u64(IDT + vector * 16 + 8, target >> 32);
}

fn machine(dispatch: Dispatch) -> (Cpu, TestBus, std::sync::Arc<Ram>) {
    let ram = Ram::new(0x10_0000);
    ram.write(REAL, &real().expect("real mode code"));
    ram.write(PROTECTED, &protected().expect("protected mode code"));
    ram.write(LONG, &long().expect("long mode code"));
    ram.write(USER, &user().expect("user code"));
    for index in 0..5 {
        ram.write(HANDLERS + index * 0x100, &handler(index).expect("handler"));
    }
    // INT 21H of real mode: prints "I" and returns.
    ram.write(0x21 * 4, &[0x00, 0x05, 0x00, 0x00]);
    ram.write(0x500, &[0xb0, b'I', 0xe6, 0xe9, 0xcf]);
    // Null, code32, data32, code64, stack; the TSS at 28H takes two entries; user: 33H, 2BH.
    for (i, entry) in [
        0u64,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_8900_3000_0067,
        0,
    ]
    .into_iter()
    .enumerate()
    {
        ram.write_u64(GDT + i as u64 * 8, entry);
    }
    ram.write(0xf00, &[0x37, 0, 0, 0x10, 0, 0]);
    ram.write(0xf10, &[0xff, 0x0f, 0, 0x20, 0, 0, 0, 0, 0, 0]);
    ram.write_u64(TSS + 4, 0x5000);
    gate(&ram, 14, HANDLERS, 0);
    gate(&ram, 0, HANDLERS + 0x100, 0);
    gate(&ram, 0x30, HANDLERS + 0x200, 0);
    gate(&ram, 13, HANDLERS + 0x400, 0);
    // The first 2 MiB, user.
    ram.write_u64(PML4, (PML4 + 0x1000) | 7);
    ram.write_u64(PML4 + 0x1000, (PML4 + 0x2000) | 7);
    ram.write_u64(PML4 + 0x2000, 0x87);
    let bus = TestBus::new(&ram);
    let copy = TestBus {
        output: bus.output.clone(),
        ..TestBus::new(&ram)
    };
    let mut cpu = Cpu::new(Box::new(bus), CodePages::new(256), CpuidTable::intel());
    cpu.set_dispatch(dispatch);
    let mut r = cpu.registers();
    r.segments[1].selector = 0;
    r.segments[1].base = 0;
    r.rip = REAL;
    cpu.set_registers(&r);
    (cpu, copy, ram)
}

/// Runs to the last HLT, letting time pass while the processor is halted.
fn run(cpu: &mut Cpu, slice: u64) -> Stopped {
    for _ in 0..10_000 {
        match cpu.run(slice) {
            Stopped::Halted => match cpu.deadline() {
                Some(at) if cpu.rflags() & 0x200 != 0 => cpu.advance_to(at),
                _ => return Stopped::Halted,
            },
            Stopped::Budget => {}
            other => return other,
        }
    }
    Stopped::Budget
}

#[test]
fn from_real_mode_to_user_mode_and_back_through_faults_and_interrupts() {
    let mut seen = Vec::new();
    for (dispatch, slice) in [
        (Dispatch::Tail, 1_000_000),
        (Dispatch::Loop, 1_000_000),
        (Dispatch::Tail, 1),
        (Dispatch::Tail, 7),
    ] {
        let (mut cpu, bus, _) = machine(dispatch);
        let stopped = run(&mut cpu, slice);
        let text = String::from_utf8(bus.output.lock().expect("output").clone()).expect("ascii");
        assert_eq!(text, "RIPLFDTTTUG", "{stopped:?} at {:x}", cpu.rip());
        assert_eq!(stopped, Stopped::Halted);
        assert_eq!(cpu.cpl(), 0);
        // SS, RSP, RFLAGS, CS, RIP and the error code below the top that the TSS gave.
        assert_eq!(cpu.gpr(3), 0x5000 - 48);
        seen.push((cpu.retired(), cpu.registers()));
    }
    for other in &seen[1..] {
        assert_eq!(&seen[0], other, "dispatch and slices change nothing");
    }
}

#[test]
fn a_fault_without_handlers_is_a_triple_fault() {
    let (mut cpu, _, ram) = machine(Dispatch::Tail);
    ram.write(0xf10, &[0, 0]);
    let Stopped::Exit(exit) = run(&mut cpu, 1_000_000) else {
        panic!("no exit")
    };
    assert_eq!(exit.cause, Cause::TripleFault);
    assert_eq!(exit.vmx().map(|v| v.reason), Some(2));
    let Stopped::Exit(again) = cpu.run(10) else {
        panic!("shutdown lasts")
    };
    assert_eq!(again.cause, Cause::TripleFault);
}
