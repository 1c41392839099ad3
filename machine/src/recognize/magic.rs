//! Magic numbers: kernels, programs, disks, archives, and texts.

use super::{FileKind, Recognition, field, hex};

/// Offsets in the setup header of a bzImage (Linux Documentation/arch/x86/boot.rst).
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const CODE32_START: usize = 0x214;

const SECTOR: usize = 512;
const BOOT_SIGNATURE: [u8; 2] = [0x55, 0xaa];

/// The pointer to the header of a PE file, and in it the machine and the subsystem.
const PE_POINTER: usize = 0x3c;
const PE_MACHINE: usize = 4;
const PE_SUBSYSTEM: usize = 0x5c;
/// The subsystems of EFI: application, boot driver, run-time driver, ROM.
const EFI: std::ops::RangeInclusive<u16> = 10..=13;

/// The places of the volume descriptors of ISO 9660 and of a tar file's signature.
const ISO_VOLUME: usize = 0x8001;
const TAR: usize = 257;

/// A magic number at the start of a file, the kind that has it, and the name of the format.
const HEADS: [(&[u8], FileKind, &str); 20] = [
    (b"\x1f\x8b", FileKind::Packed, "gzip"),
    (b"\x28\xb5\x2f\xfd", FileKind::Packed, "Zstandard"),
    (b"\xfd7zXZ\0", FileKind::Packed, "xz"),
    (b"BZh", FileKind::Packed, "bzip2"),
    (b"\x04\x22\x4d\x18", FileKind::Packed, "LZ4"),
    (b"\x02\x21\x4c\x18", FileKind::Packed, "LZ4 as Linux has it"),
    (b"PK\x03\x04", FileKind::Packed, "zip"),
    (b"7z\xbc\xaf\x27\x1c", FileKind::Packed, "7-Zip"),
    (b"!<arch>\n", FileKind::Packed, "ar"),
    (b"070701", FileKind::Initrd, "cpio"),
    (b"070702", FileKind::Initrd, "cpio with checksums"),
    (b"070707", FileKind::Initrd, "old cpio"),
    (
        b"\xd0\x0d\xfe\xed",
        FileKind::UBoot,
        "a flattened device tree",
    ),
    (b"\x27\x05\x19\x56", FileKind::UBoot, "a uImage"),
    (b"QFI\xfb", FileKind::Disk, "qcow2"),
    (b"KDMV", FileKind::Disk, "VMDK"),
    (b"vhdxfile", FileKind::Disk, "VHDX"),
    (b"conectix", FileKind::Disk, "VHD"),
    (b"hsqs", FileKind::Disk, "squashfs"),
    (b"#!", FileKind::Text, "a script"),
];

/// A Linux kernel.
pub(super) fn kernel(bytes: &[u8]) -> Option<Recognition> {
    let marked = field(bytes, BOOT_FLAG)? == BOOT_SIGNATURE && field(bytes, HEADER)? == *b"HdrS";
    if !marked {
        return None;
    }
    let [minor, major] = field(bytes, VERSION).unwrap_or_default();
    let why = format!("the magic number HdrS at 0x202, of boot protocol {major}.{minor:02}");
    let start = field(bytes, CODE32_START).map(u32::from_le_bytes);
    Some(match start {
        Some(0) => Recognition::new(
            FileKind::RealModeKernel,
            format!("{why}, with no 32-bit entry (code32_start is 0)"),
        ),
        _ => Recognition::new(FileKind::BzImage, why),
    })
}

/// A format with a magic number near its start.
pub(super) fn head(bytes: &[u8]) -> Option<Recognition> {
    if let Some((magic, kind, name)) = HEADS.iter().find(|head| bytes.starts_with(head.0)) {
        let why = format!("it begins with {}, as {name} does", hex(magic));
        return Some(Recognition::new(*kind, why));
    }
    if field(bytes, TAR) == Some(*b"ustar") {
        return Some(Recognition::new(
            FileKind::Packed,
            "the magic number of tar at 0x101",
        ));
    }
    if field(bytes, ISO_VOLUME) == Some(*b"CD001") {
        let why = "the volume descriptor CD001 of ISO 9660 at 0x8001";
        return Some(Recognition::new(FileKind::Iso9660, why));
    }
    program(bytes).or_else(|| option_rom(bytes))
}

