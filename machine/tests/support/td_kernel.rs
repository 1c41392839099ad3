//! Small kernels for trust domains: assembled code, handlers, and an interrupt table.
#![allow(dead_code)] // Each test binary uses its part.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_machine::{End, Image, RunReport, VcpuReport};
use soft_tdx_module::Platform;

use crate::support::samples::elf;

/// The kernel's code; handlers, 512 bytes each; a routine that prints AL; the interrupt table; data.
pub(crate) const MAIN: u64 = 0x20_0000;
pub(crate) const HANDLERS: u64 = 0x20_1000;
pub(crate) const PUTC: u64 = 0x20_1e00;
pub(crate) const IDT: u64 = 0x20_2000;
pub(crate) const IDT_POINTER: u64 = 0x20_2f00;
pub(crate) const DATA: u64 = 0x20_3000;
pub(crate) const IMAGE: usize = 0x4000;

pub(crate) const UD: u8 = 6;
pub(crate) const VE: u8 = 20;
pub(crate) const SHARED: u64 = 1 << 47;

/// TDCALL leaves.
pub(crate) const VMCALL: u32 = 0;
pub(crate) const RTMR_EXTEND: u32 = 2;
pub(crate) const VEINFO_GET: u32 = 3;
pub(crate) const REPORT: u32 = 4;
pub(crate) const ACCEPT: u32 = 6;
/// TDG.VP.VMCALL sub-functions, and the registers that they pass: R10 to R15.
pub(crate) const IO: u32 = 30;
pub(crate) const MAP_GPA: u32 = 0x1_0001;
pub(crate) const R10_TO_R15: u32 = 0xfc00;

pub(crate) type Assembled = Result<(), IcedError>;
pub(crate) type Part = fn(&mut CodeAssembler) -> Assembled;

pub(crate) fn assemble(at: u64, part: Part) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    part(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// TDG.VP.VMCALL of a sub-function whose arguments are in R12 to R15.
pub(crate) fn vmcall(a: &mut CodeAssembler, function: u32) -> Assembled {
    a.mov(eax, VMCALL)?;
    a.mov(ecx, R10_TO_R15)?;
    a.xor(r10d, r10d)?;
    a.mov(r11d, function)?;
    a.tdcall()
}

pub(crate) fn putc(a: &mut CodeAssembler) -> Assembled {
    a.movzx(r15d, al)?;
    a.push(rax)?;
    a.push(rcx)?;
    a.mov(r12d, 1)?;
    a.mov(r13d, 1)?;
    a.mov(r14d, 0x3f8)?;
    vmcall(a, IO)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.ret()
}

/// The TSC in RAX.
pub(crate) fn time(a: &mut CodeAssembler) -> Assembled {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)
}

/// Prints a character without an instruction that the host emulates.
pub(crate) fn print(a: &mut CodeAssembler, text: &str) -> Assembled {
    for byte in text.bytes() {
        a.mov(al, u32::from(byte))?;
        a.call(PUTC)?;
    }
    Ok(())
}

/// Prints `yes` if the flags say equal, else a question mark.
pub(crate) fn print_if_equal(a: &mut CodeAssembler, yes: char) -> Assembled {
    let mut equal = a.create_label();
    a.mov(al, yes as u32)?;
    a.je(equal)?;
    a.mov(al, u32::from(b'?'))?;
    a.set_label(&mut equal)?;
    a.call(PUTC)
}

/// #VE of OUT: asks the host, and goes on behind the instruction.
pub(crate) fn port_handler(a: &mut CodeAssembler) -> Assembled {
    a.push(rax)?;
    a.push(rcx)?;
    a.push(rdx)?;
    a.mov(eax, VEINFO_GET)?;
    a.tdcall()?;
    a.mov(ebp, r10d)?;
    a.cmp(ecx, IO as i32)?;
    let mut other = a.create_label();
    a.jne(other)?;
    a.mov(r14, rdx)?;
    a.shr(r14, 16)?;
    a.mov(r12d, edx)?;
    a.and(r12d, 7)?;
    a.inc(r12d)?;
    a.mov(r13d, 1)?;
    a.mov(r15, qword_ptr(rsp + 16))?;
    vmcall(a, IO)?;
    a.add(qword_ptr(rsp + 24), rbp)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.iretq()?;
    a.set_label(&mut other)?;
    a.ud2()
}

