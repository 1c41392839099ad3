//! Small kernels in trust domains: machine code that makes TDCALLs and handles #VE, on the software platform.
#![cfg(target_arch = "x86_64")]

mod support;
#[path = "support/td_kernel.rs"]
mod td_kernel;

use std::sync::Mutex;

use iced_x86::code_asm::*;
use kvm_ops::sim::SimHost;
use kvm_ops::{EncParams, ExitKind, Gpa, Gpaw, Irqchip, Kind, TdParams, Tech, VcpuId, Vendor};
use kvm_ops_machine::{
    ConsoleSink, End, ExitContext, ExitHandler, Image, Machine, MachineConfig, MachineError,
    RunReport,
};
use soft_tdx_module::Platform;
use support::limits;
use support::samples::elf;
use td_kernel::*;

fn config(image: Image) -> MachineConfig {
    let config = MachineConfig::new().kind(Kind::Of(Tech::Tdx));
    config.memory(16 << 20).image(image)
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
    let (report, text) = run_on(&SimHost::new(Vendor::Intel), config(image));
    assert_eq!(text, expected, "{report:?}");
    assert_eq!(report.end, End::Halted, "{report:?}");
}

#[test]
fn a_kernel_prints_by_tdvmcall_and_its_return_halts_the_machine() {
    let image = kernel(
        |a| {
            print(a, "hello from a TD")?;
            a.ret()
        },
        &[],
    );
    prints(image, "hello from a TD");
}

#[test]
fn a_kernel_goes_on_with_registers_and_memory_where_its_td_moved() {
    let image = kernel(
        |a| {
            time(a)?;
            a.mov(qword_ptr(DATA + 8), rax)?;
            a.mov(rbx, 0x1234_5678_9abc_def0u64)?;
            a.mov(qword_ptr(DATA), rbx)?;
            print(a, "here, ")?;
            a.mov(rdx, 0x1234_5678_9abc_def0u64)?;
            a.cmp(rbx, rdx)?;
            print_if_equal(a, 'r')?;
            a.cmp(qword_ptr(DATA), rbx)?;
            print_if_equal(a, 'm')?;
            // Time goes on, too: the sign of the difference.
            time(a)?;
            a.sub(rax, qword_ptr(DATA + 8))?;
            a.shr(rax, 63)?;
            print_if_equal(a, 't')?;
            print(a, " there")?;
            a.ret()
        },
        &[],
    );
    for host in hosts() {
        moves(&host, image.clone());
    }
}

/// Moves a TD while its kernel prints.
fn moves(host: &SimHost, image: Image) {
    let console = ConsoleSink::capture();
    let mut machine = Machine::build(host, config(image)).unwrap();
    for exits in [6, 2] {
        let room = MachineConfig::new()
            .kind(Kind::Of(Tech::Tdx))
            .memory(16 << 20);
        let mut to = Machine::build(host, room.awaits_guest(true)).unwrap();
        let report = machine.run(&machine.devices(console.clone()), limits().max_exits(exits));
        assert_eq!(report.unwrap().end, End::ExitLimit);
        machine.move_to(&mut to).unwrap();
        // The source is gone before its guest runs on.
        assert!(std::mem::replace(&mut machine, to).destroy().is_clean());
    }
    let report = machine
        .run(&machine.devices(console.clone()), limits())
        .unwrap();
    assert_eq!(report.end, End::Halted, "{report:?}");
    assert_eq!(console.text(), "here, rmt there");
    assert!(machine.destroy().is_clean());
}

#[test]
fn the_entry_gets_memory_size_vcpu_width_and_a_stack() {
    for (gpaw, width) in [(Gpaw::Bits48, 48), (Gpaw::Bits52, 52)] {
        assert!(matches!(width, 48 | 52));
        let main: Part = |a| {
            a.cmp(rdi, 16 << 20)?;
            print_if_equal(a, 'm')?;
            a.cmp(rsi, 0)?;
            print_if_equal(a, 'i')?;
            a.mov(rax, rdx)?;
            a.and(eax, !4)?;
            a.cmp(eax, 48)?;
            print_if_equal(a, 'w')?;
            // The two views of memory: private, and from 0xffff8000_00000000 on shared.
            a.mov(eax, u32::from(b'0'))?;
            a.sub(edx, 48)?;
            a.add(eax, edx)?;
            a.call(PUTC)?;
            a.mov(rax, rsp)?;
            a.and(eax, 15)?;
            a.cmp(eax, 8)?;
            print_if_equal(a, 's')?;
            a.ret()
        };
        let params = TdParams {
            gpaw,
            ..TdParams::default()
        };
        let config = config(kernel(main, &[])).enc(EncParams::Td(Box::new(params)));
        let (report, text) = run_on(&SimHost::new(Vendor::Intel), config);
        assert_eq!(text, format!("miw{}s", width - 48), "{report:?}");
    }
}

