//! Small kernels in SEV, SEV-ES and SNP guests: machine code that handles #VC and makes VMGEXITs, on the software
//! platform.
#![cfg(target_arch = "x86_64")]

mod support;

use std::sync::Mutex;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    AmdVm, AnyVm, Error, ExitKind, Gfn, Gpa, Irqchip, Kind, Privacy, Tech, VcpuId, Vendor,
};
use kvm_ops_machine::{
    ConsoleSink, End, ExitContext, ExitHandler, Image, Machine, MachineConfig, MachineError,
    RunLimits, RunReport,
};
use soft_amd_sp::attestation::verify_report;
use soft_amd_sp::message::GuestChannel;
use soft_amd_sp::{Platform, RmpUpdate, RootOfTrust};
use support::limits;
use support::samples::elf;

/// The kernel's code; handlers, 512 bytes each; a routine that prints AL; the interrupt table; data.
const MAIN: u64 = 0x20_0000;
const HANDLERS: u64 = 0x20_1000;
const PUTC: u64 = 0x20_1e00;
const IDT: u64 = 0x20_2000;
const IDT_POINTER: u64 = 0x20_2f00;
const DATA: u64 = 0x20_3000;
const IMAGE: usize = 0x5000;

/// Pages that the guest shares: its GHCB, and one for the host.
const GHCB: u64 = 0x40_0000;
const OPEN: u64 = 0x40_1000;
/// Shared memory, as the start maps it.
const SHARED: u64 = 0xffff_8000_0000_0000;

const VC: u8 = 29;
const GHCB_MSR: u32 = 0xc001_0130;

/// Fields of the GHCB.
const RAX: i32 = 0x1f8;
const RBX: i32 = 0x318;
const RCX: i32 = 0x308;
const RDX: i32 = 0x310;
const CODE: i32 = 0x390;
const INFO_1: i32 = 0x398;
const INFO_2: i32 = 0x3a0;
const SCRATCH: i32 = 0x3a8;
const VALID: i32 = 0x3f0;
const BUFFER: i32 = 0x800;

type Assembled = Result<(), IcedError>;
type Part = fn(&mut CodeAssembler) -> Assembled;

