//! Machines that run machine code: on the real /dev/kvm, and on software platforms of both vendors.
//! Where there is no /dev/kvm, its tests say so and pass.
#![cfg(target_arch = "x86_64")]

mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kvm_ops::guest::Script;
use kvm_ops::sim::SimHost;
use kvm_ops::{Exit, ExitKind, Gfn, Gpa, Host, Irqchip, Regs, Segment, VcpuId, Vendor};
use kvm_ops_machine::{
    CodeMode, ConsoleSink, End, ExitContext, Flow, Image, ImageFormat, Machine, MachineConfig,
    MachineError, Position, RunLimits, RunReport, Trap,
};
use support::samples::{bzimage, elf};
use support::{Until, file, kvm, limits};

/// Makes a test of each function on each host.
macro_rules! on_each_host {
    ($($test:ident,)*) => {
        mod dev_kvm {
            $(#[test]
            fn $test() {
                if let Some(host) = super::kvm() {
                    super::$test(&host);
                }
            })*
        }
        mod software_intel {
            $(#[test]
            fn $test() {
                super::$test(&super::SimHost::new(super::Vendor::Intel));
            })*
        }
        mod software_amd {
            $(#[test]
            fn $test() {
                super::$test(&super::SimHost::new(super::Vendor::Amd));
            })*
        }
    };
}

on_each_host! {
    flat_code_starts_in_real_mode_and_prints,
    an_elf_program_starts_in_its_mode_and_finds_its_command_line,
    a_bzimage_starts_by_either_entry_and_finds_command_line_and_initrd,
    other_vcpus_wait_until_the_first_starts_them,
    a_spinning_guest_is_stopped_from_another_thread_and_goes_on_later,
    deadline_and_exit_limit_end_a_guest_that_never_ends,
    vcpus_without_an_image_run_what_the_embedder_sets,
    the_dirty_log_names_the_frames_that_the_guest_wrote,
    memory_beyond_3_gib_lies_above_4_gib,
    firmware_cannot_write_its_rom_and_can_write_the_copy_below_1_mib,
    seabios_of_128_kib_prints_its_banner,
    seabios_of_256_kib_prints_its_banner,
    seabios_finds_the_memory_and_starts_every_vcpu,
    an_exception_that_flat_code_does_not_handle_is_told_with_its_place,
    an_exception_that_an_elf_program_does_not_handle_is_told_with_its_place,
    a_triple_fault_is_a_failure,
    a_guest_at_its_deadline_stands_where_it_spins,
    a_guest_may_use_the_port_of_the_handlers_itself,
}

/// Starts firmware, and stops it when it prints the text.
fn firmware_prints<H: Host>(host: &H, path: &str, vcpus: u32, text: &'static str) {
    let Some(path) = file(path) else {
        return;
    };
    let image = Image::open(path).unwrap();
    assert_eq!(image.format(), Some(ImageFormat::Firmware));
    let console = ConsoleSink::capture();
    let config = MachineConfig::new().vcpus(vcpus).image(image);
    let mut machine = Machine::build(host, config).unwrap();
    let until = Until::new(machine.devices(console.clone()), console.clone(), text);
    until.run(&mut machine, limits());
    assert!(machine.destroy().is_clean());
}

fn seabios_of_128_kib_prints_its_banner<H: Host>(host: &H) {
    firmware_prints(host, "/usr/share/seabios/bios.bin", 1, "SeaBIOS (version");
}

fn seabios_of_256_kib_prints_its_banner<H: Host>(host: &H) {
    firmware_prints(
        host,
        "/usr/share/seabios/bios-256k.bin",
        1,
        "SeaBIOS (version",
    );
}

fn seabios_finds_the_memory_and_starts_every_vcpu<H: Host>(host: &H) {
    const BIOS: &str = "/usr/share/seabios/bios-256k.bin";
    firmware_prints(host, BIOS, 1, "RamSize: 0x08000000 [cmos]");
    firmware_prints(host, BIOS, 4, "Found 4 cpu(s)");
}

/// Prints the string at the address in the dword at RSI + `field` of the zero page, and halts.
/// The prefix of `inc ebx` makes it `inc rbx` in 64-bit code.
fn print_zero_page_string(long: bool, field: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    code.extend([0x8b, 0x9e]); // mov ebx, [rsi + field]
    code.extend(field.to_le_bytes());
    if long {
        code.extend([0x8a, 0x03, 0x84, 0xc0, 0x74, 0x06]); // l: mov al, [rbx]; test al, al; jz e
        code.extend([0xee, 0x48, 0xff, 0xc3, 0xeb, 0xf4]); // out dx, al; inc rbx; jmp l
    } else {
        code.extend([0x8a, 0x03, 0x84, 0xc0, 0x74, 0x04]);
        code.extend([0xee, 0x43, 0xeb, 0xf6]);
    }
    code.push(0xf4); // e: hlt
    code
}

