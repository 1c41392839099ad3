//! The local APIC of a TD's vCPU, as kernels use it, and their runs.
#![allow(dead_code)] // Each test binary uses its part.

use std::sync::Mutex;

use iced_x86::code_asm::*;
use kvm_ops::sim::SimHost;
use kvm_ops::{Irqchip, Kind, Tech};
use kvm_ops_machine::{
    ConsoleSink, ExitContext, ExitHandler, Image, Machine, MachineConfig, RunReport,
};

use crate::support::{Until, limits};
use crate::td_kernel::*;

/// TDG.VP.VMCALL sub-functions.
pub(crate) const HLT: u32 = 12;
pub(crate) const RDMSR: u32 = 31;
pub(crate) const WRMSR: u32 = 32;
/// R10 of a call that the host refuses.
pub(crate) const REFUSED: u64 = 1 << 63;

/// x2APIC registers.
pub(crate) const TASK_PRIORITY: u32 = 0x808;
pub(crate) const END_OF_INTERRUPT: u32 = 0x80b;
pub(crate) const SPURIOUS_VECTOR: u32 = 0x80f;
pub(crate) const COMMAND: u32 = 0x830;
pub(crate) const TIMER: u32 = 0x832;
pub(crate) const INITIAL_COUNT: u32 = 0x838;
pub(crate) const CURRENT_COUNT: u32 = 0x839;
pub(crate) const DIVIDE: u32 = 0x83e;
pub(crate) const SELF_INTERRUPT: u32 = 0x83f;
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// Values of them: enabled, periodic, by deadline, divided by 1.
pub(crate) const ENABLED: u32 = 0x1ff;
pub(crate) const PERIODIC: u32 = 1 << 17;
pub(crate) const BY_DEADLINE: u32 = 2 << 17;
pub(crate) const BY_1: u32 = 0xb;
pub(crate) const NMI_TO_SELF: u32 = 4 << 8 | 1 << 14 | 1 << 18;

pub(crate) const NMI: u8 = 2;
pub(crate) const VECTOR: u8 = 0x40;

/// Data of the kernels: a count of interrupts, and the TSC at the last.
pub(crate) const COUNT: u64 = DATA;
pub(crate) const WHEN: u64 = DATA + 8;

/// Writes a register of the local APIC by TDG.VP.VMCALL.
pub(crate) fn set(a: &mut CodeAssembler, register: u32, value: u32) -> Assembled {
    a.mov(r12d, register)?;
    a.mov(r13d, value)?;
    vmcall(a, WRMSR)
}

/// Writes one that is the guest's.
pub(crate) fn set_own(a: &mut CodeAssembler, register: u32, value: u32) -> Assembled {
    a.mov(ecx, register)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Halts. `blocked` tells the host that no interrupt is taken.
pub(crate) fn halt(a: &mut CodeAssembler, blocked: bool) -> Assembled {
    a.mov(r12d, u32::from(blocked))?;
    vmcall(a, HLT)
}

/// Halts for good from the label on; no interrupt is taken.
pub(crate) fn halt_for_good(a: &mut CodeAssembler, label: &mut CodeLabel) -> Assembled {
    a.set_label(label)?;
    halt(a, true)?;
    a.jmp(*label)
}

/// Clock ticks of the timer's input clock in RBP, as CPUID leaf 15H has them.
pub(crate) fn input_clock(a: &mut CodeAssembler) -> Assembled {
    a.mov(eax, 0x15)?;
    a.xor(ecx, ecx)?;
    a.cpuid()?;
    a.mov(ecx, eax)?;
    a.mov(eax, ebx)?;
    a.xor(edx, edx)?;
    a.div(ecx)?;
    a.mov(ebp, eax)
}

/// Prints a character if RAX is below a bound, else a question mark.
pub(crate) fn print_if_below(a: &mut CodeAssembler, bound: i32, yes: char) -> Assembled {
    let mut below = a.create_label();
    a.cmp(rax, bound)?;
    a.mov(al, yes as u32)?;
    a.jb(below)?;
    a.mov(al, u32::from(b'?'))?;
    a.set_label(&mut below)?;
    a.call(PUTC)
}

/// Prints the full stop at which the run ends.
pub(crate) fn end(a: &mut CodeAssembler) -> Assembled {
    print(a, ".")?;
    let mut stay = a.create_label();
    a.set_label(&mut stay)?;
    a.jmp(stay)
}

/// Waits, as spinning kernels do, until a word of the data has a value.
pub(crate) fn wait_for(a: &mut CodeAssembler, word: u64, value: i32) -> Assembled {
    let mut waiting = a.create_label();
    let mut done = a.create_label();
    // A label of the caller may stand here.
    a.nop()?;
    a.set_label(&mut waiting)?;
    a.cmp(qword_ptr(word), value)?;
    a.je(done)?;
    a.pause()?;
    a.jmp(waiting)?;
    a.set_label(&mut done)?;
    a.nop()
}

pub(crate) const SAVED: [AsmRegister64; 9] = [rax, rcx, rdx, r10, r11, r12, r13, r14, r15];

/// A handler that does something, and returns.
pub(crate) fn handler(a: &mut CodeAssembler, what: Part) -> Assembled {
    for register in SAVED {
        a.push(register)?;
    }
    what(a)?;
    for register in SAVED.into_iter().rev() {
        a.pop(register)?;
    }
    a.iretq()
}

pub(crate) fn end_of_interrupt(a: &mut CodeAssembler) -> Assembled {
    set_own(a, END_OF_INTERRUPT, 0)
}

/// A handler that counts, notes the time, and ends its interrupt.
pub(crate) fn counts(a: &mut CodeAssembler) -> Assembled {
    handler(a, |a| {
        time(a)?;
        a.mov(qword_ptr(WHEN), rax)?;
        a.inc(qword_ptr(COUNT))?;
        end_of_interrupt(a)
    })
}

/// A handler that prints `i`.
pub(crate) fn prints_i(a: &mut CodeAssembler) -> Assembled {
    handler(a, |a| {
        print(a, "i")?;
        end_of_interrupt(a)
    })
}

/// A handler of NMIs, which have no end.
pub(crate) fn prints_n(a: &mut CodeAssembler) -> Assembled {
    handler(a, |a| print(a, "n"))
}

pub(crate) fn config(image: Image) -> MachineConfig {
    let config = MachineConfig::new().kind(Kind::Of(Tech::Tdx));
    config.memory(16 << 20).irqchip(Irqchip::Split).image(image)
}

/// Runs a kernel until it prints a full stop. `host` gets each exit before the devices.
pub(crate) fn run_with(
    machine_of: &SimHost,
    config: MachineConfig,
    mut host: impl FnMut(&mut ExitContext<'_>) + Send,
) -> (RunReport, String) {
    let console = ConsoleSink::capture();
    let mut machine = Machine::build(machine_of, config).unwrap();
    let until = Until::new(machine.devices(console.clone()), console.clone(), ".");
    let host = Mutex::new(&mut host);
    let handler = |exit: &mut ExitContext<'_>| {
        host.lock().unwrap()(exit);
        until.handle(exit)
    };
    let report = machine.run(&handler, limits()).unwrap();
    let freed = machine.destroy();
    assert!(freed.is_clean(), "{freed:?}");
    (report, console.text())
}