/// Prints "ports" by OUT.
fn out_ports(a: &mut CodeAssembler) -> Assembled {
    a.mov(edx, 0x3f8)?;
    for byte in b"ports" {
        a.mov(al, u32::from(*byte))?;
        a.out(dx, al)?;
    }
    a.ret()
}

#[test]
fn an_instruction_that_the_host_emulates_is_a_ve_with_its_information() {
    prints(kernel(out_ports, &[(VE, port_handler)]), "ports");
}

#[test]
fn ve_information_names_reason_and_length_of_each_instruction() {
    // The handler prints the reason as a letter, and goes on behind the instruction.
    let handler: Part = |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.mov(eax, VEINFO_GET)?;
        a.tdcall()?;
        a.add(qword_ptr(rsp + 16), r10)?;
        a.lea(eax, ptr(rcx + u64::from(b'0') as i32))?;
        a.call(PUTC)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    };
    let main: Part = |a| {
        a.hlt()?; // 12
        a.wbinvd()?; // 54
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?; // 31
        a.mov(ecx, 0x830)?;
        a.wrmsr()?; // 32
        a.vmcall()?; // 18
        a.mov(eax, 0x4000_0000)?;
        a.cpuid()?; // 10
        a.ret()
    };
    let letters: String = [12, 54, 31, 32, 18, 10]
        .map(|reason| (b'0' + reason) as char)
        .iter()
        .collect();
    prints(kernel(main, &[(VE, handler)]), &letters);
}

#[test]
fn cpuid_and_msrs_that_the_module_virtualises_need_no_handler() {
    let main: Part = |a| {
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.cmp(ebx, 0x756e_6547)?;
        print_if_equal(a, 'v')?;
        // The module's leaf: "IntelTDX    ".
        a.mov(eax, 0x21)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.cmp(edx, 0x5865_746e)?; // EBX "Inte", EDX "lTDX", ECX spaces
        a.cmp(ecx, 0x2020_2020)?;
        print_if_equal(a, 't')?;
        // IA32_MISC_ENABLE is completed by the module, IA32_LSTAR by the processor.
        a.mov(ecx, 0x1a0)?;
        a.rdmsr()?;
        a.and(eax, 1 << 12)?;
        a.cmp(eax, 1 << 12)?;
        print_if_equal(a, 'e')?;
        a.mov(ecx, 0xc000_0082u32)?;
        a.mov(eax, 0x1234_5678)?;
        a.mov(edx, 0x7fff)?;
        a.wrmsr()?;
        a.xor(eax, eax)?;
        a.rdmsr()?;
        a.cmp(eax, 0x1234_5678)?;
        print_if_equal(a, 'l')?;
        // System calls can be enabled, and long mode stays on.
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.and(eax, 0xd01)?;
        a.cmp(eax, 0xd01)?;
        print_if_equal(a, 'x')?;
        // CR4.VMXE is the module's, and reads as 0; MCE reads as 1.
        a.mov(rax, cr4)?;
        a.and(eax, 0x2040)?;
        a.cmp(eax, 0x40)?;
        print_if_equal(a, '4')?;
        a.mov(rax, cr4)?;
        a.or(eax, 1 << 18)?; // OSXSAVE
        a.mov(cr4, rax)?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 3)?;
        a.xsetbv()?;
        a.xgetbv()?;
        a.cmp(eax, 3)?;
        print_if_equal(a, 'b')?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.and(ecx, 1 << 27)?;
        a.cmp(ecx, 1 << 27)?;
        print_if_equal(a, 'o')?;
        a.ret()
    };
    prints(kernel(main, &[]), "vtelx4bo");
}