const CMDLINE_FIELD: u32 = 0x228;
const INITRD_FIELD: u32 = 0x218;

fn run<H: Host>(host: &H, config: MachineConfig) -> (RunReport, String) {
    let console = ConsoleSink::capture();
    let mut machine = Machine::build(host, config).unwrap();
    let devices = machine.devices(console.clone());
    let report = machine.run(&devices, limits()).unwrap();
    assert!(machine.destroy().is_clean());
    (report, console.text())
}

fn flat_code_starts_in_real_mode_and_prints<H: Host>(host: &H) {
    // mov dx, 0x3f8; mov al, 'h'; out dx, al; mov al, 'i'; out dx, al; hlt
    let code = [0xba, 0xf8, 0x03, 0xb0, b'h', 0xee, 0xb0, b'i', 0xee, 0xf4];
    // In segment 0, above it, and with the entry behind the start.
    for image in [
        Image::flat("low", code),
        Image::flat("high", code).load_at(Gpa::new(0x2_3450)),
        Image::flat("entry", [&[0xf4; 5][..], &code].concat()).entry(Gpa::new(0x7c05)),
    ] {
        let (report, text) = run(host, MachineConfig::new().memory(1 << 20).image(image));
        assert_eq!(text, "hi");
        assert_eq!(report.end, End::Halted);
        let exits = report.exits();
        assert_eq!((exits.of(ExitKind::IoOut), exits.of(ExitKind::Hlt)), (2, 1));
    }
}

fn an_elf_program_starts_in_its_mode_and_finds_its_command_line<H: Host>(host: &H) {
    // mov dx, 0x3f8; mov rax, '6' << 32; shr rax, 32; out dx, al: 64-bit code only.
    let long = [
        &[
            0x66, 0xba, 0xf8, 0x03, 0x48, 0xb8, 0, 0, 0, 0, b'6', 0, 0, 0,
        ][..],
        &[0x48, 0xc1, 0xe8, 0x20, 0xee],
        &print_zero_page_string(true, CMDLINE_FIELD),
    ]
    .concat();
    // mov dx, 0x3f8; mov al, '3'; out dx, al
    let short = [
        &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'3', 0xee][..],
        &print_zero_page_string(false, CMDLINE_FIELD),
    ]
    .concat();
    for (class64, code, expected) in [(true, long, "6 hello"), (false, short, "3 hello")] {
        let at = 0x10_0000;
        let file = elf(class64, at, at, &code, code.len() as u64);
        let image = Image::from_bytes("elf", file);
        assert_eq!(image.format(), Some(ImageFormat::Elf));
        let config = MachineConfig::new()
            .irqchip(Irqchip::None)
            .image(image.cmdline("hello"));
        let (report, text) = run(host, config);
        assert_eq!(text, expected.replace(' ', ""), "{report:?}");
        assert_eq!(report.end, End::Halted);
    }
}

fn a_bzimage_starts_by_either_entry_and_finds_command_line_and_initrd<H: Host>(host: &H) {
    for (long, field, expected) in [
        (true, CMDLINE_FIELD, "console=ttyS0"),
        (false, CMDLINE_FIELD, "console=ttyS0"),
        (true, INITRD_FIELD, "initrd!"),
        (false, INITRD_FIELD, "initrd!"),
    ] {
        // The other entry shuts down by an undefined instruction without an IDT.
        let wrong = [0x0f, 0x0b];
        let right = print_zero_page_string(long, field);
        let (entry32, entry64) = if long {
            (&wrong[..], &right[..])
        } else {
            (&right[..], &wrong[..])
        };
        let image = Image::from_bytes("kernel", bzimage(entry32, entry64, long));
        assert_eq!(image.format(), Some(ImageFormat::BzImage));
        let image = image.cmdline("console=ttyS0").initrd(*b"initrd!\0");
        let config = MachineConfig::new().irqchip(Irqchip::None).image(image);
        let (report, text) = run(host, config);
        assert_eq!(text, expected, "long {long}: {report:?}");
        assert_eq!(report.end, End::Halted);
    }
}

