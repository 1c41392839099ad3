//! The CPUID instruction, of which a program for SEV asks where the C-bit is: its answers for memory encryption are
//! those of the software machine.
//!
//! No library stands between a program and an instruction. So the CPUID instructions in the program's own code are
//! made undefined, which is one byte each, and the handler of SIGILL answers them. Code of shared libraries stays
//! as it is: they ask what the real processor can do.

use std::arch::x86_64::__cpuid_count;
use std::ffi::c_void;
use std::sync::OnceLock;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use libc::{c_int, siginfo_t, ucontext_t};

/// The leaf that tells of memory encryption, and the one that tells which is the last.
const ENCRYPTION: u32 = 0x8000_001f;
const LAST_EXTENDED: u32 = 0x8000_0000;

/// CPUID, and the byte that makes it UD2.
const CPUID: [u8; 2] = [0x0f, 0xa2];
const UD2: u8 = 0x0b;

const PAGE: usize = 4096;

struct Taken {
    /// Addresses of the instructions, lowest first.
    sites: Vec<usize>,
    /// The answer of the leaf of memory encryption.
    answer: [u32; 4],
    /// What handled SIGILL before.
    before: libc::sigaction,
}

static TAKEN: OnceLock<Taken> = OnceLock::new();

/// Takes the program's CPUID instructions over, if the real processor answers them otherwise than the machine's.
pub(crate) fn take_over(answer: [u32; 4]) {
    if answer == leaf(ENCRYPTION, 0) {
        return;
    }
    let ranges = program_code();
    let sites: Vec<usize> = ranges.iter().flat_map(|range| sites_in(*range)).collect();
    if sites.is_empty() {
        return;
    }
    // SAFETY: all zero is a value of the structure.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut own: libc::sigaction = unsafe { std::mem::zeroed() };
    own.sa_sigaction = answer_signal as *const () as usize;
    own.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: the structure is ours to fill.
    unsafe { libc::sigaction(libc::SIGILL, std::ptr::null(), &raw mut before) };
    let taken = Taken {
        sites,
        answer,
        before,
    };
    if TAKEN.set(taken).is_err() {
        return;
    }
    // SAFETY: the handler touches nothing but its context and what was just set.
    unsafe { libc::sigaction(libc::SIGILL, &raw const own, std::ptr::null_mut()) };
    for site in TAKEN.get().iter().flat_map(|taken| &taken.sites) {
        make_undefined(*site);
    }
}

/// The code of the program itself: first address and length.
fn program_code() -> Vec<(usize, usize)> {
    extern "C" fn note(info: *mut libc::dl_phdr_info, _: usize, list: *mut c_void) -> c_int {
        // SAFETY: the loader passes a description that is valid during the call, and the list of the caller.
        let (info, list) = unsafe { (&*info, &mut *list.cast::<Vec<(usize, usize)>>()) };
        for n in 0..usize::from(info.dlpi_phnum) {
            // SAFETY: the description has so many headers.
            let header = unsafe { &*info.dlpi_phdr.add(n) };
            if header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_X != 0 {
                let at = info.dlpi_addr as usize + header.p_vaddr as usize;
                list.push((at, header.p_filesz as usize));
            }
        }
        // The program is the first object, however it was started.
        1
    }
    let mut list = Vec::new();
    // SAFETY: the list lives through the call.
    unsafe { libc::dl_iterate_phdr(Some(note), (&raw mut list).cast()) };
    list
}

/// The CPUID instructions in a range of code.
fn sites_in((at, len): (usize, usize)) -> Vec<usize> {
    // SAFETY: the loader mapped the segment, which is code and stays as it is.
    let code = unsafe { std::slice::from_raw_parts(at as *const u8, len) };
    let pairs = code.windows(2).enumerate();
    let found = pairs.filter(|(_, pair)| *pair == CPUID);
    let instructions = found.filter(|(offset, _)| is_instruction(code, *offset));
    instructions.map(|(offset, _)| at + offset).collect()
}

/// True if the bytes are an instruction, and no part of another one. Decoding from places in front of it comes into
/// step with the code after a few instructions, so most of them find it.
fn is_instruction(code: &[u8], offset: usize) -> bool {
    const NEAREST: usize = 24;
    const FARTHEST: usize = 88;
    let starts = offset.saturating_sub(FARTHEST)..offset.saturating_sub(NEAREST);
    let (mut hits, mut tries) = (0, 0);
    for start in starts {
        let mut decoder = Decoder::with_ip(64, &code[start..], start as u64, DecoderOptions::NONE);
        while decoder.ip() < offset as u64 && decoder.can_decode() {
            let _ = decoder.decode();
        }
        tries += 1;
        if decoder.ip() == offset as u64 && decoder.decode().mnemonic() == Mnemonic::Cpuid {
            hits += 1;
        }
    }
    // A program that begins with it has nothing in front.
    hits * 2 > tries || tries == 0
}

/// Turns CPUID into UD2. Another thread executes the one or the other.
fn make_undefined(site: usize) {
    let first = site & !(PAGE - 1);
    let len = (site + CPUID.len() - first).next_multiple_of(PAGE);
    let (code, open) = (libc::PROT_READ | libc::PROT_EXEC, libc::PROT_WRITE);
    // SAFETY: the range is the program's code, and stays executable.
    let opened = unsafe { libc::mprotect(first as *mut c_void, len, code | open) };
    if opened != 0 {
        return;
    }
    // SAFETY: the page can be written now; the byte is the second of a CPUID instruction.
    unsafe { ((site + 1) as *mut u8).write_volatile(UD2) };
    // SAFETY: as above.
    unsafe { libc::mprotect(first as *mut c_void, len, code) };
}

fn leaf(function: u32, index: u32) -> [u32; 4] {
    // Safe with newer compilers.
    #[allow(unused_unsafe)]
    // SAFETY: every processor of x86-64 has CPUID, and it touches no memory.
    let leaf = unsafe { __cpuid_count(function, index) };
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}

/// The real processor's answer, but for memory encryption.
fn answer(taken: &Taken, function: u32, index: u32) -> [u32; 4] {
    match function {
        ENCRYPTION => taken.answer,
        LAST_EXTENDED => {
            let [last, b, c, d] = leaf(function, index);
            [last.max(ENCRYPTION), b, c, d]
        }
        _ => leaf(function, index),
    }
}

/// The handler of SIGILL.
extern "C" fn answer_signal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the context of the instruction, which is ours to change.
    let registers = unsafe { &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs };
    let Some(taken) = TAKEN.get() else { return };
    let at = |register: c_int| register as usize;
    let rip = registers[at(libc::REG_RIP)] as usize;
    if taken.sites.binary_search(&rip).is_ok() {
        let [a, b, c, d] = answer(
            taken,
            registers[at(libc::REG_RAX)] as u32,
            registers[at(libc::REG_RCX)] as u32,
        );
        for (register, value) in [
            (libc::REG_RAX, a),
            (libc::REG_RBX, b),
            (libc::REG_RCX, c),
            (libc::REG_RDX, d),
        ] {
            registers[at(register)] = value.into();
        }
        registers[at(libc::REG_RIP)] += CPUID.len() as i64;
        return;
    }
    match taken.before.sa_sigaction {
        // The instruction is executed again, and ends the program.
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: the default takes no handler.
            unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
        }
        handler if taken.before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the program set this function for this signal, with these arguments.
            let handler = unsafe {
                std::mem::transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(
                    handler,
                )
            };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: the program set this function for this signal, with this argument.
            let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler) };
            handler(signal);
        }
    }
}