#[test]
fn memory_beyond_the_image_is_accepted_by_the_guest() {
    const PAGE: u64 = 0x40_0000;
    let main: Part = |a| {
        a.mov(eax, ACCEPT)?;
        a.mov(ecx, PAGE as u32)?;
        a.tdcall()?;
        a.test(rax, rax)?;
        print_if_equal(a, 'a')?;
        a.mov(ebx, PAGE as u32)?;
        a.cmp(qword_ptr(rbx + 0x800), 0)?;
        print_if_equal(a, 'z')?;
        a.mov(qword_ptr(rbx + 0x800), 77)?;
        a.cmp(qword_ptr(rbx + 0x800), 77)?;
        print_if_equal(a, 'w')?;
        // A second time: TDX_PAGE_ALREADY_ACCEPTED.
        a.mov(eax, ACCEPT)?;
        a.mov(ecx, PAGE as u32)?;
        a.tdcall()?;
        a.shr(rax, 32)?;
        a.cmp(eax, 0x0b0a)?;
        print_if_equal(a, '2')?;
        a.ret()
    };
    prints(kernel(main, &[]), "azw2");
}

#[test]
fn a_page_that_the_guest_shares_is_the_hosts_to_read_and_write() {
    const PAGE: u64 = 0x50_0000;
    let main: Part = |a| {
        a.mov(r12, PAGE | SHARED)?;
        a.mov(r13d, 0x1000)?;
        vmcall(a, MAP_GPA)?;
        a.test(r10, r10)?;
        print_if_equal(a, 'c')?;
        // The start maps shared memory from the middle of the address space on.
        a.mov(rbx, 0xffff_8000_0000_0000u64 + PAGE)?;
        a.mov(dword_ptr(rbx), 0x7261_6873)?;
        print(a, "s")?;
        a.ret()
    };
    let host = SimHost::new(Vendor::Intel);
    let console = ConsoleSink::capture();
    let mut machine = Machine::build(&host, config(kernel(main, &[]))).unwrap();
    let report = machine
        .run(&machine.devices(console.clone()), limits())
        .unwrap();
    assert_eq!((console.text().as_str(), &report.end), ("cs", &End::Halted));
    assert_eq!(report.exits().of(ExitKind::MapGpaRange), 1);
    let mut shared = [0; 4];
    machine.memory().read(Gpa::new(PAGE), &mut shared).unwrap();
    assert_eq!(&shared, b"shar");
    assert!(machine.destroy().is_clean());
}

#[test]
fn an_access_to_a_device_is_a_ve_that_needs_no_exit() {
    let handler: Part = |a| {
        a.mov(eax, VEINFO_GET)?;
        a.tdcall()?;
        a.cmp(ecx, 48)?;
        print_if_equal(a, 'v')?;
        a.mov(rax, SHARED | 0xfec0_0010)?;
        a.cmp(rax, r9)?;
        print_if_equal(a, 'g')?;
        a.mov(rax, 0xffff_8000_fec0_0010u64)?;
        a.cmp(rax, r8)?;
        print_if_equal(a, 'l')?;
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()
    };
    let main: Part = |a| {
        a.mov(rbx, 0xffff_8000_fec0_0010u64)?;
        a.mov(dword_ptr(rbx), eax)?; // 2 bytes
        a.ret()
    };
    prints(kernel(main, &[(VE, handler)]), "vgl");
}

#[test]
fn a_measurement_register_is_extended_and_a_report_shows_it() {
    let main: Part = |a| {
        for n in 0..6 {
            a.mov(eax, 0x1111_1111)?;
            a.mov(qword_ptr(DATA + n * 8), rax)?;
        }
        a.mov(eax, RTMR_EXTEND)?;
        a.mov(ecx, DATA as u32)?;
        a.mov(edx, 2)?;
        a.tdcall()?;
        a.test(rax, rax)?;
        print_if_equal(a, 'x')?;
        // The report needs 1 KiB, aligned.
        a.mov(eax, REPORT)?;
        a.mov(ecx, (DATA + 0x400) as u32)?;
        a.mov(edx, DATA as u32)?;
        a.xor(r8d, r8d)?;
        a.tdcall()?;
        a.test(rax, rax)?;
        print_if_equal(a, 'r')?;
        // Type 0x81, TDX; then RTMR2 at TDINFO + 208 + 2 * 48.
        a.cmp(byte_ptr(DATA + 0x400), 0x81u32)?;
        print_if_equal(a, 't')?;
        a.mov(esi, (DATA + 0x400 + 512 + 304) as u32)?;
        a.mov(ebp, 48)?;
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        for shift in [4, 0] {
            a.movzx(eax, byte_ptr(rsi))?;
            a.shr(eax, shift)?;
            a.and(eax, 15)?;
            a.add(eax, u32::from(b'A') as i32)?;
            a.call(PUTC)?;
        }
        a.inc(rsi)?;
        a.dec(ebp)?;
        a.jnz(next)?;
        a.ret()
    };
    let (host, console) = (SimHost::new(Vendor::Intel), ConsoleSink::capture());
    let mut machine = Machine::build(&host, config(kernel(main, &[]))).unwrap();
    let report = machine
        .run(&machine.devices(console.clone()), limits())
        .unwrap();
    assert_eq!(report.end, End::Halted, "{report:?}");
    let digit = |digit| char::from(b'A' + u8::from_str_radix(digit, 16).unwrap());
    let expected: String = (0..RTMR.len()).map(|at| digit(&RTMR[at..=at])).collect();
    assert_eq!(console.text(), format!("xrt{expected}"));
    assert!(machine.destroy().is_clean());
}