fn other_vcpus_wait_until_the_first_starts_them<H: Host>(host: &H) {
    const VCPUS: u32 = 4;
    let store = |at: u32, value: u32| {
        let mut code = vec![0xc7, 0x05]; // mov dword [at], value
        code.extend(at.to_le_bytes());
        code.extend(value.to_le_bytes());
        code
    };
    // At 0x30000: mov al, 'A'; out 0xe9, al; l: hlt; jmp l. Then INIT and SIPI 0x30 to all others.
    let code = [
        store(0x3_0000, u32::from_le_bytes([0xb0, b'A', 0xe6, 0xe9])),
        store(0x3_0004, u32::from_le_bytes([0xf4, 0xeb, 0xfd, 0])),
        store(0xfee0_00f0, 0x1ff),
        store(0xfee0_0300, 0x000c_4500),
        store(0xfee0_0300, 0x000c_4630),
        vec![0xf4, 0xeb, 0xfd], // l: hlt; jmp l
    ]
    .concat();
    let at = 0x10_0000;
    let image = Image::from_bytes("smp", elf(false, at, at, &code, code.len() as u64));
    let config = MachineConfig::new()
        .vcpus(VCPUS)
        .irqchip(Irqchip::Full)
        .image(image);
    let mut machine = Machine::build(host, config).unwrap();
    let seen = Mutex::new(BTreeSet::new());
    let handler = |exit: &mut ExitContext<'_>| {
        let Exit::IoOut { port: 0xe9, .. } = exit.exit() else {
            return Flow::Continue;
        };
        let mut seen = seen.lock().unwrap();
        seen.insert(exit.vcpu());
        if seen.len() == VCPUS as usize - 1 {
            Flow::Stop
        } else {
            Flow::Continue
        }
    };
    let report = machine.run(&handler, limits()).unwrap();
    assert_eq!(report.end, End::Handler, "{report:?}");
    let started: Vec<_> = seen.into_inner().unwrap().into_iter().collect();
    assert_eq!(started, [1, 2, 3].map(VcpuId));
    let peers = report
        .vcpus
        .iter()
        .filter(|v| matches!(v.end, End::Peer(_)));
    assert_eq!(peers.count(), VCPUS as usize - 1, "{report:?}");
    assert!(machine.destroy().is_clean());
}

/// l: jmp l
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// l: out 0x80, al; jmp l
const KNOCK: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];

fn machine<H: Host>(host: &H, code: impl Into<Arc<[u8]>>) -> Machine<H> {
    let image = Image::flat("loop", code);
    Machine::build(host, MachineConfig::new().memory(1 << 20).image(image)).unwrap()
}

fn a_spinning_guest_is_stopped_from_another_thread_and_goes_on_later<H: Host>(host: &H) {
    let mut machine = machine(host, SPIN);
    let devices = machine.devices(ConsoleSink::discard());
    for _ in 0..3 {
        let stopper = machine.stopper();
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            stopper.stop();
        });
        let report = machine.run(&devices, limits()).unwrap();
        assert_eq!(report.end, End::Stopped);
        assert!(report.elapsed < Duration::from_secs(30));
        thread.join().unwrap();
    }
    // A stop that comes before the run is not lost.
    machine.stopper().stop();
    assert_eq!(machine.run(&devices, limits()).unwrap().end, End::Stopped);
    assert!(machine.destroy().is_clean());
}

fn deadline_and_exit_limit_end_a_guest_that_never_ends<H: Host>(host: &H) {
    let soon = RunLimits::none().deadline(Duration::from_millis(30));
    let mut spinning = machine(host, SPIN);
    let devices = spinning.devices(ConsoleSink::discard());
    assert_eq!(spinning.run(&devices, soon).unwrap().end, End::Deadline);

    let mut knocking = machine(host, KNOCK);
    for _ in 0..2 {
        let report = knocking.run(&devices, limits().max_exits(1000)).unwrap();
        assert_eq!(report.end, End::ExitLimit);
        assert_eq!(report.exits().total(), 1000);
    }
}

fn vcpus_without_an_image_run_what_the_embedder_sets<H: Host>(host: &H) {
    let config = MachineConfig::new().memory(1 << 20).vcpus(2);
    let mut machine = Machine::build(host, config).unwrap();
    for id in [0, 1] {
        // mov [0x8000 + id], al; hlt
        let code = [0xa2, id, 0x80, 0xf4];
        let at = 0x1000 * (u64::from(id) + 1);
        machine.memory().write(Gpa::new(at), &code).unwrap();
        let vcpu = machine.vcpu_mut(VcpuId(id.into())).unwrap();
        let mut sregs = vcpu.sregs().unwrap();
        sregs.cs = Segment {
            limit: 0xffff,
            kind: 0xb,
            present: true,
            s: true,
            ..Segment::default()
        };
        vcpu.set_sregs(&sregs).unwrap();
        let regs = Regs {
            rip: at,
            rax: 0x40 + u64::from(id),
            rflags: 2,
            ..Regs::default()
        };
        vcpu.set_regs(&regs).unwrap();
        assert!(machine.enable_vcpu(VcpuId(id.into())));
    }
    assert!(!machine.enable_vcpu(VcpuId(2)));
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, limits()).unwrap();
    assert!(report.vcpus.iter().all(|vcpu| vcpu.end == End::Halted));
    let mut written = [0; 2];
    machine
        .memory()
        .read(Gpa::new(0x8000), &mut written)
        .unwrap();
    assert_eq!(written, [0x40, 0x41]);
}

