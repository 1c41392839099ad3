//! The kind of a file, told from its bytes, and the reason for the verdict.
//!
//! There is no fallback: bytes without a mark are [`FileKind::Unknown`], and nothing runs them unless
//! the caller says what they are ([`Image::with_format`](crate::Image::with_format)).

mod elf;
mod firmware;
mod magic;
#[cfg(test)]
mod tests;

use std::fmt;

use crate::ImageFormat;

/// The kind of a file.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A boot sector: 512 bytes that end in 55 AA. It runs as flat code, without a BIOS.
    BootSector,
    /// An ELF file of code for x86 that needs no operating system.
    Elf,
    /// A Linux bzImage with a 32-bit or 64-bit entry.
    BzImage,
    /// A ROM with code at the reset vector.
    Rom,
    /// A ROM with the table of GUIDed entries that OVMF has, and no TDX metadata in it.
    Ovmf,
    /// A ROM with TDX metadata: a TDVF, which can also start a TD.
    Tdvf,
    /// No bytes.
    Empty,
    /// Zeros or ones throughout.
    Blank,
    /// An ELF file of code for another processor.
    ForeignElf,
    /// An ELF file that names a program interpreter: a program of an operating system.
    UserProgram,
    /// An ELF file to be linked: an object file.
    ObjectFile,
    /// A file with the magic number of a bzImage whose only entry is in real mode.
    RealModeKernel,
    /// The variables of EFI firmware, without its code.
    VariableStore,
    /// A firmware volume, and no code at the reset vector: a part of a ROM.
    CutFirmware,
    /// A ROM of an adapter card (55 AA), which firmware starts.
    OptionRom,
    /// A PE file for EFI.
    EfiApplication,
    /// Any other PE or DOS program.
    DosProgram,
    /// A CD image (ISO 9660).
    Iso9660,
    /// The image of a disk.
    Disk,
    /// A compressed file or an archive.
    Packed,
    /// An initial RAM disk (cpio).
    Initrd,
    /// A flattened device tree, or an image of U-Boot.
    UBoot,
    /// Text.
    Text,
    /// Bytes without any mark.
    Unknown,
}

impl FileKind {
    /// The format in which a machine runs it; `None` if it does not.
    pub const fn format(self) -> Option<ImageFormat> {
        match self {
            Self::BootSector => Some(ImageFormat::Flat),
            Self::Elf => Some(ImageFormat::Elf),
            Self::BzImage => Some(ImageFormat::BzImage),
            Self::Rom | Self::Ovmf | Self::Tdvf => Some(ImageFormat::Firmware),
            _ => None,
        }
    }

