//! Machine code of a SEV, SEV-ES or SNP guest in long mode, its page tables, and its requests by the GHCB.
#![allow(dead_code)] // Each test binary uses a part.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

pub(crate) const PAGE: u64 = 4096;
/// Bytes of memory from address 0 on, of which those in front of `OPEN` are measured.
pub(crate) const RAM: u64 = 0x10_0000;
pub(crate) const TABLES: u64 = 0x1000;
pub(crate) const CODE: u64 = 0x1_0000;
pub(crate) const STACK: u64 = 0x2_0000;
/// Memory that is never measured: the GHCB, and pages for the host.
pub(crate) const OPEN: u64 = 0x4_0000;
pub(crate) const GHCB: u64 = OPEN;
/// Where the guest finds shared memory: the upper half of its addresses.
pub(crate) const SHARED_VIEW: u64 = 0xffff_8000_0000_0000;
/// The port by which a guest says what it found.
pub(crate) const SAY: u16 = 0x80;

pub(crate) const GHCB_MSR: u32 = 0xc001_0130;
pub(crate) const STATUS_MSR: u32 = 0xc001_0131;
pub(crate) const TERMINATE: u64 = 0x100;

pub(crate) type Assembled = Result<(), IcedError>;
pub(crate) type Part = fn(&mut CodeAssembler) -> Assembled;

/// VMGEXIT with a request in the GHCB MSR; the answer is in RBX afterwards.
pub(crate) fn msr_request(a: &mut CodeAssembler, value: u64) -> Assembled {
    a.mov(ecx, GHCB_MSR)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()?;
    a.vmgexit()?;
    a.mov(ecx, GHCB_MSR)?;
    a.rdmsr()?;
    a.mov(ebx, eax)?;
    a.shl(rdx, 32)?;
    a.or(rbx, rdx)
}

/// Ends a SEV-ES or SNP guest.
pub(crate) fn terminate(a: &mut CodeAssembler) -> Assembled {
    msr_request(a, TERMINATE)
}

/// Fields of the GHCB, and a bit for each quadword in front that is passed.
pub(crate) const RAX: i32 = 0x1f8;
pub(crate) const RBX: i32 = 0x318;
pub(crate) const INFO_1: i32 = 0x398;
pub(crate) const INFO_2: i32 = 0x3a0;
const CODE_FIELD: i32 = 0x390;
pub(crate) const SCRATCH: i32 = 0x3a8;
pub(crate) const BUFFER: i32 = 0x800;
const VALID: i32 = 0x3f0;

/// Names the GHCB page, which R15 has from then on. An SNP guest registers it.
pub(crate) fn use_page(a: &mut CodeAssembler, snp: bool) -> Assembled {
    if snp {
        msr_request(a, GHCB | 0x012)?;
    }
    a.mov(r15, SHARED_VIEW + GHCB)?;
    a.mov(ecx, GHCB_MSR)?;
    a.mov(eax, GHCB as u32)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// VMGEXIT with the page: code, information, and other fields with their values. RBX has SW_EXITINFO1 and RDX
/// SW_EXITINFO2 afterwards.
pub(crate) fn page_request(
    a: &mut CodeAssembler,
    code: u64,
    info: [u64; 2],
    fields: &[(i32, u64)],
) -> Assembled {
    let fixed = [(CODE_FIELD, code), (INFO_1, info[0]), (INFO_2, info[1])];
    let mut valid = [0_u64; 2];
    for (at, value) in fixed.into_iter().chain(fields.iter().copied()) {
        a.mov(rax, value)?;
        a.mov(qword_ptr(r15 + at), rax)?;
        if at < VALID {
            valid[at as usize / 512] |= 1 << (at / 8 % 64);
        }
    }
    for (n, word) in valid.into_iter().enumerate() {
        a.mov(rax, word)?;
        a.mov(qword_ptr(r15 + VALID + n as i32 * 8), rax)?;
    }
    a.mov(word_ptr(r15 + 0xffa), 2)?; // the protocol's version
    a.mov(dword_ptr(r15 + 0xffc), 0)?;
    a.vmgexit()?;
    a.mov(rbx, qword_ptr(r15 + INFO_1))?;
    a.mov(rdx, qword_ptr(r15 + INFO_2))
}

/// Says the lower half of a register by the GHCB page.
pub(crate) fn say_by_page(a: &mut CodeAssembler, register: AsmRegister64) -> Assembled {
    a.mov(r14, register)?;
    a.mov(qword_ptr(r15 + RAX), r14)?;
    for (at, value) in [
        (CODE_FIELD, 0x7b),
        (INFO_1, u64::from(SAY) << 16 | 1 << 6),
        (INFO_2, 0),
    ] {
        a.mov(rax, value)?;
        a.mov(qword_ptr(r15 + at), rax)?;
    }
    let bit = |at: i32| 1_u64 << (at / 8 % 64);
    a.mov(rax, bit(RAX))?;
    a.mov(qword_ptr(r15 + VALID), rax)?;
    a.mov(rax, bit(CODE_FIELD) | bit(INFO_1) | bit(INFO_2))?;
    a.mov(qword_ptr(r15 + VALID + 8), rax)?;
    a.mov(word_ptr(r15 + 0xffa), 2)?;
    a.vmgexit()
}

/// The measured memory: page tables with the first 512 GiB encrypted, and above them as shared memory; and the code.
pub(crate) fn image(c_bit: u32, code: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    const PRESENT: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let c_bit = 1u64 << c_bit;
    let mut memory = vec![0; OPEN as usize];
    let mut put = |table: u64, index: u64, entry: u64| {
        let at = (TABLES + table * PAGE + index * 8) as usize;
        memory[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    put(0, 0, (TABLES + PAGE) | PRESENT | c_bit);
    put(0, 256, (TABLES + 2 * PAGE) | PRESENT | c_bit);
    for gib in 0..512 {
        put(1, gib, gib << 30 | c_bit | PRESENT | LARGE);
        put(2, gib, gib << 30 | PRESENT | LARGE);
    }
    let mut a = CodeAssembler::new(64).unwrap();
    code(&mut a).unwrap();
    a.ud2().unwrap();
    let code = a.assemble(CODE).unwrap();
    memory[CODE as usize..][..code.len()].copy_from_slice(&code);
    memory
}