fn the_dirty_log_names_the_frames_that_the_guest_wrote<H: Host>(host: &H) {
    // mov [0x5000], al; mov [0x9001], al; hlt
    let code = [0xa2, 0x00, 0x50, 0xa2, 0x01, 0x90, 0xf4];
    let image = Image::flat("writer", code);
    let config = MachineConfig::new().memory(1 << 20).log_dirty(true);
    let mut machine = Machine::build(host, config.image(image)).unwrap();
    machine.dirty_frames().unwrap();
    let devices = machine.devices(ConsoleSink::discard());
    assert_eq!(machine.run(&devices, limits()).unwrap().end, End::Halted);
    assert_eq!(machine.dirty_frames().unwrap(), [5, 9].map(Gfn::new));
    assert_eq!(machine.dirty_frames().unwrap(), []);
}

fn memory_beyond_3_gib_lies_above_4_gib<H: Host>(host: &H) {
    const ABOVE: Gpa = Gpa::new(4 << 30);
    // 64-bit code that maps its second 2 MiB to the first above 4 GiB and writes there:
    // mov dword [0x7008], 0x83; mov dword [0x700c], 1; mov byte [0x200000], 0x5a; hlt
    let code = [
        0xc7, 0x04, 0x25, 0x08, 0x70, 0, 0, 0x83, 0, 0, 0, 0xc7, 0x04, 0x25, 0x0c, 0x70, 0, 0, 1,
        0, 0, 0, 0xc6, 0x04, 0x25, 0, 0, 0x20, 0, 0x5a, 0xf4,
    ];
    let at = 0x10_0000;
    let image = Image::from_bytes("elf", elf(true, at, at, &code, code.len() as u64));
    let config = MachineConfig::new().memory(5 << 30).image(image);
    let mut machine = Machine::build(host, config).unwrap();
    let devices = machine.devices(ConsoleSink::discard());
    assert_eq!(machine.run(&devices, limits()).unwrap().end, End::Halted);
    let mut written = [0];
    machine.memory().read(ABOVE, &mut written).unwrap();
    assert_eq!(written, [0x5a]);
    // Between 2 GiB and 4 GiB lies nothing.
    let hole = machine.memory().read(Gpa::new(2 << 30), &mut written);
    assert!(matches!(hole, Err(MachineError::Access { .. })));
}

fn firmware_cannot_write_its_rom_and_can_write_the_copy_below_1_mib<H: Host>(host: &H) {
    let mut rom = vec![0_u8; 0x1_0000];
    rom[0x1000] = b'R';
    // At the reset vector: mov cs:[0x1000], al; mov al, cs:[0x1000]; out 0xe9, al
    let vector = [0x2e, 0xa2, 0x00, 0x10, 0x2e, 0xa0, 0x00, 0x10, 0xe6, 0xe9];
    rom[0xfff0..0xfffa].copy_from_slice(&vector);
    rom[0xfffa..0xffff].copy_from_slice(&[0xea, 0x00, 0xff, 0x00, 0xf0]); // jmp f000:ff00
    // There, in the low copy: mov al, 'W'; mov cs:[0x1000], al; mov al, cs:[0x1000];
    // out 0xe9, al; out 0xf4, al
    let low = [
        0xb0, b'W', 0x2e, 0xa2, 0x00, 0x10, 0x2e, 0xa0, 0x00, 0x10, 0xe6, 0xe9, 0xe6, 0xf4,
    ];
    rom[0xff00..0xff00 + low.len()].copy_from_slice(&low);
    let image = Image::from_bytes("rom", rom).with_format(ImageFormat::Firmware);
    let (report, text) = run(host, MachineConfig::new().memory(1 << 20).image(image));
    assert_eq!(text, "RW", "{report:?}");
    assert_eq!(report.end, End::DebugExit(b'W'.into()));
    assert_eq!(report.exits().of(ExitKind::MmioWrite), 1);
}