    /// The kind in words, with an article: `a TDVF`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BootSector => "a boot sector",
            Self::Elf => "an x86 ELF image",
            Self::BzImage => "a Linux bzImage",
            Self::Rom => "a firmware ROM",
            Self::Ovmf => "an OVMF firmware ROM",
            Self::Tdvf => "a firmware ROM with TDX metadata (TDVF)",
            Self::Empty => "an empty file",
            Self::Blank => "a blank file",
            Self::ForeignElf => "an ELF image for another processor",
            Self::UserProgram => "a program of an operating system",
            Self::ObjectFile => "an object file",
            Self::RealModeKernel => "a kernel with a real-mode entry only",
            Self::VariableStore => "a store of EFI variables",
            Self::CutFirmware => "a part of a firmware ROM",
            Self::OptionRom => "an option ROM",
            Self::EfiApplication => "an EFI application",
            Self::DosProgram => "a DOS or Windows program",
            Self::Iso9660 => "a CD image",
            Self::Disk => "a disk image",
            Self::Packed => "a compressed file or archive",
            Self::Initrd => "an initial RAM disk",
            Self::UBoot => "an image for U-Boot",
            Self::Text => "a text",
            Self::Unknown => "no image of a known kind",
        }
    }

    /// A way to run what the file holds. Empty for kinds that run.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Empty | Self::Blank => "check that the file was written completely",
            Self::ForeignElf => "build it for x86-64 or i386",
            Self::UserProgram => {
                "run a kernel, and put the program into its initial RAM disk; or link it statically, \
                 without an operating system"
            }
            Self::ObjectFile => "link it at 0x100000 or above",
            Self::RealModeKernel => {
                "it needs a boot loader and a BIOS; kernels start by their 32-bit or 64-bit entry here"
            }
            Self::VariableStore => "name the file with the code: OVMF.fd, or OVMF_CODE.fd",
            Self::CutFirmware => "name the whole ROM; check that the file was written completely",
            Self::OptionRom => "firmware starts option ROMs; run a BIOS such as SeaBIOS's bios.bin",
            Self::EfiApplication => {
                "EFI firmware loads it from a disk, which a machine here does not have; run a bzImage \
                 or an ELF image"
            }
            Self::DosProgram => "it needs an operating system; run a bzImage or an ELF image",
            Self::Iso9660 | Self::Disk => {
                "a machine here has no disks; run the kernel of the image with its initial RAM disk"
            }
            Self::Packed => "unpack it first",
            Self::Initrd => "run a kernel, and name this file as its initial RAM disk",
            Self::UBoot => "run a bzImage, an ELF image or a ROM; U-Boot for x86 is u-boot.rom",
            Self::Text => "name an image: firmware, a bzImage, an ELF image or a boot sector",
            Self::Unknown => {
                "state its format: `flat` for code that starts in real mode, `firmware` for a ROM"
            }
            Self::BootSector | Self::Elf | Self::BzImage | Self::Rom | Self::Ovmf | Self::Tdvf => {
                ""
            }
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The kind of a file, and the marks that show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recognition {
    kind: FileKind,
    why: String,
}

impl Recognition {
    /// Recognises a file by its bytes.
    ///
    /// ```
    /// use kvm_ops_machine::{FileKind, Recognition};
    /// let text = Recognition::of(b"#!/bin/sh\necho hello\n");
    /// assert_eq!(text.kind(), FileKind::Text);
    /// assert_eq!(text.kind().format(), None);
    /// ```
    pub fn of(bytes: &[u8]) -> Self {
        // An EFI kernel is a PE file, a hybrid CD is a disk, and a ROM may begin with anything. So
        // the more specific marks come first.
        blank(bytes)
            .or_else(|| elf::look(bytes))
            .or_else(|| magic::kernel(bytes))
            .or_else(|| magic::head(bytes))
            .or_else(|| firmware::look(bytes))
            .or_else(|| magic::sectors(bytes))
            .or_else(|| magic::text(bytes))
            .unwrap_or_else(|| {
                let why = format!("{:#x} bytes without a mark", bytes.len());
                Self::new(FileKind::Unknown, why)
            })
    }

    fn new(kind: FileKind, why: impl Into<String>) -> Self {
        let why = why.into();
        Self { kind, why }
    }

    /// The kind of the file.
    pub const fn kind(&self) -> FileKind {
        self.kind
    }

    /// The marks that show it, in words.
    pub fn why(&self) -> &str {
        &self.why
    }
}

/// A file of zeros was not written; one of ones is erased flash. Neither is code, whatever is said.
fn blank(bytes: &[u8]) -> Option<Recognition> {
    let Some(first) = bytes.first() else {
        return Some(Recognition::new(FileKind::Empty, "it has no bytes"));
    };
    let blank = matches!(first, 0 | 0xff) && bytes.iter().all(|byte| byte == first);
    blank.then(|| {
        let why = format!("each of its {:#x} bytes is {first:#04x}", bytes.len());
        Recognition::new(FileKind::Blank, why)
    })
}

/// The bytes at an offset, if the file has them.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// Bytes in hex, as in `55 aa`.
fn hex(bytes: &[u8]) -> String {
    let words: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    words.join(" ")
}
