//! The layout of guest-physical memory: that of a PC.

use kvm_ops::Gpa;

/// RAM below 4 GiB ends here at the latest; above lie the devices and the ROM. This is the lowest address at which firmware
/// puts the configuration space of a Q35.
pub(crate) const RAM_HOLE: u64 = 0xb000_0000;

/// The bytes below 4 GiB of that much RAM: all of it if it ends below the hole, else 2 GiB (QEMU hw/i386/pc_q35.c).
pub(crate) const fn low_ram(bytes: u64) -> u64 {
    if bytes < RAM_HOLE { bytes } else { 2 << 30 }
}

/// The first address above the 32-bit space, where RAM goes on and below which the ROM ends.
pub(crate) const FOUR_GIB: u64 = 4 << 30;

/// The most RAM: the CMOS counts what lies above 4 GiB in 24 bits of 64 KiB.
pub(crate) const RAM_MAX: u64 = 1 << 40;

/// The largest ROM. Below it lie the pages that VMX needs for real mode.
pub(crate) const ROM_MAX: u64 = 16 << 20;

/// The end of conventional memory, and of what real mode reaches.
pub(crate) const ONE_MIB: u64 = 1 << 20;

/// The bytes at the end of a ROM that are copied below 1 MiB as well. Chipsets show 128 KiB there, and
/// firmware that is larger copies another 128 KiB itself once it has found the chipset (SeaBIOS
/// src/fw/shadow.c); here is no chipset to find.
pub(crate) const SHADOW_MAX: u64 = 256 << 10;

/// The end of conventional memory that the memory map gives to a kernel; above lies what firmware
/// would keep for itself (the extended BIOS data area).
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;

/// The ACPI tables, where option ROMs would lie, and their root pointer, in the range of ROMs below 1 MiB where kernels look
/// for it.
pub(crate) const ACPI_TABLES: Gpa = Gpa::new(0xc_0000);
pub(crate) const ACPI_ROOT: Gpa = Gpa::new(0xe_0000);

/// The MultiProcessor table, in the range of ROMs below 1 MiB where kernels look for it.
pub(crate) const MP_TABLE: Gpa = Gpa::new(0xf_0000);

/// The handlers that real mode's interrupt table leads to, behind the data of a BIOS.
pub(crate) const IVT_STUBS: Gpa = Gpa::new(0x500);

/// The tables that 32-bit and 64-bit code starts with: page-sized things from here to `BOOT_END`.
pub(crate) const BOOT_START: u64 = 0x1000;
/// The descriptor table.
pub(crate) const GDT: Gpa = Gpa::new(0x1000);
/// The code that switches to long mode.
pub(crate) const TRAMPOLINE: Gpa = Gpa::new(0x2000);
/// The top of the stack.
pub(crate) const STACK_TOP: u64 = 0x4000;
/// Linux's boot parameters.
pub(crate) const ZERO_PAGE: Gpa = Gpa::new(0x4000);
/// The root of the page tables, then the directory pointers, then four directories.
pub(crate) const PAGE_TABLES: Gpa = Gpa::new(0x5000);
/// The interrupt table of 32-bit and 64-bit code, and the handlers that it leads to.
pub(crate) const IDT: Gpa = Gpa::new(0xb000);
pub(crate) const STUBS: Gpa = Gpa::new(0xc000);
/// The command line, up to 64 KiB.
pub(crate) const CMDLINE: Gpa = Gpa::new(0x1_0000);
/// The longest command line that finds room.
pub(crate) const CMDLINE_MAX: u64 = 0x1_0000;
/// The byte after all of it.
pub(crate) const BOOT_END: u64 = 0x2_0000;

/// The top of the stacks with which an ELF program starts in a TD, that of the first vCPU highest, and above them the page
/// tables: the root, and a table each for private and shared memory. The last page below 4 GiB has the code.
pub(crate) const TD_STACK_TOP: Gpa = Gpa::new(FOUR_GIB - 0x4000);
pub(crate) const TD_TABLES: Gpa = TD_STACK_TOP;