/// Runs code until it fails, and returns its end and where it stands.
fn fails<H: Host>(host: &H, image: Image) -> (End, Position) {
    let config = MachineConfig::new().memory(4 << 20).image(image);
    let (mut report, _) = run(host, config.irqchip(Irqchip::None));
    assert!(report.is_failure(), "{report:?}");
    let vcpu = report.vcpus.remove(0);
    (vcpu.end, vcpu.position.expect("it ran code").unwrap())
}

const UD2: [u8; 2] = [0x0f, 0x0b];

fn exception(vector: u8, error: Option<u32>, address: Option<u64>) -> End {
    End::Trap(Trap::Exception {
        vector,
        error,
        address,
    })
}

fn an_exception_that_flat_code_does_not_handle_is_told_with_its_place<H: Host>(host: &H) {
    // int3 pushes the address behind itself; the others their own. div: xor ax, ax; div al.
    for (code, vector, behind) in [
        (&UD2[..], 6, 0),
        (&[0xcc], 3, 1),
        (&[0x31, 0xc0, 0xf6, 0xf0], 0, 2),
    ] {
        let nops = [&[0x90; 3][..], code].concat();
        let (end, position) = fails(host, Image::flat("code", nops));
        assert_eq!(end, exception(vector, None, None));
        assert_eq!((position.cs, position.rip), (0, 0x7c03 + behind));
        assert_eq!(position.mode, CodeMode::Real);
        let rest = &code[behind as usize..];
        assert_eq!(&position.bytes[..rest.len()], rest);
    }
    // mov ah, 0x0e; int 0x10: nothing answers as a BIOS.
    let (end, position) = fails(host, Image::flat("code", [0xb4, 0x0e, 0xcd, 0x10, 0xf4]));
    assert_eq!(end, End::Trap(Trap::Interrupt(0x10)));
    assert_eq!(position.linear, 0x7c04);
}

fn an_exception_that_an_elf_program_does_not_handle_is_told_with_its_place<H: Host>(host: &H) {
    let at = 0x10_0000;
    let image = |long, code: &[u8]| Image::from_bytes("elf", elf(long, at, at, code, 64));
    // mov al, [0x1_0000_0000], which is not mapped
    let touches = [0xa0, 0, 0, 0, 0, 1, 0, 0, 0];
    for (long, code, end, mode) in [
        (
            false,
            &UD2[..],
            exception(6, None, None),
            CodeMode::Protected32,
        ),
        (true, &UD2, exception(6, None, None), CodeMode::Long),
        (
            true,
            &touches,
            exception(14, Some(0), Some(1 << 32)),
            CodeMode::Long,
        ),
    ] {
        let (found, position) = fails(host, image(long, code));
        assert_eq!(found, end, "{position}");
        assert_eq!((position.linear, position.mode), (at, mode));
        assert_eq!(&position.bytes[..code.len()], code);
    }
}

fn a_triple_fault_is_a_failure<H: Host>(host: &H) {
    let at = 0x10_0000;
    // lidt [0x100020], where zeros are; ud2
    let code = [&[0x0f, 0x01, 0x1d, 0x20, 0x00, 0x10, 0x00][..], &UD2].concat();
    let (end, _) = fails(
        host,
        Image::from_bytes("elf", elf(false, at, at, &code, 64)),
    );
    assert_eq!(end, End::TripleFault);
}

fn a_guest_at_its_deadline_stands_where_it_spins<H: Host>(host: &H) {
    let mut spinning = machine(host, SPIN);
    let devices = spinning.devices(ConsoleSink::discard());
    let soon = RunLimits::none().deadline(Duration::from_millis(30));
    let report = spinning.run(&devices, soon).unwrap();
    assert_eq!(
        (report.end.clone(), report.is_failure()),
        (End::Deadline, false)
    );
    let position = report.vcpus[0].position.clone().unwrap().unwrap();
    assert_eq!((position.linear, &position.bytes[..2]), (0x7c00, &SPIN[..]));
    assert_eq!(position.to_string(), "0000:7c00 (real mode, 16-bit)");
}

fn a_guest_may_use_the_port_of_the_handlers_itself<H: Host>(host: &H) {
    // out 0xf6, al; hlt
    let image = Image::flat("code", [0xe6, 0xf6, 0xf4]);
    let (report, _) = run(host, MachineConfig::new().memory(1 << 20).image(image));
    assert_eq!(report.end, End::Halted);
}

#[test]
fn guest_programs_need_a_software_platform() {
    let Some(host) = kvm() else { return };
    let config = MachineConfig::new().program(Script::new().halt());
    let error = Machine::build(&host, config).unwrap_err();
    assert!(matches!(error, MachineError::Vcpu { .. }), "{error}");
    assert!(error.hint().is_some());
}