#[test]
fn code_that_a_report_is_written_over_is_the_report_s_from_then_on() {
    /// REPORTDATA in the report, which are the bytes that the guest asks for.
    const CODE: u64 = DATA + 0x400 + 128;
    /// MOV AL, LETTER and RET.
    const fn returns(letter: u8) -> u32 {
        u32::from_le_bytes([0xb0, letter, 0xc3, 0x90])
    }
    let main: Part = |a| {
        a.mov(dword_ptr(CODE), returns(b'o'))?;
        a.call(CODE)?;
        a.call(PUTC)?;
        a.mov(dword_ptr(DATA), returns(b'n'))?;
        a.mov(eax, REPORT)?;
        a.mov(ecx, (DATA + 0x400) as u32)?;
        a.mov(edx, DATA as u32)?;
        a.xor(r8d, r8d)?;
        a.tdcall()?;
        a.test(rax, rax)?;
        print_if_equal(a, 'r')?;
        a.call(CODE)?;
        a.call(PUTC)?;
        a.ret()
    };
    prints(kernel(main, &[]), "orn");
}

/// SHA-384 of 48 zeros and then the 48 bytes, by another program (Python's hashlib).
const RTMR: &str = "700680a8cc5e6aa80533dbc27d34419c84568b4365d23d1a9e86fb1ba00ae421e44c8d004fcb4e05ad3674bdb746036f";

#[test]
fn an_interrupt_that_the_guest_sends_itself_arrives_when_it_is_enabled() {
    let handler: Part = |a| {
        a.push(rax)?;
        print(a, "i")?;
        a.mov(ecx, 0x80b)?; // EOI
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.pop(rax)?;
        a.iretq()
    };
    let main: Part = |a| {
        a.mov(ecx, 0x83f)?; // self-IPI
        a.mov(eax, 0x40)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        print(a, "1")?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.cli()?;
        print(a, "2")?;
        a.ret()
    };
    // The local APIC of a TD is enabled by the module.
    prints(kernel(main, &[(0x40, handler)]), "1i2");
}

/// A machine whose host does something when the guest prints an exclamation mark.
fn under_attack(main: Part, mut attack: impl FnMut(&Platform) + Send) -> (RunReport, String) {
    let (host, console) = (SimHost::new(Vendor::Intel), ConsoleSink::capture());
    let mut machine = Machine::build(&host, config(kernel(main, &[]))).unwrap();
    let platform = host.tdx_platform().unwrap();
    let devices = machine.devices(console.clone());
    let attack = Mutex::new(&mut attack);
    let handler = |exit: &mut ExitContext<'_>| {
        if exit.data() == b"!" {
            attack.lock().unwrap()(platform);
        }
        devices.handle(exit)
    };
    let report = machine.run(&handler, limits()).unwrap();
    let freed = machine.destroy();
    assert!(freed.is_clean(), "{freed:?}");
    (report, console.text())
}

/// Writes 0x55 bytes to the third line of the data's page, lets the host act, reads the first line and then the third.
fn write_and_read(a: &mut CodeAssembler) -> Assembled {
    a.mov(ebx, DATA as u32)?;
    a.mov(rax, 0x5555_5555_5555_5555u64)?;
    a.mov(qword_ptr(rbx + 128), rax)?;
    print(a, "!")?;
    a.cmp(qword_ptr(rbx), 0)?;
    print_if_equal(a, '1')?;
    a.mov(rcx, 0x5555_5555_5555_5555u64)?;
    a.cmp(qword_ptr(rbx + 128), rcx)?;
    print_if_equal(a, '3')?;
    a.ret()
}