fn assemble(at: u64, part: Part) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    part(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// VMGEXIT with a request in the GHCB MSR, which has the answer afterwards.
fn msr_request(a: &mut CodeAssembler, value: u64) -> Assembled {
    a.mov(ecx, GHCB_MSR)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()?;
    a.vmgexit()
}

/// Sets the GHCB up: shared, registered, named. SEV-ES guests need the last of these alone.
fn set_up(a: &mut CodeAssembler) -> Assembled {
    msr_request(a, 2 << 52 | GHCB | 0x014)?;
    msr_request(a, 2 << 52 | OPEN | 0x014)?;
    msr_request(a, GHCB | 0x012)?;
    set_up_es(a)
}

fn set_up_es(a: &mut CodeAssembler) -> Assembled {
    a.mov(ecx, GHCB_MSR)?;
    a.mov(eax, GHCB as u32)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// VMGEXIT with the GHCB page in RBX: a code and information, and the fields whose bits of the two words are valid.
fn page_request(a: &mut CodeAssembler, code: u32, info: [u64; 2], fields: &[i32]) -> Assembled {
    a.mov(eax, code)?;
    a.mov(qword_ptr(rbx + CODE), rax)?;
    for (at, value) in [INFO_1, INFO_2].into_iter().zip(info) {
        a.mov(rax, value)?;
        a.mov(qword_ptr(rbx + at), rax)?;
    }
    send(a, fields)
}

/// VMGEXIT with the fields that are in the page.
fn send(a: &mut CodeAssembler, fields: &[i32]) -> Assembled {
    let mut valid = [0_u64; 2];
    for at in [CODE, INFO_1, INFO_2].iter().chain(fields) {
        valid[*at as usize / 512] |= 1 << (at / 8 % 64);
    }
    for (n, word) in valid.into_iter().enumerate() {
        a.mov(rax, word)?;
        a.mov(qword_ptr(rbx + VALID + n as i32 * 8), rax)?;
    }
    a.mov(word_ptr(rbx + 0xffa), 2)?;
    a.vmgexit()
}

fn pause_for_good(a: &mut CodeAssembler) -> Assembled {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.pause()?;
    a.jmp(again)
}

/// The GHCB's address in RBX.
fn ghcb(a: &mut CodeAssembler) -> Assembled {
    a.mov(rbx, SHARED + GHCB)
}

fn putc(a: &mut CodeAssembler) -> Assembled {
    a.push(rax)?;
    a.push(rbx)?;
    a.movzx(eax, al)?;
    ghcb(a)?;
    a.mov(qword_ptr(rbx + RAX), rax)?;
    page_request(a, 0x7b, [0x3f8 << 16 | 1 << 4, 0], &[RAX])?;
    a.pop(rbx)?;
    a.pop(rax)?;
    a.ret()
}

fn print(a: &mut CodeAssembler, text: &str) -> Assembled {
    for byte in text.bytes() {
        a.mov(al, u32::from(byte))?;
        a.call(PUTC)?;
    }
    Ok(())
}

/// Prints `yes` if the flags say equal, else a question mark.
fn print_if_equal(a: &mut CodeAssembler, yes: char) -> Assembled {
    let mut equal = a.create_label();
    a.mov(al, yes as u32)?;
    a.je(equal)?;
    a.mov(al, u32::from(b'?'))?;
    a.set_label(&mut equal)?;
    a.call(PUTC)
}

/// PVALIDATE of a page of 4 KiB.
fn pvalidate(a: &mut CodeAssembler, at: u64, valid: u32) -> Assembled {
    a.mov(rax, at)?;
    a.xor(ecx, ecx)?;
    a.mov(edx, valid)?;
    a.pvalidate()
}

/// A kernel with handlers of some vectors, which runs `first` before its main part.
fn kernel_with(first: Part, main: Part, handlers: &[(u8, Part)]) -> Image {
    let mut bytes = vec![0; IMAGE];
    let mut put = |at: u64, code: &[u8], room: usize| {
        assert!(code.len() <= room, "{} bytes", code.len());
        bytes[(at - MAIN) as usize..][..code.len()].copy_from_slice(code);
    };
    let load_table: Part = |a| a.lidt(ptr(IDT_POINTER));
    let mut start = assemble(MAIN, load_table);
    start.extend(assemble(MAIN + start.len() as u64, first));
    start.extend(assemble(MAIN + start.len() as u64, main));
    put(MAIN, &start, 0x1000);
    put(PUTC, &assemble(PUTC, putc), 0x200);
    for (n, (vector, handler)) in (0..).zip(handlers) {
        let at = HANDLERS + n * 0x200;
        put(at, &assemble(at, *handler), 0x200);
        // An interrupt gate to the code segment of the start (selector 0x10).
        let gate = at & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        put(IDT + u64::from(*vector) * 16, &gate.to_le_bytes(), 8);
    }
    put(IDT_POINTER, &0xfffu16.to_le_bytes(), 2);
    put(IDT_POINTER + 2, &IDT.to_le_bytes(), 8);
    Image::from_bytes("kernel", elf(true, MAIN, MAIN, &bytes, IMAGE as u64))
}

fn kernel(main: Part, handlers: &[(u8, Part)]) -> Image {
    kernel_with(set_up, main, handlers)
}

fn config_of(tech: Tech, image: Image) -> MachineConfig {
    let config = MachineConfig::new().kind(Kind::Of(tech));
    config.memory(16 << 20).image(image)
}

fn config(image: Image) -> MachineConfig {
    config_of(Tech::SevSnp, image)
}

/// Runs a kernel to its end; everything is given back.
fn run_on(host: &SimHost, config: MachineConfig) -> (RunReport, String) {
    let console = ConsoleSink::capture();
    let mut machine = Machine::build(host, config).unwrap();
    let report = machine
        .run(&machine.devices(console.clone()), limits())
        .unwrap();
    let freed = machine.destroy();
    assert!(freed.is_clean(), "{freed:?}");
    assert_eq!((freed.keys_freed, host.live_vms()), (1, 0));
    (report, console.text())
}

#[track_caller]
fn prints(image: Image, expected: &str) {
    let (report, text) = run_on(&SimHost::new(Vendor::Amd), config(image));
    assert_eq!(text, expected, "{report:?}");
    assert_eq!(report.end, End::Halted, "{report:?}");
}

#[test]
fn a_kernel_prints_through_the_ghcb_and_its_return_halts_the_machine() {
    let main: Part = |a| {
        print(a, "hello from a guest")?;
        a.ret()
    };
    for (tech, first) in [
        (Tech::SevEs, set_up_es as Part),
        (Tech::SevSnp, set_up as Part),
    ] {
        let image = kernel_with(first, main, &[]);
        let (report, text) = run_on(&SimHost::new(Vendor::Amd), config_of(tech, image));
        assert_eq!(text, "hello from a guest", "{report:?}");
        assert_eq!(report.end, End::Halted, "{report:?}");
    }
}

#[test]
fn a_guest_without_encrypted_registers_uses_ports_and_shares_memory_by_hypercall() {
    let main: Part = |a| {
        a.mov(rbx, DATA)?;
        a.mov(qword_ptr(rbx), 7)?;
        // Without the C-bit the same page is ciphertext.
        a.mov(rbp, SHARED + DATA)?;
        a.mov(rax, qword_ptr(rbp))?;
        a.cmp(rax, 7)?;
        a.mov(al, u32::from(b'c'))?;
        let mut other = a.create_label();
        a.jne(other)?;
        a.mov(al, u32::from(b'?'))?;
        a.set_label(&mut other)?;
        a.mov(dx, 0x3f8)?;
        a.out(dx, al)?;
        // KVM_HC_MAP_GPA_RANGE: one page to shared.
        a.mov(eax, 12)?;
        a.mov(rbx, OPEN)?;
        a.mov(ecx, 1)?;
        a.xor(edx, edx)?;
        a.vmmcall()?;
        a.mov(rbx, SHARED + OPEN)?;
        a.mov(dword_ptr(rbx), 0x6e65_706f)?;
        a.add(al, i32::from(b'0'))?;
        a.mov(dx, 0x3f8)?;
        a.out(dx, al)?;
        // SEV_STATUS, and the leaf with the C-bit.
        a.mov(ecx, 0xc001_0131u32)?;
        a.rdmsr()?;
        a.add(al, i32::from(b'0'))?;
        a.mov(dx, 0x3f8)?;
        a.out(dx, al)?;
        a.mov(eax, 0x8000_001fu32)?;
        a.cpuid()?;
        a.and(ebx, 0x3f)?;
        a.lea(eax, ptr(rbx + 0x10))?;
        a.mov(dx, 0x3f8)?;
        a.out(dx, al)?;
        a.ret()
    };
    let nothing: Part = |a| a.nop();
    let image = kernel_with(nothing, main, &[]);
    let (host, console) = (SimHost::new(Vendor::Amd), ConsoleSink::capture());
    let mut machine = Machine::build(&host, config_of(Tech::Sev, image)).unwrap();
    let report = machine
        .run(&machine.devices(console.clone()), limits())
        .unwrap();
    // 51 + 0x10 is 'C'.
    assert_eq!(console.text(), "c01C", "{report:?}");
    assert_eq!(report.end, End::Halted);
    let mut shared = [0; 4];
    machine.memory().read(Gpa::new(OPEN), &mut shared).unwrap();
    assert_eq!(&shared, b"open");
    assert!(machine.destroy().is_clean());
}

#[test]
fn the_entry_gets_memory_c_bit_pages_of_the_firmware_and_a_stack() {
    // The registers of the entry are printed after the GHCB is set up.
    let keep: Part = |a| {
        for register in [rcx, rdx, rsi, rdi, r8, rsp] {
            a.push(register)?;
        }
        set_up(a)?;
        for register in [rbp, r8, rdi, rsi, r13, r12] {
            a.pop(register)?;
        }
        Ok(())
    };
    let main: Part = |a| {
        a.cmp(rdi, 16 << 20)?;
        print_if_equal(a, 'm')?;
        a.test(rsi, rsi)?;
        print_if_equal(a, 'i')?;
        a.cmp(r13, 51)?;
        print_if_equal(a, 'c')?;
        a.and(ebp, 15)?;
        // Five pushes below the place that RSP had.
        a.cmp(ebp, 0)?;
        print_if_equal(a, 's')?;
        // The version of the secrets page, and the number of CPUID leaves.
        for (page, letter) in [(r12, 'v'), (r8, 'p')] {
            a.mov(eax, dword_ptr(page))?;
            a.test(eax, eax)?;
            a.setne(al)?;
            a.cmp(al, 1)?;
            print_if_equal(a, letter)?;
        }
        a.ret()
    };
    prints(kernel_with(keep, main, &[]), "micsvp");
}

/// Prints the error code of #VC as two letters, and goes on behind an instruction of two bytes.
fn vc_code(a: &mut CodeAssembler) -> Assembled {
    a.push(rax)?;
    for shift in [4, 0] {
        a.mov(eax, dword_ptr(rsp + 8))?;
        a.shr(eax, shift)?;
        a.and(eax, 15)?;
        a.add(eax, i32::from(b'A'))?;
        a.call(PUTC)?;
    }
    a.pop(rax)?;
    a.add(rsp, 8)?;
    a.add(qword_ptr(rsp), 2)?;
    a.iretq()
}

#[test]
fn an_instruction_that_the_host_would_emulate_is_a_vc_with_its_exit_code() {
    let letters: String = [0x72, 0x7c, 0x7c, 0x89, 0x76]
        .iter()
        .flat_map(|code: &u8| [code >> 4, code & 15])
        .map(|digit| (b'A' + digit) as char)
        .collect();
    let main: Part = |a| {
        a.cpuid()?;
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.wrmsr()?;
        a.wbinvd()?;
        a.invd()?;
        a.ret()
    };
    prints(kernel(main, &[(VC, vc_code)]), &letters);
}

/// #VC of CPUID: asks the host, as the GHCB specification says.
fn cpuid_handler(a: &mut CodeAssembler) -> Assembled {
    a.mov(rbp, rax)?;
    ghcb(a)?;
    a.mov(qword_ptr(rbx + RAX), rbp)?;
    a.mov(qword_ptr(rbx + RCX), rcx)?;
    page_request(a, 0x72, [0, 0], &[RAX, RCX])?;
    a.mov(rcx, qword_ptr(rbx + RCX))?;
    a.mov(rdx, qword_ptr(rbx + RDX))?;
    a.mov(rax, qword_ptr(rbx + RAX))?;
    a.mov(rbx, qword_ptr(rbx + RBX))?;
    a.add(rsp, 8)?;
    a.add(qword_ptr(rsp), 2)?;
    a.iretq()
}

#[test]
fn cpuid_by_vc_and_the_ghcb_tells_the_vendor_and_the_encryption() {
    let main: Part = |a| {
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.cmp(ebx, 0x6874_7541)?;
        print_if_equal(a, 'v')?;
        a.mov(eax, 0x8000_001fu32)?;
        a.cpuid()?;
        a.mov(esi, ebx)?;
        // SEV, SEV-ES and SNP.
        a.cmp(eax, 0x1a)?;
        print_if_equal(a, 'e')?;
        a.and(esi, 0x3f)?;
        a.cmp(esi, 51)?;
        print_if_equal(a, 'c')?;
        // Status: all three, and no further features.
        a.mov(ecx, 0xc001_0131u32)?;
        a.rdmsr()?;
        a.cmp(eax, 7)?;
        print_if_equal(a, 's')?;
        // By the MSR protocol too: EBX of leaf 0.
        msr_request(a, 1 << 30 | 4)?;
        a.rdmsr()?;
        a.cmp(edx, 0x6874_7541)?;
        a.sete(bpl)?;
        set_up_es(a)?;
        a.cmp(bpl, 1)?;
        print_if_equal(a, 'm')?;
        a.ret()
    };
    prints(kernel(main, &[(VC, cpuid_handler)]), "vecsm");
}

#[test]
fn a_page_is_validated_once_and_a_touch_before_is_a_vc_with_its_address() {
    const PAGE: u64 = 0x50_0000;
    let handler: Part = |a| {
        a.push(rax)?;
        a.cmp(dword_ptr(rsp + 8), 0x404)?;
        print_if_equal(a, 'n')?;
        a.mov(rax, cr2)?;
        a.cmp(rax, (PAGE + 8) as i32)?;
        print_if_equal(a, 'a')?;
        a.push(rcx)?;
        a.push(rdx)?;
        pvalidate(a, PAGE, 1)?;
        a.setb(cl)?;
        a.or(cl, al)?;
        print_if_equal(a, 'v')?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.add(rsp, 8)?;
        a.iretq()
    };
    let main: Part = |a| {
        a.mov(rbp, PAGE)?;
        a.mov(qword_ptr(rbp + 8), 77)?;
        a.cmp(qword_ptr(rbp + 8), 77)?;
        print_if_equal(a, 'w')?;
        // The second time changes nothing, and the carry flag says so.
        pvalidate(a, PAGE, 1)?;
        a.setb(bpl)?;
        a.shl(eax, 1)?;
        a.or(bpl, al)?;
        a.cmp(bpl, 1)?;
        print_if_equal(a, '2')?;
        // A page of 2 MiB that the RMP has as one of 4 KiB: FAIL_SIZEMISMATCH.
        a.mov(eax, 0x60_0000)?;
        a.mov(ecx, 1)?;
        a.mov(edx, 1)?;
        a.pvalidate()?;
        a.cmp(eax, 6)?;
        print_if_equal(a, '6')?;
        // A size that does not exist: FAIL_INPUT.
        a.mov(eax, PAGE as u32)?;
        a.mov(ecx, 2)?;
        a.pvalidate()?;
        a.cmp(eax, 1)?;
        print_if_equal(a, '1')?;
        a.ret()
    };
    prints(kernel(main, &[(VC, handler)]), "navw261");
}

#[test]
fn a_page_that_the_guest_shares_is_the_hosts_to_read_and_write_and_comes_back() {
    const FIRST: u64 = 0x50_0000;
    let main: Part = |a| {
        // Three pages to shared, as one request of two entries and one; then the second comes back.
        ghcb(a)?;
        for (n, gpa) in [FIRST, FIRST + 0x1000, FIRST + 0x5000]
            .into_iter()
            .enumerate()
        {
            a.mov(rax, 2 << 52 | gpa)?;
            a.mov(qword_ptr(rbx + BUFFER + 8 + n as i32 * 8), rax)?;
        }
        a.mov(rax, 2u64 << 16)?;
        a.mov(qword_ptr(rbx + BUFFER), rax)?;
        a.mov(rax, GHCB + BUFFER as u64)?;
        a.mov(qword_ptr(rbx + SCRATCH), rax)?;
        page_request(a, 0x8000_0010, [0, 0], &[SCRATCH])?;
        a.mov(rax, qword_ptr(rbx + INFO_2))?;
        a.test(rax, rax)?;
        print_if_equal(a, 's')?;
        // The host says how far it came.
        ghcb(a)?;
        a.cmp(word_ptr(rbx + BUFFER), 3)?;
        print_if_equal(a, 'd')?;
        a.mov(rbp, SHARED + FIRST + 0x5000)?;
        a.mov(dword_ptr(rbp), 0x7261_6873)?;
        ghcb(a)?;
        a.mov(rax, 1 << 52 | (FIRST + 0x5000))?;
        a.mov(qword_ptr(rbx + BUFFER + 8), rax)?;
        a.mov(qword_ptr(rbx + BUFFER), 0)?;
        print(a, "!")?;
        ghcb(a)?;
        a.mov(rax, GHCB + BUFFER as u64)?;
        a.mov(qword_ptr(rbx + SCRATCH), rax)?;
        page_request(a, 0x8000_0010, [0, 0], &[SCRATCH])?;
        pvalidate(a, FIRST + 0x5000, 1)?;
        a.test(eax, eax)?;
        print_if_equal(a, 'p')?;
        a.ret()
    };
    let (host, console) = (SimHost::new(Vendor::Amd), ConsoleSink::capture());
    let mut machine = Machine::build(&host, config(kernel(main, &[]))).unwrap();
    let devices = machine.devices(console.clone());
    let seen = Mutex::new([0; 4]);
    let handler = |exit: &mut ExitContext<'_>| {
        if exit.data() == b"!" {
            let memory = exit.machine().memory();
            let at = Gpa::new(FIRST + 0x5000);
            memory.read(at, &mut *seen.lock().unwrap()).unwrap();
        }
        devices.handle(exit)
    };
    let report = machine.run(&handler, limits()).unwrap();
    assert_eq!(
        (console.text().as_str(), &report.end),
        ("sd!p", &End::Halted),
        "{report:?}"
    );
    assert_eq!(&*seen.lock().unwrap(), b"shar");
    // Two by the MSR protocol, two runs of pages, and the one that came back.
    assert_eq!(report.exits().of(ExitKind::MapGpaRange), 5);
    assert!(machine.destroy().is_clean());
}

/// The page for the answers of the firmware.
const ANSWER: u64 = 0x40_2000;

/// Shares the page for answers, and lends the guest's secrets page to the test, which has a cipher at hand and puts the
/// request in its place.
fn lend_secrets(a: &mut CodeAssembler) -> Assembled {
    msr_request(a, 2 << 52 | ANSWER | 0x014)?;
    set_up_es(a)?;
    a.mov(rdi, SHARED + OPEN)?;
    a.mov(esi, 0xffff_6000u32)?;
    a.mov(ecx, 0x1000)?;
    a.rep().movsb()?;
    print(a, "!")
}

/// Makes the request for a report of the guest that lent its secrets.
fn seal_request(exit: &mut ExitContext<'_>) -> GuestChannel {
    let (memory, at) = (exit.machine().memory(), Gpa::new(OPEN));
    let mut page = [0; 4096];
    memory.read(at, &mut page).unwrap();
    let asks = GuestChannel::from_secrets_page(&page, 0).unwrap();
    let request = asks.report_request(&[7; 64], 0).unwrap();
    memory.write(at, &request).unwrap();
    asks
}

/// The host's certificates come with the answer to an extended request, if the guest has room for them.
#[test]
fn certificates_come_with_a_report_and_too_few_pages_are_told_their_number() {
    const CERTIFICATES: u64 = 0x40_3000;
    let main: Part = |a| {
        for page in [CERTIFICATES, CERTIFICATES + 0x1000] {
            msr_request(a, 2 << 52 | page | 0x014)?;
        }
        lend_secrets(a)?;
        for (pages, number, mark) in [(1, 2, 'n'), (0, 2, 'n'), (2, 2, 'c')] {
            ghcb(a)?;
            a.mov(rax, CERTIFICATES)?;
            a.mov(qword_ptr(rbx + RAX), rax)?;
            a.mov(qword_ptr(rbx + RBX), pages)?;
            page_request(a, 0x8000_0012, [OPEN, ANSWER], &[RAX, RBX])?;
            // SW_EXITINFO2: 0, or the host's "invalid length".
            a.mov(rax, if pages == 2 { 0u64 } else { 1 << 32 })?;
            a.sub(rax, qword_ptr(rbx + INFO_2))?;
            a.mov(rcx, qword_ptr(rbx + RBX))?;
            a.lea(rax, ptr(rax + rcx))?;
            a.cmp(rax, number)?;
            print_if_equal(a, mark)?;
        }
        a.ret()
    };
    let table: Vec<u8> = (0..0x1100u32).map(|n| n as u8 ^ 0x5a).collect();
    let (host, console) = (SimHost::new(Vendor::Amd), ConsoleSink::capture());
    host.set_snp_certificates(table.clone());
    let mut machine = Machine::build(&host, config(kernel(main, &[]))).unwrap();
    let (report, mut channel) = run_sealing(&mut machine, &console);
    assert_eq!(console.text(), "!nnc", "{report:?}");
    let mut written = vec![0; table.len()];
    let memory = machine.memory();
    memory.read(Gpa::new(CERTIFICATES), &mut written).unwrap();
    assert!(written == table);
    // Refused requests did not get to the firmware: the first message is answered.
    let mut page = [0; 4096];
    memory.read(Gpa::new(ANSWER), &mut page).unwrap();
    assert_eq!(channel.open_report(&page).unwrap().0, 0);
}

/// Runs a machine whose guest prints `!` when its request is to be sealed. Returns the report and the channel of the request.
fn run_sealing(machine: &mut Machine<SimHost>, console: &ConsoleSink) -> (RunReport, GuestChannel) {
    let devices = machine.devices(console.clone());
    let channel = Mutex::new(None);
    let handler = |exit: &mut ExitContext<'_>| {
        if exit.data() == b"!" {
            *channel.lock().unwrap() = Some(seal_request(exit));
        }
        devices.handle(exit)
    };
    let report = machine.run(&handler, limits()).unwrap();
    (report, channel.into_inner().unwrap().unwrap())
}

