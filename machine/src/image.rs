//! Images: what a file is, and the options with which it is loaded.

use std::fmt;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use kvm_ops::Gpa;

use crate::MachineError;
use crate::layout::{RAM_HOLE, ROM_MAX};

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// Raw code that starts in real mode.
    Flat,
    /// An ELF file. 64-bit code starts in long mode, the first 4 GiB mapped to themselves; 32-bit
    /// code starts in protected mode with flat segments. RSI holds the address of Linux's "zero
    /// page" (Linux Documentation/arch/x86/boot.rst), as a vmlinux expects.
    Elf,
    /// A Linux bzImage, booted by the 64-bit or 32-bit boot protocol.
    BzImage,
    /// A ROM that starts at the reset vector.
    Firmware,
}

impl ImageFormat {
    /// Every format.
    pub const ALL: [ImageFormat; 4] = [Self::Flat, Self::Elf, Self::BzImage, Self::Firmware];

    /// The name by which programs and files call it: `flat`, `elf`, `bzimage`, `firmware`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flat => "flat",
            Self::Elf => "elf",
            Self::BzImage => "bzimage",
            Self::Firmware => "firmware",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// The format that these bytes look like: the magic numbers of ELF and bzImage, then a ROM (whole 64 KiB
    /// up to 16 MiB with a jump among the first bytes at the reset vector), else flat code.
    pub fn detect(bytes: &[u8]) -> Self {
        if bytes.starts_with(b"\x7fELF") {
            Self::Elf
        } else if bytes.get(0x1fe..0x200) == Some(&[0x55, 0xaa])
            && bytes.get(0x202..0x206) == Some(b"HdrS")
        {
            Self::BzImage
        } else if is_rom(bytes) {
            Self::Firmware
        } else {
            Self::Flat
        }
    }
}

/// A jump is at the reset vector or up to three bytes after it, because some firmware puts NOP
/// or WBINVD before it.
fn is_rom(bytes: &[u8]) -> bool {
    const JUMPS: [u8; 3] = [0xe9, 0xea, 0xeb];
    let whole = bytes.len().is_multiple_of(0x1_0000) && bytes.len() as u64 <= ROM_MAX;
    whole
        && bytes
            .len()
            .checked_sub(16)
            .and_then(|reset| bytes.get(reset..reset + 4))
            .is_some_and(|vector| vector.iter().any(|byte| JUMPS.contains(byte)))
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An image with the options of its loading. Cheap to clone: the bytes are shared.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    pub(crate) name: String,
    pub(crate) bytes: Arc<[u8]>,
    pub(crate) format: ImageFormat,
    pub(crate) load_at: Option<Gpa>,
    pub(crate) entry: Option<Gpa>,
    pub(crate) cmdline: Option<String>,
    pub(crate) initrd: Option<Arc<[u8]>>,
}

impl Image {
    /// The largest file that is read: no image can lie outside of the RAM below 3 GiB.
    pub const MAX_BYTES: u64 = RAM_HOLE;

    /// The default address of flat images: that of a boot sector.
    pub const DEFAULT_LOAD: Gpa = Gpa::new(0x7c00);