/// A PE file or a program of DOS.
fn program(bytes: &[u8]) -> Option<Recognition> {
    if !bytes.starts_with(b"MZ") {
        return None;
    }
    let at = u32::from_le_bytes(field(bytes, PE_POINTER)?) as usize;
    let header = bytes.get(at..).unwrap_or_default();
    if !header.starts_with(b"PE\0\0") {
        // Two printable letters are little of a mark, and a DOS program has relocations, or at
        // least a header of 32 bytes.
        let paragraphs = u16::from_le_bytes(field(bytes, 8)?);
        let why = "the magic number MZ, and the header of a DOS program";
        return (paragraphs >= 2).then(|| Recognition::new(FileKind::DosProgram, why));
    }
    let machine = field(header, PE_MACHINE).map_or(0, u16::from_le_bytes);
    let subsystem = field(header, PE_SUBSYSTEM).map_or(0, u16::from_le_bytes);
    let machine = match machine {
        0x8664 => "x86-64".to_owned(),
        0x14c => "i386".to_owned(),
        0xaa64 => "AArch64".to_owned(),
        other => format!("machine {other:#x}"),
    };
    let kind = if EFI.contains(&subsystem) {
        FileKind::EfiApplication
    } else {
        FileKind::DosProgram
    };
    let why = format!("a PE header for {machine} with subsystem {subsystem}");
    Some(Recognition::new(kind, why))
}

/// The ROM of an adapter: 55 AA and its size in sectors (PCI Firmware Specification, 5.1).
fn option_rom(bytes: &[u8]) -> Option<Recognition> {
    let [signature @ .., sectors] = field::<3>(bytes, 0)?;
    let size = usize::from(sectors) * SECTOR;
    let fits = size != 0 && size <= bytes.len();
    (signature == BOOT_SIGNATURE && fits).then(|| {
        let why = format!("it begins with 55 aa and a size of {size:#x} bytes");
        Recognition::new(FileKind::OptionRom, why)
    })
}

/// A boot sector, or a disk that begins with one.
pub(super) fn sectors(bytes: &[u8]) -> Option<Recognition> {
    if field(bytes, SECTOR - 2)? != BOOT_SIGNATURE {
        return None;
    }
    if bytes.len() == SECTOR {
        let why = "512 bytes that end in 55 aa";
        return Some(Recognition::new(FileKind::BootSector, why));
    }
    let why = if field(bytes, SECTOR) == Some(*b"EFI PART") {
        "a boot sector that ends in 55 aa, and a GUID partition table behind it".to_owned()
    } else {
        let size = bytes.len();
        format!("a boot sector that ends in 55 aa, at the start of {size:#x} bytes")
    };
    Some(Recognition::new(FileKind::Disk, why))
}

/// Text: the first 4 KiB are UTF-8 without control characters.
pub(super) fn text(bytes: &[u8]) -> Option<Recognition> {
    let start = &bytes[..bytes.len().min(0x1000)];
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        // A character may be cut at the end of what is looked at.
        Err(error) if error.error_len().is_none() && start.len() < bytes.len() => {
            std::str::from_utf8(&start[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let printable = |c: char| !c.is_control() || matches!(c, '\n' | '\r' | '\t' | '\x0c');
    // A few letters may be code.
    (text.len() >= 8 && text.chars().all(printable)).then(|| {
        let first: String = text
            .trim_start()
            .chars()
            .take_while(|c| !c.is_control())
            .collect();
        let shown: String = first.chars().take(32).collect();
        Recognition::new(FileKind::Text, format!("printable characters: {shown:?}"))
    })
}