#[test]
fn a_report_by_guest_request_verifies_and_has_the_measurement() {
    let main: Part = |a| {
        lend_secrets(a)?;
        ghcb(a)?;
        page_request(a, 0x8000_0011, [OPEN, ANSWER], &[])?;
        a.mov(rax, qword_ptr(rbx + INFO_2))?;
        a.test(rax, rax)?;
        print_if_equal(a, 'r')?;
        // The message a second time: its number is used up, and the firmware says so.
        ghcb(a)?;
        page_request(a, 0x8000_0011, [OPEN, OPEN], &[])?;
        a.cmp(qword_ptr(rbx + INFO_1), 2)?;
        print_if_equal(a, 'm')?;
        a.ret()
    };
    let (host, console) = (SimHost::new(Vendor::Amd), ConsoleSink::capture());
    let mut machine = Machine::build(&host, config(kernel(main, &[]))).unwrap();
    let measurement = machine.vm().measurement().unwrap();
    let (report, mut channel) = run_sealing(&mut machine, &console);
    assert_eq!(
        (console.text().as_str(), &report.end),
        ("!rm", &End::Halted),
        "{report:?}"
    );
    let mut page = [0; 4096];
    machine.memory().read(Gpa::new(ANSWER), &mut page).unwrap();
    let (status, report) = channel.open_report(&page).unwrap();
    assert_eq!(status, 0);
    let platform = host.sev_platform().unwrap();
    let root = RootOfTrust::default().ark();
    let report = verify_report(&report, &platform.cert_chain(), &root).unwrap();
    assert_eq!(report.report_data, [7; 64]);
    assert_eq!(report.measurement[..], *measurement.bytes());
    assert!(machine.destroy().is_clean());
}

