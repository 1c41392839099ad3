//! The memory that a kernel finds when it starts: boot parameters, command line, initrd, descriptor table and
//! page tables.

use super::super::layout::{
    ACPI_ROOT, CMDLINE, CMDLINE_MAX, CONVENTIONAL_END, FOUR_GIB, GDT, ONE_MIB, PAGE_TABLES,
    TRAMPOLINE, ZERO_PAGE,
};
use super::super::start::{BOOT_CS, STUB_CS, gdt};
use super::zero_page::{self, MapEntry, ZeroPage};
use super::{Gpa, GuestRam, Image, MachineError, Start};
use kvm_ops::{Level, PAGE_SIZE};

/// The limits that a bzImage states, and that a vmlinux has by default.
pub(crate) struct Limits {
    /// The end of what the kernel occupies, unpacked.
    pub(crate) kernel_end: Gpa,
    /// The byte after the last that the initrd may occupy.
    pub(crate) initrd_end: Gpa,
    /// The longest command line, without its terminating zero.
    pub(crate) cmdline: usize,
}

/// Linux's `COMMAND_LINE_SIZE` on x86, without the zero.
const VMLINUX_CMDLINE: usize = 2047;

/// Writes the boot parameters for an ELF kernel, which brings no setup header.
pub(crate) fn kernel(image: &Image, ram: &GuestRam, end: Gpa) -> Result<(), MachineError> {
    let page = ZeroPage::with_header();
    let limits = Limits {
        kernel_end: end,
        initrd_end: ram.low_end(),
        cmdline: VMLINUX_CMDLINE,
    };
    parameters(image, ram, page, &limits)
}

/// Writes the command line, the initrd and the zero page that leads to them.
pub(crate) fn parameters(
    image: &Image,
    ram: &GuestRam,
    mut page: ZeroPage,
    limits: &Limits,
) -> Result<(), MachineError> {
    let cmdline = image.cmdline.as_deref().unwrap_or_default();
    write_cmdline(ram, cmdline, limits.cmdline)?;
    page.put(zero_page::TYPE_OF_LOADER, &[zero_page::UNDEFINED_LOADER]);
    // Below 4 GiB, all of them, as their places were chosen.
    page.put_u32(zero_page::CMD_LINE_PTR, CMDLINE.get() as u32);
    page.put_u32(zero_page::CMDLINE_SIZE, cmdline.len() as u32);
    if let Some(initrd) = &image.initrd {
        let at = write_initrd(ram, initrd, limits)?;
        page.put_u32(zero_page::RAMDISK_IMAGE, at.get() as u32);
        page.put_u32(zero_page::RAMDISK_SIZE, initrd.len() as u32);
    }
    if image.acpi {
        page.set_acpi_root(ACPI_ROOT);
    }
    let map = memory_map(ram);
    if !page.set_memory_map(&map) {
        return Err(MachineError::MemorySize {
            bytes: ram.size(),
            problem: "in more than 128 pieces, which boot parameters cannot list",
        });
    }
    ram.write(ZERO_PAGE, page.bytes())
}

/// The RAM, less what lies between conventional memory and 1 MiB, where a PC has its video memory
/// and ROMs.
fn memory_map(ram: &GuestRam) -> Vec<MapEntry> {
    let mut map = Vec::new();
    for (start, bytes) in ram.ram_ranges() {
        let (start, end) = (start.get(), start.get() + bytes);
        let below = (start, end.min(CONVENTIONAL_END));
        let above = (start.max(ONE_MIB), end);
        let pieces = [below, above].into_iter().filter(|(from, to)| from < to);
        map.extend(pieces.map(|(from, to)| (from, to - from)));
    }
    map
}

fn write_cmdline(ram: &GuestRam, text: &str, limit: usize) -> Result<(), MachineError> {
    let limit = limit.min(CMDLINE_MAX as usize - 1);
    if text.len() > limit {
        return Err(MachineError::CmdlineTooLong {
            bytes: text.len(),
            limit,
        });
    }
    if let Some(at) = text.bytes().position(|byte| !(b' '..=b'~').contains(&byte)) {
        let byte = text.as_bytes()[at];
        return Err(MachineError::Cmdline { byte, at });
    }
    let with_zero = [text.as_bytes(), &[0]].concat();
    ram.write(CMDLINE, &with_zero)
}

/// Puts the initrd as high as the kernel allows, where it is out of the way of its unpacking.
fn write_initrd(ram: &GuestRam, initrd: &[u8], limits: &Limits) -> Result<Gpa, MachineError> {
    let high = limits.initrd_end.min(ram.low_end());
    let no_room = || MachineError::InitrdTooLarge {
        bytes: initrd.len() as u64,
        low: limits.kernel_end,
        high,
    };
    let at = high
        .get()
        .checked_sub(initrd.len() as u64)
        .map(|at| Gpa::new(at & !(PAGE_SIZE - 1)))
        .filter(|at| *at >= limits.kernel_end && at.get() >= ONE_MIB)
        .ok_or_else(no_room)?;
    ram.write(at, initrd)?;
    Ok(at)
}

