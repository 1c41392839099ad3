//! A distribution's Linux boots to user space as a normal VM on the software platform.
//!
//! `KVM_OPS_KERNEL=/boot/vmlinuz cargo test --release -p kvm-ops-machine --test linux -- --nocapture`
//!
//! The kernel is a bzImage; the initial RAM disk is made here. Without the variable the test says that
//! it skips.
#![cfg(target_arch = "x86_64")]

mod support;

use std::time::Duration;

use kvm_ops::sim::SimHost;
use kvm_ops::{Irqchip, Vendor};
use kvm_ops_machine::{ConsoleSink, End, Image, Machine, MachineConfig, RunLimits};

const SAYS: &[u8] = b"user space runs\n";

/// 2026-01-01, for the clock of the CMOS.
const NOW: u64 = 1_767_225_600;

/// What the kernel is told: the console, what to do at the end (pulse the keyboard controller's reset
/// line), and that the TSC counts as CPUID says.
const CMDLINE: &str = "console=ttyS0 earlyprintk=serial panic=-1 reboot=k tsc=reliable";

/// A program for Linux, in an ELF file: it writes its line and restarts the machine.
fn init() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut code = vec![0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0]; // mov eax, SYS_write; mov edi, 1
    code.extend([0x48, 0x8d, 0x35]); // lea rsi, [rip + text]
    let text_offset = code.len();
    code.extend([0; 4]);
    code.push(0xba); // mov edx, length
    code.extend((SAYS.len() as u32).to_le_bytes());
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xb8, 169, 0, 0, 0, 0xbf]); // mov eax, SYS_reboot; mov edi, magic
    code.extend(0xfee1_dead_u32.to_le_bytes());
    code.push(0xbe); // mov esi, second magic
    code.extend(672_274_793_u32.to_le_bytes());
    code.push(0xba); // mov edx, LINUX_REBOOT_CMD_RESTART
    code.extend(0x0123_4567_u32.to_le_bytes());
    code.extend([0x0f, 0x05, 0xeb, 0xfe]); // syscall; jmp $
    let distance = (code.len() - (text_offset + 4)) as u32;
    code[text_offset..text_offset + 4].copy_from_slice(&distance.to_le_bytes());
    code.extend(SAYS);

    let entry = BASE + HEADERS;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [entry, 64, 0] {
        file.extend(u64::to_le_bytes(word));
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]); // one segment: load, readable and executable
    let size = HEADERS + code.len() as u64;
    for word in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(u64::to_le_bytes(word));
    }
    assert_eq!(file.len() as u64, HEADERS);
    file.extend(code);
    file
}

/// Adds an entry to an archive of the "newc" format of cpio, which Linux unpacks.
fn add(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let numbers = [
        archive.len() as u32 + 1, // inode
        mode,
        0,
        0,
        1,
        0,
        data.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend(b"070701");
    for number in numbers {
        archive.extend(format!("{number:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

fn initramfs() -> Vec<u8> {
    const DIRECTORY: u32 = 0o40_755;
    const PROGRAM: u32 = 0o100_755;
    const CHARACTER_DEVICE: u32 = 0o20_600;
    let mut archive = Vec::new();
    add(&mut archive, "dev", DIRECTORY, (0, 0), &[]);
    add(&mut archive, "dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    add(&mut archive, "init", PROGRAM, (0, 0), &init());
    add(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

struct Boot {
    end: End,
    text: String,
    instructions: u64,
    seconds: f64,
}

fn boot(vendor: Vendor, kernel: &str, irqchip: Irqchip, vcpus: u32) -> Boot {
    let host = SimHost::new(vendor);
    let image = Image::open(kernel).unwrap();
    let image = image.cmdline(CMDLINE).initrd(initramfs());
    let config = MachineConfig::new()
        .memory(512 << 20)
        .vcpus(vcpus)
        .irqchip(irqchip)
        .image(image);
    let mut machine = Machine::build(&host, config).unwrap();
    let console = ConsoleSink::capture();
    let devices = machine.devices(console.clone()).stop_clock(NOW);
    let limits = RunLimits::none().deadline(Duration::from_secs(900));
    let report = machine.run(&devices, limits).unwrap();
    assert!(machine.destroy().is_clean());
    Boot {
        end: report.end,
        text: console.text(),
        instructions: host.instructions(),
        seconds: report.elapsed.as_secs_f64(),
    }
}

fn reaches_user_space(vendor: Vendor, kernel: &str, irqchip: Irqchip, vcpus: u32) -> Boot {
    let boot = boot(vendor, kernel, irqchip, vcpus);
    let says = String::from_utf8_lossy(SAYS);
    let tail = &boot.text[boot.text.len().saturating_sub(4000)..];
    assert!(boot.text.contains(says.trim()), "{:?}: {tail}", boot.end);
    assert_eq!(boot.end, End::Reset, "{tail}");
    println!(
        "{vendor}, {irqchip:?} irqchip, {vcpus} vCPUs: {} instructions in {:.1} s, {:.0} M/s",
        boot.instructions,
        boot.seconds,
        boot.instructions as f64 / 1e6 / boot.seconds
    );
    boot
}

#[test]
fn linux_boots_to_user_space_with_the_same_number_of_instructions_each_time() {
    let Some(kernel) = std::env::var("KVM_OPS_KERNEL").ok() else {
        eprintln!("skipped: KVM_OPS_KERNEL does not name a bzImage");
        return;
    };
    let first = reaches_user_space(Vendor::Intel, &kernel, Irqchip::Full, 1);
    let again = reaches_user_space(Vendor::Intel, &kernel, Irqchip::Full, 1);
    assert_eq!(first.instructions, again.instructions);
    assert_eq!(first.text, again.text);
}

#[test]
fn linux_boots_to_user_space_on_amd_and_with_a_split_irqchip() {
    let Some(kernel) = std::env::var("KVM_OPS_KERNEL").ok() else {
        eprintln!("skipped: KVM_OPS_KERNEL does not name a bzImage");
        return;
    };
    reaches_user_space(Vendor::Amd, &kernel, Irqchip::Full, 1);
    reaches_user_space(Vendor::Intel, &kernel, Irqchip::Split, 1);
}