#[test]
fn a_device_is_a_vc_whose_handler_asks_by_the_ghcb() {
    const DEVICE: u64 = 0xfec0_0010;
    let handler: Part = |a| {
        a.cmp(dword_ptr(rsp), 0x400)?;
        print_if_equal(a, 'v')?;
        ghcb(a)?;
        a.mov(rax, GHCB + BUFFER as u64)?;
        a.mov(qword_ptr(rbx + SCRATCH), rax)?;
        a.mov(dword_ptr(rbx + BUFFER), 0x1234_5678)?;
        page_request(a, 0x8000_0002, [DEVICE, 4], &[SCRATCH])?;
        print(a, "w")?;
        ghcb(a)?;
        a.mov(rax, GHCB + BUFFER as u64)?;
        a.mov(qword_ptr(rbx + SCRATCH), rax)?;
        page_request(a, 0x8000_0001, [DEVICE, 4], &[SCRATCH])?;
        a.mov(eax, dword_ptr(rbx + BUFFER))?;
        a.cmp(eax, 0x5566_7788)?;
        print_if_equal(a, 'r')?;
        a.add(rsp, 8)?;
        a.add(qword_ptr(rsp), 3)?;
        a.iretq()
    };
    let main: Part = |a| {
        a.mov(rbp, SHARED + DEVICE)?;
        a.mov(dword_ptr(rbp), eax)?; // 3 bytes
        a.ret()
    };
    let (host, console) = (SimHost::new(Vendor::Amd), ConsoleSink::capture());
    let mut machine = Machine::build(&host, config(kernel(main, &[(VC, handler)]))).unwrap();
    let devices = machine.devices(console.clone());
    let written = Mutex::new(Vec::new());
    let handler = |exit: &mut ExitContext<'_>| match exit.exit() {
        kvm_ops::Exit::MmioWrite { gpa, .. } if gpa.get() == DEVICE => {
            *written.lock().unwrap() = exit.data().to_vec();
            kvm_ops_machine::Flow::Continue
        }
        kvm_ops::Exit::MmioRead { gpa, .. } if gpa.get() == DEVICE => {
            exit.data().copy_from_slice(&0x5566_7788u32.to_le_bytes());
            kvm_ops_machine::Flow::Continue
        }
        _ => devices.handle(exit),
    };
    let report = machine.run(&handler, limits()).unwrap();
    assert_eq!(
        (console.text().as_str(), &report.end),
        ("vwr", &End::Halted),
        "{report:?}"
    );
    assert_eq!(*written.lock().unwrap(), 0x1234_5678u32.to_le_bytes());
    assert!(machine.destroy().is_clean());
}

