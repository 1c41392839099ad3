//! A TD's machine code: it starts at the reset vector, switches to long mode, and executes what a test assembles.
#![allow(dead_code)] // Each test binary uses a part.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use zerocopy::IntoBytes;

pub(crate) const SHARED: u64 = 1 << 47;
/// Where the guest finds shared memory: the upper half of its addresses.
pub(crate) const SHARED_VIEW: u64 = 0xffff_8000_0000_0000;
/// The last 64 KiB below 4 GiB: stack, page tables, the test's code, the start.
pub(crate) const TOP: u64 = 0xffff_0000;
pub(crate) const TOP_BYTES: u64 = 0x1_0000;
const TABLES: u64 = 0xffff_8000;
const CODE: u64 = 0xffff_e000;
const RESET_PAGE: u64 = 0xffff_f000;
const GDT: usize = 0x800;
const RESET: usize = 0xff0;

/// TDG.VP.VMCALL sub-functions.
pub(crate) const IO: u32 = 30;
pub(crate) const RDMSR: u32 = 31;
pub(crate) const WRMSR: u32 = 32;
pub(crate) const MMIO: u32 = 48;
pub(crate) const INFO: u32 = 0x1_0000;
pub(crate) const MAP_GPA: u32 = 0x1_0001;
pub(crate) const GET_QUOTE: u32 = 0x1_0002;
pub(crate) const FATAL: u32 = 0x1_0003;
pub(crate) const EVENT_NOTIFY: u32 = 0x1_0004;

/// The port by which the guest says what it found.
pub(crate) const SAY: u16 = 0x80;

pub(crate) type Assembled = Result<(), IcedError>;
pub(crate) type Part = fn(&mut CodeAssembler) -> Assembled;

/// TDG.VP.VMCALL of a sub-function, with R12 to R15 as they are.
pub(crate) fn vmcall(a: &mut CodeAssembler, function: u32) -> Assembled {
    a.xor(eax, eax)?;
    a.mov(ecx, 0xfc00)?; // R10 to R15
    a.xor(r10d, r10d)?;
    a.mov(r11d, function)?;
    a.tdcall()
}

/// The same with arguments.
pub(crate) fn call(a: &mut CodeAssembler, function: u32, args: [u64; 4]) -> Assembled {
    for (register, value) in [r12, r13, r14, r15].into_iter().zip(args) {
        a.mov(register, value)?;
    }
    vmcall(a, function)
}

/// Says both halves of RBX, the lower first.
pub(crate) fn say_rbx(a: &mut CodeAssembler) -> Assembled {
    for _ in 0..2 {
        a.mov(r15d, ebx)?;
        a.mov(r12d, 4)?;
        a.mov(r13d, 1)?;
        a.mov(r14d, u32::from(SAY))?;
        vmcall(a, IO)?;
        a.shr(rbx, 32)?;
    }
    Ok(())
}

/// Says a register of a TDG.VP.VMCALL's answer.
pub(crate) fn say(a: &mut CodeAssembler, register: AsmRegister64) -> Assembled {
    a.mov(rbx, register)?;
    say_rbx(a)
}

/// Accepts a page of 4 KiB.
pub(crate) fn accept(a: &mut CodeAssembler, gpa: u64) -> Assembled {
    a.mov(eax, 6)?;
    a.mov(rcx, gpa)?;
    a.xor(edx, edx)?;
    a.tdcall()
}

fn assemble(bits: u32, at: u64, part: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    part(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// From 32-bit protected mode to the test's code in long mode. RCX stays as it is.
fn start(page: &mut [u8]) {
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    let code = assemble(32, RESET_PAGE, |a| {
        a.lgdt(fword_ptr(RESET_PAGE + GDT as u64 - 16))?;
        a.mov(eax, TABLES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr4)?;
        a.or(eax, 0x20)?; // PAE
        a.mov(cr4, eax)?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32 as i32)?; // PG
        a.mov(cr0, eax)
    });
    put(0, &code);
    let next = RESET_PAGE as u32 + code.len() as u32 + 7;
    put(code.len(), &[0xea]); // jmp 8:next
    put(code.len() + 1, &next.to_le_bytes());
    put(code.len() + 5, &[8, 0]);
    let long = assemble(64, next.into(), |a| {
        a.mov(rsp, TABLES)?;
        a.mov(rax, CODE)?;
        a.jmp(rax)
    });
    put(code.len() + 7, &long);
    let table = [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    put(GDT - 16, &(table.len() as u16 * 8 - 1).to_le_bytes());
    put(GDT - 14, &(RESET_PAGE as u32 + GDT as u32).to_le_bytes());
    put(GDT, table.as_bytes());
    let back = -(RESET as i32 + 5);
    put(RESET, &[0xe9]); // jmp to the start of the page
    put(RESET + 1, &back.to_le_bytes());
}

/// The first 512 GiB as they are, and above them as shared memory.
fn tables(memory: &mut [u8]) {
    const PRESENT: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let mut put = |table: usize, index: usize, entry: u64| {
        let at = (TABLES - TOP) as usize + table * 4096 + index * 8;
        memory[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    put(0, 0, (TABLES + 0x1000) | PRESENT);
    put(0, 256, (TABLES + 0x2000) | PRESENT);
    for gib in 0..512 {
        let at = (gib as u64) << 30;
        put(1, gib, at | PRESENT | LARGE);
        put(2, gib, at | SHARED | PRESENT | LARGE);
    }
}

/// The memory from `TOP` to 4 GiB: page tables, the test's code, the start.
pub(crate) fn image(code: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    let mut memory = vec![0; TOP_BYTES as usize];
    tables(&mut memory);
    start(&mut memory[(RESET_PAGE - TOP) as usize..]);
    let code = assemble(64, CODE, code);
    assert!(code.len() <= 4096);
    memory[(CODE - TOP) as usize..][..code.len()].copy_from_slice(&code);
    memory
}