#[test]
fn a_host_that_reads_a_private_page_gets_ciphertext_and_hurts_nothing() {
    let (report, text) = under_attack(write_and_read, |platform| {
        let mut line = [0; 64];
        let page = frame_at(platform, DATA);
        platform.read_memory(page + 128, &mut line).unwrap();
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

#[test]
fn a_line_that_the_host_writes_kills_the_td_when_it_is_touched_and_no_other_does() {
    let ended = under_attack(write_and_read, |platform| {
        let page = frame_at(platform, DATA);
        platform.write_memory(page + 130, &[0]).unwrap();
    });
    td_is_lost(ended, "!1");
}

#[test]
fn another_lines_ciphertext_and_a_lines_own_kill_the_td() {
    for from in [0, 128] {
        let ended = under_attack(write_and_read, |platform| {
            let (page, mut line) = (frame_at(platform, DATA), [0; 64]);
            platform.read_memory(page + from, &mut line).unwrap();
            platform.write_memory(page + 128, &line).unwrap();
        });
        td_is_lost(ended, "!1");
    }
}

#[test]
fn code_that_the_host_writes_does_not_run() {
    let ended = under_attack(write_and_read, |platform| {
        let code = frame_at(platform, MAIN);
        platform.write_memory(code + 0x40, &[0xf4; 64]).unwrap();
    });
    td_is_lost(ended, "!");
}

#[test]
fn a_triple_fault_ends_the_machine_as_one() {
    let main: Part = |a| {
        print(a, "up")?;
        a.ud2()
    };
    let (report, text) = run_on(&SimHost::new(Vendor::Intel), config(kernel(main, &[])));
    assert_eq!((text.as_str(), &report.end), ("up", &End::TripleFault));
    assert!(report.is_failure());
}

#[test]
fn a_second_ve_before_the_first_is_fetched_is_a_double_fault() {
    let double: Part = |a| {
        print(a, "df")?;
        a.mov(rsp, 0xffff_c000u64)?;
        let mut park = a.create_label();
        a.set_label(&mut park)?;
        vmcall(a, 12)?;
        a.jmp(park)
    };
    let handler: Part = |a| a.hlt();
    prints(kernel(out_ports, &[(VE, handler), (8, double)]), "df");
}

#[test]
fn an_undefined_instruction_goes_to_the_guests_handler() {
    let handler: Part = |a| {
        print(a, "u")?;
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()
    };
    let main: Part = |a| {
        a.ud2()?;
        print(a, "d")?;
        a.ret()
    };
    prints(kernel(main, &[(UD, handler)]), "ud");
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
            a.add(eax, u32::from(b'A') as i32)?;
            a.call(PUTC)?;
        }
        a.ret()
    };
    let run = || {
        let host = SimHost::new(Vendor::Intel);
        let (report, text) = run_on(&host, config(kernel(main, &[])));
        assert_eq!(report.end, End::Halted);
        (host.instructions(), text, report.exits())
    };
    let first = run();
    assert!(first.0 > 1_000_000, "{first:?}");
    assert_eq!(first, run());
}

#[test]
fn an_image_that_is_no_program_of_64_bits_starts_no_td() {
    let host = SimHost::new(Vendor::Intel);
    let refused = |config| Machine::build(&host, config).unwrap_err();
    let short = Image::from_bytes("short", elf(false, MAIN, MAIN, &[0xf4], 1));
    for image in [short, Image::flat("flat", [0xf4])] {
        let error = refused(config(image));
        assert!(
            matches!(error, MachineError::NotLaunchable { .. }),
            "{error}"
        );
    }
    let with_option = kernel(out_ports, &[]).cmdline("quiet");
    let error = refused(config(with_option).irqchip(Irqchip::None));
    assert!(
        matches!(error, MachineError::OptionNotUsed { .. }),
        "{error}"
    );
    let beyond = Image::from_bytes("far", elf(true, 64 << 20, 64 << 20, &[0xf4], 1));
    let error = refused(config(beyond));
    assert!(
        matches!(error, MachineError::ImageTooLarge { .. }),
        "{error}"
    );
    assert_eq!(host.live_vms(), 0);
}

#[test]
fn the_measurement_is_that_of_the_image() {
    let measure = |image| {
        let host = SimHost::new(Vendor::Intel);
        let machine = Machine::build(&host, config(image)).unwrap();
        let measurement = machine.vm().measurement().unwrap();
        assert!(machine.vcpu(VcpuId(0)).is_some());
        measurement
    };
    let prints_a: Part = |a| print(a, "a");
    let prints_b: Part = |a| print(a, "b");
    assert_eq!(
        measure(kernel(prints_a, &[])),
        measure(kernel(prints_a, &[]))
    );
    assert_ne!(
        measure(kernel(prints_a, &[])),
        measure(kernel(prints_b, &[]))
    );
}