#[test]
fn requests_that_are_wrong_are_answered_as_malformed_and_hurt_nothing() {
    let main: Part = |a| {
        // Code, reason: no such event, missing field, bad port size, scratch outside of the page.
        for (code, info, fields, reason) in [
            (0x8000_7777_u32, [0, 0], &[][..], b'6'),
            (0x72, [0, 0], &[][..], b'4'),
            (0x7b, [0x3f8 << 16 | 7 << 4, 0], &[RAX][..], b'5'),
            (0x8000_0001, [0xfec0_0000, 4], &[][..], b'3'),
            (0x8000_0001, [0xfec0_0ffe, 4], &[][..], b'5'),
            (0x8000_0013, [1 | 9 << 32, 0x50_0000], &[RAX][..], b'5'),
            (0x8000_0011, [OPEN, OPEN], &[][..], b'5'),
        ] {
            ghcb(a)?;
            page_request(a, code, info, fields)?;
            a.cmp(qword_ptr(rbx + INFO_1), 2)?;
            a.mov(rbp, qword_ptr(rbx + INFO_2))?;
            print_if_equal(a, reason as char)?;
            a.cmp(rbp, i32::from(reason - b'0'))?;
            print_if_equal(a, '.')?;
        }
        // An MSR that does not exist: the host asks for #GP.
        ghcb(a)?;
        a.mov(qword_ptr(rbx + RCX), 0x1234)?;
        page_request(a, 0x7c, [0, 0], &[RCX])?;
        a.cmp(qword_ptr(rbx + INFO_1), 1)?;
        print_if_equal(a, 'g')?;
        a.ret()
    };
    prints(kernel(main, &[]), "6.4.5.3.5.5.5.g");
}

#[test]
fn a_guest_that_terminates_itself_ends_the_machine_with_its_reason() {
    let main: Part = |a| {
        print(a, "t")?;
        msr_request(a, 0x1_2000 | 0x100)
    };
    let (report, text) = run_on(&SimHost::new(Vendor::Amd), config(kernel(main, &[])));
    assert_eq!((text.as_str(), &report.end), ("t", &End::SystemEvent(6)));
}

