//! Linux's boot parameters, the "zero page" (Linux Documentation/arch/x86/zero-page.rst), as bytes. The
//! offsets of the setup header in it are those in a bzImage.

use kvm_ops::Gpa;

/// `acpi_rsdp_addr`.
const ACPI_RSDP_ADDR: usize = 0x70;
/// The first byte of the setup header (`hdr`).
pub(crate) const SETUP_HEADER: usize = 0x1f1;
/// `hdr.type_of_loader`.
pub(crate) const TYPE_OF_LOADER: usize = 0x210;
/// `hdr.ramdisk_image`, `hdr.ramdisk_size`.
pub(crate) const RAMDISK_IMAGE: usize = 0x218;
pub(crate) const RAMDISK_SIZE: usize = 0x21c;
/// `hdr.cmd_line_ptr`.
pub(crate) const CMD_LINE_PTR: usize = 0x228;
/// `hdr.cmdline_size`.
pub(crate) const CMDLINE_SIZE: usize = 0x238;

/// A boot loader without a number of its own.
pub(crate) const UNDEFINED_LOADER: u8 = 0xff;

const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const KERNEL_ALIGNMENT: usize = 0x230;
const E820_TABLE: usize = 0x2d0;
/// `E820_MAX_ENTRIES_ZEROPAGE`.
const MAP_MAX: usize = 128;
/// `struct boot_e820_entry`: address, size, type.
const MAP_ENTRY: usize = 20;
/// `E820_TYPE_RAM`.
const E820_RAM: u32 = 1;

/// A range of RAM: first byte and size.
pub(crate) type MapEntry = (u64, u64);

/// The page.
pub(crate) struct ZeroPage([u8; 4096]);

impl ZeroPage {
    pub(crate) const fn new() -> Self {
        Self([0; 4096])
    }

    /// With the setup header of a kernel that brings none.
    pub(crate) fn with_header() -> Self {
        let mut page = Self::new();
        page.put(BOOT_FLAG, &[0x55, 0xaa]);
        page.put(HEADER, b"HdrS");
        page.put_u32(KERNEL_ALIGNMENT, 0x100_0000);
        page
    }

    /// Writes at an offset; the caller's ranges lie in the page.
    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn put_u32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    /// Tells where the root pointer of the ACPI tables is.
    pub(crate) fn set_acpi_root(&mut self, at: Gpa) {
        self.put(ACPI_RSDP_ADDR, &at.get().to_le_bytes());
    }

    /// Lists the RAM. Returns false where it has more pieces than the page has entries.
    pub(crate) fn set_memory_map(&mut self, map: &[MapEntry]) -> bool {
        if map.len() > MAP_MAX {
            return false;
        }
        self.0[E820_ENTRIES] = map.len() as u8;
        for (i, (address, size)) in map.iter().enumerate() {
            let at = E820_TABLE + i * MAP_ENTRY;
            self.put(at, &address.to_le_bytes());
            self.put(at + 8, &size.to_le_bytes());
            self.put_u32(at + 16, E820_RAM);
        }
        true
    }

    pub(crate) const fn bytes(&self) -> &[u8; 4096] {
        &self.0
    }
}