/// Prepares a start in protected mode.
pub(crate) fn protected(ram: &GuestRam, entry: Gpa) -> Result<Start, MachineError> {
    write_words(ram, GDT, &gdt(false))?;
    Ok(Start::Flat32 {
        entry: entry.get() as u32,
        code: BOOT_CS,
        rsi: ZERO_PAGE.get(),
    })
}

/// Prepares a start in long mode: in protected mode, at a stub that maps the first 4 GiB to
/// themselves and switches, as firmware does. No operation on vCPUs sets CR3, and the guest's own
/// way is the same on every platform.
pub(crate) fn long(ram: &GuestRam, entry: Gpa) -> Result<Start, MachineError> {
    write_words(ram, GDT, &gdt(true))?;
    write_page_tables(ram)?;
    ram.write(TRAMPOLINE, &trampoline(entry.get() as u32))?;
    Ok(Start::Flat32 {
        entry: TRAMPOLINE.get() as u32,
        code: STUB_CS,
        rsi: ZERO_PAGE.get(),
    })
}

/// Present and writable; and, in a directory, a page of 2 MiB.
const PTE: u64 = 0b11;
const PTE_LARGE: u64 = 1 << 7;

/// The root, the directory pointers, and a directory for each of the first 4 GiB, in pages that
/// follow one another.
fn write_page_tables(ram: &GuestRam) -> Result<(), MachineError> {
    let table = |n: u64| PAGE_TABLES.get() + n * PAGE_SIZE;
    let directories = FOUR_GIB / Level::Size1G.bytes();
    let pointers: Vec<u64> = (0..directories).map(|n| table(2 + n) | PTE).collect();
    // The entries that are left over are zero, also in memory that is not new.
    ram.clear(PAGE_TABLES, 2 * PAGE_SIZE)?;
    write_words(ram, Gpa::new(table(0)), &[table(1) | PTE])?;
    write_words(ram, Gpa::new(table(1)), &pointers)?;
    let pages: Vec<u64> = (0..FOUR_GIB)
        .step_by(Level::Size2M.bytes() as usize)
        .map(|page| page | PTE | PTE_LARGE)
        .collect();
    write_words(ram, Gpa::new(table(2)), &pages)
}

fn write_words(ram: &GuestRam, at: Gpa, words: &[u64]) -> Result<(), MachineError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(at, &bytes)
}

/// Machine code that switches from protected to long mode (SDM vol. 3, 10.8.5) and jumps to the
/// entry. It leaves RSI alone.
#[rustfmt::skip]
fn trampoline(entry: u32) -> Vec<u8> {
    let mut code = Vec::new();
    code.push(0xb8); // mov eax, PAGE_TABLES
    code.extend_from_slice(&(PAGE_TABLES.get() as u32).to_le_bytes());
    code.extend_from_slice(&[0x0f, 0x22, 0xd8]); // mov cr3, eax
    code.extend_from_slice(&[0x0f, 0x20, 0xe0]); // mov eax, cr4
    code.extend_from_slice(&[0x83, 0xc8, 0x20]); // or eax, PAE
    code.extend_from_slice(&[0x0f, 0x22, 0xe0]); // mov cr4, eax
    code.extend_from_slice(&[0xb9, 0x80, 0x00, 0x00, 0xc0]); // mov ecx, IA32_EFER
    code.extend_from_slice(&[0x0f, 0x32]); // rdmsr
    code.extend_from_slice(&[0x0d, 0x00, 0x01, 0x00, 0x00]); // or eax, LME
    code.extend_from_slice(&[0x0f, 0x30]); // wrmsr
    code.extend_from_slice(&[0x0f, 0x20, 0xc0]); // mov eax, cr0
    code.extend_from_slice(&[0x0d, 0x00, 0x00, 0x00, 0x80]); // or eax, PG
    code.extend_from_slice(&[0x0f, 0x22, 0xc0]); // mov cr0, eax
    code.push(0xea); // jmp BOOT_CS:next
    let next = TRAMPOLINE.get() as u32 + code.len() as u32 + 6;
    code.extend_from_slice(&next.to_le_bytes());
    code.extend_from_slice(&BOOT_CS.to_le_bytes());
    code.push(0xb8); // mov eax, entry
    code.extend_from_slice(&entry.to_le_bytes());
    code.extend_from_slice(&[0xff, 0xe0]); // jmp rax
    code
}