#[test]
fn a_ghcb_that_was_not_registered_ends_the_run() {
    let main: Part = |a| {
        print(a, "r")?;
        a.mov(ecx, GHCB_MSR)?;
        a.mov(eax, OPEN as u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.vmgexit()
    };
    let (report, text) = run_on(&SimHost::new(Vendor::Amd), config(kernel(main, &[])));
    assert_eq!(text, "r");
    let refused = Error::Invalid(kvm_ops::Field::Gpa, OPEN);
    assert_eq!(report.end, End::Failed(refused), "{report:?}");
}

/// The save area of a second vCPU, and its code: that of the first handler.
const VMSA: u64 = 0x20_4000;
const CODE_OF_AP: u64 = HANDLERS;

/// Creates the second vCPU, with 0x55 in RCX. Prints `ac`.
fn create_other(a: &mut CodeAssembler) -> Assembled {
    // A save area in 64-bit mode: what is not written stays zero.
    a.mov(ebp, VMSA as u32)?;
    for (at, low, high) in [
        (0x00, 0x0c93_0018_u32, 0xffff_ffff_u32),
        (0x10, 0x0a9b_0010, 0xffff_ffff),
        (0x20, 0x0c93_0018, 0xffff_ffff),
        (0x30, 0x0c93_0018, 0xffff_ffff),
        (0x60, 0, 0x1f),
        (0x68, 0xffff_f800, 0),
        (0xd0, 0x1d00, 0),
        (0x148, 0x620, 0),
        (0x150, 0xffff_c000, 1 << 19),
        (0x158, 0x8000_0033, 0),
        (0x170, 2, 0),
        (0x178, CODE_OF_AP as u32, 0),
        (0x268, 0x0007_0406, 0x0007_0406),
        (0x308, 0x55, 0),
        (0x3b0, 1, 0),
        (0x3e8, 1, 0),
        (0x408, 0x1f80, 0),
    ] {
        a.mov(dword_ptr(rbp + at), low)?;
        a.mov(dword_ptr(rbp + at + 4), high)?;
    }
    // RMPADJUST: the page is a save area. Its permissions are for VMPL1.
    a.mov(eax, VMSA as u32)?;
    a.xor(ecx, ecx)?;
    a.mov(edx, 1 << 16 | 1)?;
    a.rmpadjust()?;
    a.test(eax, eax)?;
    print_if_equal(a, 'a')?;
    ghcb(a)?;
    a.mov(qword_ptr(rbx + RAX), 1)?;
    page_request(a, 0x8000_0013, [1 | 1 << 32, VMSA], &[RAX])?;
    a.mov(rax, qword_ptr(rbx + INFO_1))?;
    a.test(eax, eax)?;
    print_if_equal(a, 'c')
}

/// Machines whose vCPUs take turns, and whose vCPUs execute at the same time.
fn hosts() -> [SimHost; 2] {
    [SimHost::new(Vendor::Amd), at_the_same_time()]
}

fn at_the_same_time() -> SimHost {
    SimHost::builder(Vendor::Amd).parallel(true).build_lazy()
}

#[test]
fn a_vcpu_that_the_guest_creates_runs_from_its_save_area_until_it_is_destroyed() {
    const FLAG: u64 = DATA + 0x100;
    let main: Part = |a| {
        create_other(a)?;
        a.mov(ebp, FLAG as u32)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rbp), 0x55)?;
        a.jne(wait)?;
        print(a, "f")?;
        ghcb(a)?;
        page_request(a, 0x8000_0013, [2 | 1 << 32, VMSA], &[RAX])?;
        print(a, "d")?;
        msr_request(a, 0x100)
    };
    // The other vCPU: its RCX comes from the save area.
    let other: Part = |a| {
        a.mov(ebp, FLAG as u32)?;
        a.mov(dword_ptr(rbp), ecx)?;
        pause_for_good(a)
    };
    for host in hosts() {
        let config = config(kernel(main, &[(VC, other)]))
            .vcpus(2)
            .irqchip(Irqchip::Split);
        let (report, text) = run_on(&host, config);
        assert_eq!(text, "acfd", "{report:?}");
        assert_eq!(report.end, End::SystemEvent(6));
    }
}

/// Data of kernels with two vCPUs: a count of vCPUs, and two counters, of which one lies across two pages.
const READY: u64 = DATA + 0x10;
const COUNTER: u64 = DATA + 0x80;
const ACROSS: u64 = DATA - 4;
/// What each vCPU counts.
const ROUNDS: u32 = 20_000;
/// How often it stops the other one.
const SLOW_ROUNDS: u32 = 100;

/// Waits until the count of vCPUs has a value.
fn wait_ready(a: &mut CodeAssembler, value: i32) -> Assembled {
    let mut waiting = a.create_label();
    let mut done = a.create_label();
    a.nop()?;
    a.set_label(&mut waiting)?;
    a.cmp(qword_ptr(READY), value)?;
    a.je(done)?;
    a.pause()?;
    a.jmp(waiting)?;
    a.set_label(&mut done)?;
    a.nop()
}

/// Waits for the other vCPU, and counts with it.
fn count_together(a: &mut CodeAssembler) -> Assembled {
    a.lock().inc(qword_ptr(READY))?;
    wait_ready(a, 2)?;
    for (counter, rounds) in [(COUNTER, ROUNDS), (ACROSS, SLOW_ROUNDS)] {
        let mut next = a.create_label();
        a.mov(ebp, rounds)?;
        a.set_label(&mut next)?;
        a.lock().add(qword_ptr(counter), 1)?;
        a.dec(ebp)?;
        a.jnz(next)?;
    }
    a.lock().inc(qword_ptr(READY))
}

#[test]
fn locked_instructions_of_two_vcpus_add_up_in_turns_and_at_the_same_time() {
    let main: Part = |a| {
        create_other(a)?;
        count_together(a)?;
        wait_ready(a, 4)?;
        for (counter, rounds, yes) in [(COUNTER, ROUNDS, 'l'), (ACROSS, SLOW_ROUNDS, 'x')] {
            a.cmp(qword_ptr(counter), 2 * rounds as i32)?;
            print_if_equal(a, yes)?;
        }
        msr_request(a, 0x100)
    };
    let other: Part = |a| {
        count_together(a)?;
        pause_for_good(a)
    };
    for host in hosts() {
        let config = config(kernel(main, &[(VC, other)]))
            .vcpus(2)
            .irqchip(Irqchip::Split);
        let (report, text) = run_on(&host, config);
        assert_eq!(text, "aclx", "{report:?}");
        assert_eq!(report.end, End::SystemEvent(6));
    }
}

/// Runs two vCPUs that count for ever at the same time. The host does something with the page when the guest prints an
/// exclamation mark.
fn while_two_count(attack: impl Fn(&Platform, u64) + Sync, limits: RunLimits) -> RunReport {
    fn count(a: &mut CodeAssembler) -> Assembled {
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        a.lock().inc(qword_ptr(COUNTER))?;
        a.jmp(next)
    }
    let main: Part = |a| {
        let mut early = a.create_label();
        create_other(a)?;
        a.set_label(&mut early)?;
        a.cmp(qword_ptr(COUNTER), 1000)?;
        a.jb(early)?;
        print(a, "!")?;
        count(a)
    };
    let host = at_the_same_time();
    let config = config(kernel(main, &[(VC, count)]))
        .vcpus(2)
        .irqchip(Irqchip::Split);
    let mut machine = Machine::build(&host, config).unwrap();
    let (platform, page) = (host.sev_platform().unwrap(), frame_at(&machine, DATA));
    let devices = machine.devices(ConsoleSink::discard());
    let handler = |exit: &mut ExitContext<'_>| {
        if exit.data() == b"!" {
            attack(platform, page);
        }
        devices.handle(exit)
    };
    let report = machine.run(&handler, limits).unwrap();
    let freed = machine.destroy();
    assert!(freed.leaks.len() <= 1, "{freed:?}");
    report
}