/// A kernel with handlers of some vectors, at most seven different ones.
pub(crate) fn kernel(main: Part, handlers: &[(u8, Part)]) -> Image {
    let mut bytes = vec![0; IMAGE];
    let mut put = |at: u64, code: &[u8], room: usize| {
        assert!(code.len() <= room, "{} bytes", code.len());
        bytes[(at - MAIN) as usize..][..code.len()].copy_from_slice(code);
    };
    let load_table: Part = |a| a.lidt(ptr(IDT_POINTER));
    let start = assemble(MAIN, load_table);
    put(MAIN, &start, 0x20);
    let after = MAIN + start.len() as u64;
    put(after, &assemble(after, main), 0xfe0);
    put(PUTC, &assemble(PUTC, putc), 0x200);
    let mut placed: Vec<Part> = Vec::new();
    for (vector, handler) in handlers {
        let known = placed
            .iter()
            .position(|part| std::ptr::fn_addr_eq(*part, *handler));
        let n = known.unwrap_or(placed.len());
        let at = HANDLERS + n as u64 * 0x200;
        if known.is_none() {
            assert!(at < PUTC, "too many handlers");
            placed.push(*handler);
            put(at, &assemble(at, *handler), 0x200);
        }
        // An interrupt gate to the code segment of the start (selector 0x10).
        let gate = at & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        put(IDT + u64::from(*vector) * 16, &gate.to_le_bytes(), 8);
    }
    put(IDT_POINTER, &0xfffu16.to_le_bytes(), 2);
    put(IDT_POINTER + 2, &IDT.to_le_bytes(), 8);
    Image::from_bytes("kernel", elf(true, MAIN, MAIN, &bytes, IMAGE as u64))
}

/// Machines whose vCPUs take turns, and whose vCPUs execute at the same time.
pub(crate) fn hosts() -> [SimHost; 2] {
    [SimHost::new(Vendor::Intel), at_the_same_time()]
}

/// A machine whose vCPUs execute at the same time.
pub(crate) fn at_the_same_time() -> SimHost {
    SimHost::builder(Vendor::Intel).parallel(true).build_lazy()
}

/// The frame that the only TD of a platform has at a private address.
pub(crate) fn frame_at(platform: &Platform, gpa: u64) -> u64 {
    let end = platform.config().memory_bytes;
    let is_tdr = |pa: &u64| platform.td(*pa).is_some();
    let tdr = (0..end).step_by(4096).find(is_tdr).unwrap();
    let entry = platform.sept(tdr, gpa, 0).unwrap().entry;
    let frame = entry & 0x000f_ffff_ffff_f000 & (end.next_power_of_two() - 1);
    assert!(frame != 0 && frame < end, "{entry:#x}");
    frame
}

/// A TD ended because the host wrote to its private memory, and had printed this.
#[track_caller]
pub(crate) fn td_is_lost((report, text): (RunReport, String), printed: &str) {
    assert_eq!(text, printed, "{report:?}");
    // TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE for a vCPU inside the TD. One that was outside finds the TD lost: TDX_TD_FATAL.
    let lost = [0x6000_0005, 0xe000_0604];
    let status = |end: &End| match end {
        End::InternalError { suberror: 4, data } => Some(data[0] >> 32),
        _ => None,
    };
    let is_lost = status(&report.end).is_some_and(|status| lost.contains(&status));
    let inside = |vcpu: &VcpuReport| status(&vcpu.end) == Some(lost[0]);
    assert!(is_lost && report.vcpus.iter().any(inside), "{report:?}");
}
