//! bzImage: the Linux/x86 boot protocol (Linux Documentation/arch/x86/boot.rst).

use super::boot::{self, Limits};
use super::zero_page::{self, ZeroPage};
use super::{
    Gpa, GuestRam, Image, ImageFormat, MachineError, Start, bad, clear_of_boot_area, low_range,
};

/// Offsets of fields of the setup header in the file.
const SETUP_SECTS: usize = zero_page::SETUP_HEADER;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADFLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const HEAP_END_PTR: usize = 0x224;
const INITRD_ADDR_MAX: usize = 0x22c;
const RELOCATABLE: usize = 0x234;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
/// The end of the header as protocol 2.15 has it.
const HEADER_END: usize = 0x26c;

const SECTOR: u64 = 512;
/// The meaning of `setup_sects` 0.
const OLD_SETUP_SECTS: u64 = 4;
/// The first version of the protocol that a bzImage has.
const V_BZIMAGE: u16 = 0x200;
/// The first version of the protocol with `initrd_addr_max`, `cmdline_size`, `init_size` and
/// `xloadflags`.
const V_INITRD_MAX: u16 = 0x203;
const V_CMDLINE: u16 = 0x206;
const V_INIT_SIZE: u16 = 0x20a;
const V_XLOADFLAGS: u16 = 0x20c;
/// The code before those.
const OLD_INITRD_MAX: u32 = 0x37ff_ffff;
const OLD_CMDLINE: u32 = 255;
/// The kernel has a 64-bit entry, 0x200 behind its start.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// `loadflags`: the kernel is loaded at 1 MiB and above, which makes it a bzImage.
const LOADED_HIGH: u8 = 1;
/// `loadflags`: the heap's end is given in `heap_end_ptr`.
const CAN_USE_HEAP: u8 = 1 << 7;
const HEAP_END: u16 = 0xfe00;

pub(crate) fn load(image: &Image, ram: &GuestRam) -> Result<Start, MachineError> {
    let bytes = &image.bytes[..];
    if bytes.len() < HEADER_END {
        return Err(bad(
            ImageFormat::BzImage,
            image,
            "the size of the file",
            bytes.len() as u64,
        ));
    }
    let magic = field(bytes, MAGIC);
    if magic != *b"HdrS" {
        let magic = u32::from_le_bytes(magic);
        return Err(bad(
            ImageFormat::BzImage,
            image,
            "the magic number (header)",
            magic,
        ));
    }
    let version = u16::from_le_bytes(field(bytes, VERSION));
    if version < V_BZIMAGE {
        return Err(bad(
            ImageFormat::BzImage,
            image,
            "the protocol version",
            version,
        ));
    }
    let flags = bytes[LOADFLAGS];
    if flags & LOADED_HIGH == 0 {
        return Err(bad(
            ImageFormat::BzImage,
            image,
            "the load flags (loadflags)",
            flags,
        ));
    }
    let start = Gpa::new(u32::from_le_bytes(field(bytes, CODE32_START)).into());
    let sectors = match bytes[SETUP_SECTS] {
        0 => OLD_SETUP_SECTS,
        sectors => sectors.into(),
    };
    let setup = (sectors + 1) * SECTOR;
    let packed = (bytes.len() as u64)
        .checked_sub(setup)
        .filter(|packed| *packed != 0)
        .ok_or_else(|| {
            bad(
                ImageFormat::BzImage,
                image,
                "the number of setup sectors",
                sectors,
            )
        })?;
    let packed_end = low_range(image, ram, start, packed)?;
    clear_of_boot_area(image, "the kernel", start, packed_end)?;
    let long = version >= V_XLOADFLAGS
        && u16::from_le_bytes(field(bytes, XLOADFLAGS)) & XLF_KERNEL_64 != 0;
    let entry = if long {
        start.checked_add(ENTRY_64).filter(|at| *at < packed_end)
    } else {
        Some(start)
    };
    let entry = entry.ok_or_else(|| {
        bad(
            ImageFormat::BzImage,
            image,
            "the size of the kernel",
            packed,
        )
    })?;
    let limits = Limits {
        kernel_end: packed_end.max(unpacked_end(image, ram, version, start)?),
        initrd_end: Gpa::new(
            1 + u64::from(if version >= V_INITRD_MAX {
                u32::from_le_bytes(field(bytes, INITRD_ADDR_MAX))
            } else {
                OLD_INITRD_MAX
            }),
        ),
        cmdline: if version >= V_CMDLINE {
            u32::from_le_bytes(field(bytes, CMDLINE_SIZE)) as usize
        } else {
            OLD_CMDLINE as usize
        },
    };

    ram.write(start, &bytes[setup as usize..])?;
    let mut page = ZeroPage::new();
    page.put(SETUP_SECTS, &bytes[SETUP_SECTS..HEADER_END]);
    page.put(LOADFLAGS, &[flags | CAN_USE_HEAP]);
    page.put(HEAP_END_PTR, &HEAP_END.to_le_bytes());
    boot::parameters(image, ram, page, &limits)?;
    if long {
        boot::long(ram, entry)
    } else {
        boot::protected(ram, entry)
    }
}

/// The end of the memory that the kernel needs to unpack itself: `init_size` bytes from where it
/// will run, which is its preferred address unless it is loaded above.
fn unpacked_end(
    image: &Image,
    ram: &GuestRam,
    version: u16,
    start: Gpa,
) -> Result<Gpa, MachineError> {
    if version < V_INIT_SIZE {
        return Ok(start);
    }
    let preferred = Gpa::new(u64::from_le_bytes(field(&image.bytes, PREF_ADDRESS)));
    let init_size = u32::from_le_bytes(field(&image.bytes, INIT_SIZE));
    let runs_at = if image.bytes[RELOCATABLE] != 0 {
        start.max(preferred)
    } else {
        preferred
    };
    let end = low_range(image, ram, runs_at, init_size.into())?;
    clear_of_boot_area(image, "the unpacked kernel", runs_at, end)?;
    Ok(end)
}

/// A field of the header, whose presence the caller has checked.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}