#[test]
fn what_a_host_does_to_a_page_that_two_vcpus_use_has_the_end_it_has_in_turns() {
    // It reads, and is kept from writing: the vCPUs go on to the deadline.
    let report = while_two_count(
        |platform, page| {
            for _ in 0..50 {
                platform.host_read(page, &mut [0; 4096]).unwrap();
                platform.host_write(page, &[0]).unwrap_err();
            }
        },
        RunLimits::none().deadline(Duration::from_millis(500)),
    );
    assert_eq!(report.end, End::Deadline, "{report:?}");
    // The RMP entry goes: whoever touches the page next does not get there.
    let taken = |platform: &Platform, page: u64| {
        platform.rmpupdate(page, &RmpUpdate::shared()).unwrap();
    };
    let report = while_two_count(taken, limits());
    let end = End::MemoryFault {
        gpa: Gpa::new(DATA),
        access: Privacy::Private,
    };
    assert_eq!(report.end, end, "{report:?}");
}

/// The page that a machine's guest has at a private address.
fn frame_at(machine: &Machine<SimHost>, gpa: u64) -> u64 {
    let AnyVm::Amd(AmdVm::Sev(vm)) = machine.vm().back_end() else {
        panic!("{machine:?}");
    };
    vm.page_of(Gfn::containing(Gpa::new(gpa))).unwrap().get() << 12
}

/// A machine whose host does something with the page of DATA when the guest prints an exclamation mark.
fn under_attack(
    tech: Tech,
    main: Part,
    mut attack: impl FnMut(&Platform, u64) + Send,
) -> (RunReport, String) {
    let first = match tech {
        Tech::SevSnp => set_up as Part,
        _ => set_up_es as Part,
    };
    let (host, console) = (SimHost::new(Vendor::Amd), ConsoleSink::capture());
    let image = kernel_with(first, main, &[]);
    let mut machine = Machine::build(&host, config_of(tech, image)).unwrap();
    let (platform, page) = (host.sev_platform().unwrap(), frame_at(&machine, DATA));
    let devices = machine.devices(console.clone());
    let attack = Mutex::new(&mut attack);
    let handler = |exit: &mut ExitContext<'_>| {
        if exit.data() == b"!" {
            attack.lock().unwrap()(platform, page);
        }
        devices.handle(exit)
    };
    let report = machine.run(&handler, limits()).unwrap();
    let freed = machine.destroy();
    assert!(freed.leaks.len() <= 1, "{freed:?}");
    (report, console.text())
}

/// Writes 0x55 bytes to the third line of the data's page, lets the host act, reads the first line and then the third.
fn write_and_read(a: &mut CodeAssembler) -> Assembled {
    a.mov(ebp, DATA as u32)?;
    a.mov(rax, 0x5555_5555_5555_5555u64)?;
    a.mov(qword_ptr(rbp + 128), rax)?;
    print(a, "!")?;
    a.cmp(qword_ptr(rbp), 0)?;
    print_if_equal(a, '1')?;
    a.mov(rcx, 0x5555_5555_5555_5555u64)?;
    a.cmp(qword_ptr(rbp + 128), rcx)?;
    print_if_equal(a, '3')?;
    a.ret()
}

#[test]
fn a_host_that_reads_a_private_page_gets_ciphertext_and_hurts_nothing() {
    for tech in [Tech::SevEs, Tech::SevSnp] {
        let (report, text) = under_attack(tech, write_and_read, |platform, page| {
            let mut line = [0; 64];
            platform.host_read(page + 128, &mut line).unwrap();
            assert!(
                !line
                    .windows(8)
                    .any(|bytes| bytes == [0x55; 8] || bytes == [0; 8])
            );
        });
        assert_eq!(
            (text.as_str(), &report.end),
            ("!13", &End::Halted),
            "{report:?}"
        );
    }
}

#[test]
fn the_rmp_keeps_the_host_from_writing_an_snp_guests_page() {
    let (report, text) = under_attack(Tech::SevSnp, write_and_read, |platform, page| {
        platform.host_write(page + 130, &[0]).unwrap_err();
    });
    assert_eq!(
        (text.as_str(), &report.end),
        ("!13", &End::Halted),
        "{report:?}"
    );
}

#[test]
fn what_a_host_writes_into_a_page_of_a_guest_without_snp_is_noise_to_it_but_an_old_line_is_not() {
    let garbled = under_attack(Tech::SevEs, write_and_read, |platform, page| {
        platform.host_write(page + 130, &[0; 4]).unwrap();
    });
    assert_eq!((garbled.1.as_str(), &garbled.0.end), ("!1?", &End::Halted));
    // SEV-ES has no integrity: a line of the same place that the host kept is as good as new.
    let replays: Part = |a| {
        a.mov(ebp, DATA as u32)?;
        a.mov(qword_ptr(rbp + 128), 1)?;
        print(a, "!")?;
        a.mov(qword_ptr(rbp + 128), 2)?;
        print(a, "!")?;
        a.cmp(qword_ptr(rbp + 128), 1)?;
        print_if_equal(a, 'r')?;
        a.ret()
    };
    let mut kept: Option<[u8; 16]> = None;
    let (report, text) = under_attack(Tech::SevEs, replays, |platform, page| {
        let mut line = [0; 16];
        match kept {
            Some(old) => platform.host_write(page + 128, &old).unwrap(),
            None => {
                platform.host_read(page + 128, &mut line).unwrap();
                kept = Some(line);
            }
        }
    });
    assert_eq!(
        (text.as_str(), &report.end),
        ("!!r", &End::Halted),
        "{report:?}"
    );
}

#[test]
fn an_snp_page_that_the_host_takes_or_gives_again_is_never_used_unseen() {
    // The RMP entry goes: the guest's next touch does not get there.
    let (report, text) = under_attack(Tech::SevSnp, write_and_read, |platform, page| {
        platform.rmpupdate(page, &RmpUpdate::shared()).unwrap();
    });
    assert_eq!(text, "!", "{report:?}");
    let end = End::MemoryFault {
        gpa: Gpa::new(DATA),
        access: Privacy::Private,
    };
    assert_eq!(report.end, end, "{report:?}");
    // It is assigned again: not validated, which is #VC, and this guest has no handler.
    let (report, text) = under_attack(Tech::SevSnp, write_and_read, |platform, page| {
        let entry = platform.rmpread(page).unwrap();
        platform.rmpupdate(page, &RmpUpdate::shared()).unwrap();
        platform.host_write(page, &[0; 4096]).unwrap();
        let again = RmpUpdate::guest(entry.asid, entry.gpa);
        platform.rmpupdate(page, &again).unwrap();
    });
    assert_eq!(
        (text.as_str(), &report.end),
        ("!", &End::TripleFault),
        "{report:?}"
    );
}