    /// Reads a file and detects its format.
    ///
    /// # Errors
    /// [`MachineError::Read`], [`MachineError::NotAFile`], [`MachineError::EmptyImage`] or
    /// [`MachineError::ImageTooLarge`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, MachineError> {
        let path = path.as_ref();
        let bytes = read_file(path)?;
        let name = path.display().to_string();
        if bytes.is_empty() {
            return Err(MachineError::EmptyImage { name });
        }
        Ok(Self::from_bytes(name, bytes))
    }

    /// Takes bytes and detects their format. Empty bytes are refused when the machine is built.
    pub fn from_bytes(name: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        let bytes = bytes.into();
        Self {
            name: name.into(),
            format: ImageFormat::detect(&bytes),
            bytes,
            load_at: None,
            entry: None,
            cmdline: None,
            initrd: None,
        }
    }

    /// Takes it for that format, whatever was detected.
    pub fn with_format(mut self, format: ImageFormat) -> Self {
        self.format = format;
        self
    }

    /// The address of flat code; [`DEFAULT_LOAD`](Self::DEFAULT_LOAD) unless stated.
    pub fn load_at(mut self, gpa: Gpa) -> Self {
        self.load_at = Some(gpa);
        self
    }

    /// The entry of a flat or ELF image: its first byte, or what its header says, unless
    /// stated.
    pub fn entry(mut self, gpa: Gpa) -> Self {
        self.entry = Some(gpa);
        self
    }

    /// The kernel's command line, for a bzImage or ELF image.
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = Some(cmdline.into());
        self
    }

    /// The initial RAM disk, for a bzImage or ELF image.
    pub fn initrd(mut self, bytes: impl Into<Arc<[u8]>>) -> Self {
        self.initrd = Some(bytes.into());
        self
    }

    /// Reads the initial RAM disk from a file.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_initrd(self, path: impl AsRef<Path>) -> Result<Self, MachineError> {
        let path = path.as_ref();
        let bytes = read_file(path)?;
        if bytes.is_empty() {
            return Err(MachineError::EmptyImage {
                name: path.display().to_string(),
            });
        }
        Ok(self.initrd(bytes))
    }

    /// The name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The format, detected or stated.
    pub const fn format(&self) -> ImageFormat {
        self.format
    }

    /// True for firmware and kernels, which wait for timers.
    pub(crate) fn wants_timers(&self) -> bool {
        match self.format {
            ImageFormat::BzImage | ImageFormat::Firmware => true,
            ImageFormat::Elf => self.cmdline.is_some() || self.initrd.is_some(),
            ImageFormat::Flat => false,
        }
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("name", &self.name)
            .field("format", &self.format)
            .field("bytes", &self.bytes.len())
            .field("load_at", &self.load_at)
            .field("entry", &self.entry)
            .field("cmdline", &self.cmdline)
            .field("initrd", &self.initrd.as_ref().map(|initrd| initrd.len()))
            .finish()
    }
}

/// Reads a regular file of bounded size. The kind is looked at first, because opening a pipe
/// without a writer would wait for ever.
fn read_file(path: &Path) -> Result<Vec<u8>, MachineError> {
    let failed = |source| MachineError::Read {
        path: path.to_owned(),
        source,
    };
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(MachineError::NotAFile {
            path: path.to_owned(),
        });
    }
    let file = fs::File::open(path).map_err(failed)?;
    let too_large = |bytes| MachineError::ImageTooLarge {
        name: path.display().to_string(),
        bytes,
        at: Gpa::new(0),
        room: Image::MAX_BYTES,
    };
    let stated = file.metadata().map_err(failed)?.len();
    if stated > Image::MAX_BYTES {
        return Err(too_large(stated));
    }
    let mut bytes = Vec::new();
    // One byte more than allowed, so that a file that grew meanwhile is seen to be too large.
    file.take(Image::MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > Image::MAX_BYTES {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_regular_file_of_bounded_size_is_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let empty = Image::open(file.path()).unwrap_err();
        assert!(matches!(empty, MachineError::EmptyImage { .. }));

        file.write_all(b"\x7fELF").unwrap();
        let image = Image::open(file.path()).unwrap();
        assert_eq!((image.len(), image.format()), (4, ImageFormat::Elf));
        assert_eq!(image.name(), file.path().display().to_string());
        assert!(image.open_initrd(file.path()).unwrap().initrd.is_some());

        // A file with a hole: nothing is read, so nothing is allocated.
        file.as_file().set_len(Image::MAX_BYTES + 1).unwrap();
        let large = Image::open(file.path()).unwrap_err();
        assert!(
            large.to_string().contains("needs 0xc0000001 bytes"),
            "{large}"
        );
    }

    #[test]
    fn what_is_no_regular_file_is_refused_without_waiting() {
        for path in ["/dev/null", "/dev/zero", "/"] {
            let error = Image::open(path).unwrap_err();
            assert!(matches!(error, MachineError::NotAFile { .. }), "{error}");
        }
        let error = Image::from_bytes("x", [1])
            .open_initrd("/nonexistent")
            .unwrap_err();
        assert!(std::error::Error::source(&error).is_some());
        assert_eq!(error.to_string(), "cannot read /nonexistent");
    }
}