/// The contents of each page of the platform's memory.
fn pages(platform: &Platform) -> Vec<[u8; 4096]> {
    let read = |spa| {
        let mut page = [0; 4096];
        platform.host_read(spa, &mut page).unwrap();
        page
    };
    (0..platform.memory_len()).step_by(4096).map(read).collect()
}

#[test]
fn register_state_that_the_host_changed_is_not_loaded_and_the_rmp_keeps_snps_from_it() {
    for (tech, first) in [
        (Tech::SevEs, set_up_es as Part),
        (Tech::SevSnp, set_up as Part),
    ] {
        let main: Part = |a| {
            print(a, "!")?;
            a.mov(r15d, 1)?;
            print(a, "!")?;
            print(a, ".")?;
            a.ret()
        };
        let small = Platform::builder().memory(64 << 20);
        let host = SimHost::builder(Vendor::Amd).sev(small).build().unwrap();
        let console = ConsoleSink::capture();
        let image = kernel_with(first, main, &[]);
        let mut machine = Machine::build(&host, config_of(tech, image)).unwrap();
        let platform = host.sev_platform().unwrap();
        // The guest's own pages: the image, and those below 4 GiB.
        let own: Vec<u64> = (0x200..0x205)
            .chain(0xf_fff6..0x10_0000)
            .filter_map(|gfn| {
                let AnyVm::Amd(AmdVm::Sev(vm)) = machine.vm().back_end() else {
                    panic!("{machine:?}");
                };
                Some(vm.page_of(Gfn::new(gfn))?.get())
            })
            .collect();
        let devices = machine.devices(console.clone());
        let before = Mutex::new(Vec::new());
        let handler = |exit: &mut ExitContext<'_>| {
            let mut before = before.lock().unwrap();
            if exit.data() == b"!" && before.is_empty() {
                *before = pages(platform);
            } else if exit.data() == b"!" {
                // Of all pages but the guest's, the save area alone changed.
                let now = pages(platform);
                let changed: Vec<u64> = (0..now.len())
                    .filter(|n| now[*n] != before[*n] && !own.contains(&(*n as u64)))
                    .map(|n| n as u64 * 4096)
                    .collect();
                assert_eq!(changed.len(), 1, "{changed:x?}");
                // R15.
                let written = platform.host_write(changed[0] + 0x378, &[9]);
                assert_eq!(written.is_ok(), tech == Tech::SevEs);
            }
            devices.handle(exit)
        };
        let report = machine.run(&handler, limits()).unwrap();
        let expected = match tech {
            Tech::SevEs => ("!!", End::FailEntry(u64::MAX)),
            _ => ("!!.", End::Halted),
        };
        assert_eq!(
            (console.text().as_str(), report.end.clone()),
            expected,
            "{report:?}"
        );
        assert!(machine.destroy().is_clean());
    }
}

#[test]
fn a_triple_fault_ends_the_machine_as_one() {
    let main: Part = |a| {
        print(a, "up")?;
        a.ud2()
    };
    let (report, text) = run_on(&SimHost::new(Vendor::Amd), config(kernel(main, &[])));
    assert_eq!((text.as_str(), &report.end), ("up", &End::TripleFault));
    assert!(report.is_failure());
}

#[test]
fn the_host_sees_no_registers_once_they_are_encrypted() {
    let host = SimHost::new(Vendor::Amd);
    let main: Part = |a| a.ret();
    for tech in [Tech::SevEs, Tech::SevSnp] {
        let machine = Machine::build(&host, config_of(tech, kernel(main, &[]))).unwrap();
        let vcpu = machine.vcpu(VcpuId(0)).unwrap();
        let refused = kvm_ops::VcpuOps::regs(vcpu).unwrap_err();
        assert!(matches!(refused, Error::Protected(_)), "{refused}");
    }
}

#[test]
fn two_runs_are_equal_to_the_instruction() {
    // Half a million loops, so that turns end in the middle.
    let main: Part = |a| {
        a.mov(ebp, 500_000)?;
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        a.dec(ebp)?;
        a.jnz(next)?;
        a.rdtsc()?;
        a.mov(ebp, eax)?;
        for shift in [0, 4, 8, 12, 16, 20] {
            a.mov(eax, ebp)?;
            a.shr(eax, shift)?;
            a.and(eax, 15)?;
            a.add(eax, i32::from(b'A'))?;
            a.call(PUTC)?;
        }
        a.ret()
    };
    let run = || {
        let host = SimHost::new(Vendor::Amd);
        let (report, text) = run_on(&host, config(kernel(main, &[])));
        assert_eq!(report.end, End::Halted);
        (host.instructions(), text, report.exits())
    };
    let first = run();
    assert!(first.0 > 1_000_000, "{first:?}");
    assert_eq!(first, run());
}

#[test]
fn the_measurement_is_that_of_the_image_and_of_the_start() {
    let measure = |image, vcpus| {
        let host = SimHost::new(Vendor::Amd);
        let machine = Machine::build(&host, config(image).vcpus(vcpus)).unwrap();
        machine.vm().measurement().unwrap()
    };
    let prints_a: Part = |a| print(a, "a");
    let prints_b: Part = |a| print(a, "b");
    let a = measure(kernel(prints_a, &[]), 1);
    assert_eq!(a, measure(kernel(prints_a, &[]), 1));
    assert_ne!(a, measure(kernel(prints_b, &[]), 1));
    assert_ne!(a, measure(kernel(prints_a, &[]), 2));
}

#[test]
fn an_image_that_is_no_program_of_64_bits_starts_no_guest() {
    let host = SimHost::new(Vendor::Amd);
    let short = || Image::from_bytes("short", elf(false, MAIN, MAIN, &[0xf4], 1));
    for tech in [Tech::Sev, Tech::SevEs, Tech::SevSnp] {
        for image in [short(), Image::flat("flat", [0xf4])] {
            let error = Machine::build(&host, config_of(tech, image)).unwrap_err();
            assert!(
                matches!(error, MachineError::NotLaunchable { .. }),
                "{error}"
            );
        }
    }
    assert_eq!(host.live_vms(), 0);
}
