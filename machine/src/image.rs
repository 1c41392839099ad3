//! Images: a file, its format, and the options with which it is loaded.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use kvm_ops::Gpa;

use crate::layout::RAM_HOLE;
use crate::{FileKind, MachineError, Recognition, read_file};

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// Raw code that starts in real mode.
    Flat,
    /// An ELF file. 64-bit code starts in long mode, the first 4 GiB mapped to themselves; 32-bit
    /// code starts in protected mode with flat segments. RSI holds the address of Linux's "zero
    /// page" (Linux Documentation/arch/x86/boot.rst), as a vmlinux expects.
    ///
    /// In a confidential VM only 64-bit code starts, at its entry too, with a stack: RDI holds the bytes of RAM below 4 GiB, and
    /// linear addresses from 0xffff8000_00000000 on show the first 512 GiB as shared memory
    /// (docs/guest-testing.md).
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
    recognition: Recognition,
    pub(crate) format: Option<ImageFormat>,
    pub(crate) load_at: Option<Gpa>,
    pub(crate) entry: Option<Gpa>,
    pub(crate) cmdline: Option<String>,
    pub(crate) initrd: Option<Arc<[u8]>>,
    pub(crate) kernel: Option<Arc<[u8]>>,
    pub(crate) acpi: bool,
}

impl Image {
    /// The largest file that is read: no image can lie outside of the RAM below 2.75 GiB.
    pub const MAX_BYTES: u64 = RAM_HOLE;

    /// The default address of flat images: that of a boot sector.
    pub const DEFAULT_LOAD: Gpa = Gpa::new(0x7c00);

    /// Reads a file and recognises its kind.
    ///
    /// # Errors
    /// As for [`read_file`], and [`MachineError::EmptyImage`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, MachineError> {
        let path = path.as_ref();
        Ok(Self::from_bytes(
            path.display().to_string(),
            read_image(path)?,
        ))
    }

    /// Takes bytes and recognises their kind. Bytes of no kind that runs are refused when the machine
    /// is built, unless [`with_format`](Self::with_format) says what they are.
    pub fn from_bytes(name: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        let bytes = bytes.into();
        let recognition = Recognition::of(&bytes);
        Self {
            name: name.into(),
            format: recognition.kind().format(),
            recognition,
            bytes,
            load_at: None,
            entry: None,
            cmdline: None,
            initrd: None,
            kernel: None,
            acpi: false,
        }
    }

    /// Takes bytes for flat code.
    pub fn flat(name: impl Into<String>, code: impl Into<Arc<[u8]>>) -> Self {
        Self::from_bytes(name, code).with_format(ImageFormat::Flat)
    }

    /// Takes it for that format, whatever was recognised.
    pub fn with_format(mut self, format: ImageFormat) -> Self {
        self.format = Some(format);
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

    /// The kernel that firmware starts, which finds it in the configuration device of a [`Q35`](crate::Q35), with its
    /// command line and its initial RAM disk. For firmware with such a machine around it.
    pub fn kernel(mut self, bytes: impl Into<Arc<[u8]>>) -> Self {
        self.kernel = Some(bytes.into());
        self
    }

    /// Reads that kernel from a file.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_kernel(self, path: impl AsRef<Path>) -> Result<Self, MachineError> {
        Ok(self.kernel(read_image(path.as_ref())?))
    }

    /// The kernel's command line, for a bzImage or ELF image, or for the kernel of firmware.
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = Some(cmdline.into());
        self
    }

    /// Describes the machine to a bzImage or ELF kernel by ACPI tables, and puts the address of their root pointer into its boot
    /// parameters (`acpi_rsdp_addr`). They tell of all vCPUs, of the I/O APIC, and of the devices that
    /// [`Machine::q35`](crate::Machine::q35) gives, so the machine is to be run with those: the kernel finds the memory window of PCI
    /// configuration space at 0xb0000000, and switches off by ACPI. Firmware gets its tables from the Q35, and needs none of this.
    ///
    /// The tables lie from 0xc0000 on, below 1 MiB. A kernel without them finds vCPUs and interrupt lines by a MultiProcessor
    /// table.
    pub const fn acpi(mut self) -> Self {
        self.acpi = true;
        self
    }

    /// The initial RAM disk, for a bzImage or ELF image, or for the kernel of firmware.
    pub fn initrd(mut self, bytes: impl Into<Arc<[u8]>>) -> Self {
        self.initrd = Some(bytes.into());
        self
    }

    /// Reads the initial RAM disk from a file.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_initrd(self, path: impl AsRef<Path>) -> Result<Self, MachineError> {
        Ok(self.initrd(read_image(path.as_ref())?))
    }

    /// The name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The format, recognised or stated; `None` for a file of a kind that does not run.
    pub const fn format(&self) -> Option<ImageFormat> {
        self.format
    }

    /// What its bytes look like, whatever format was stated.
    pub const fn recognition(&self) -> &Recognition {
        &self.recognition
    }

    /// The format in which it is loaded.
    ///
    /// # Errors
    /// [`MachineError::EmptyImage`], [`MachineError::BlankImage`] or [`MachineError::NotAnImage`], as
    /// the building of a machine would fail.
    pub fn runs_as(&self) -> Result<ImageFormat, MachineError> {
        let name = || self.name.clone();
        match self.recognition.kind() {
            FileKind::Empty => Err(MachineError::EmptyImage { name: name() }),
            FileKind::Blank => Err(MachineError::BlankImage {
                name: name(),
                value: self.bytes[0],
            }),
            _ => self.format.ok_or_else(|| MachineError::NotAnImage {
                name: name(),
                recognition: self.recognition.clone(),
            }),
        }
    }

    /// True for firmware and kernels, which wait for timers.
    pub(crate) fn wants_timers(&self) -> bool {
        match self.format {
            Some(ImageFormat::BzImage | ImageFormat::Firmware) => true,
            Some(ImageFormat::Elf) => self.cmdline.is_some() || self.initrd.is_some(),
            Some(ImageFormat::Flat) | None => false,
        }
    }

    /// The hashes of the kernel that firmware starts, its initial RAM disk and its command line, as the launch of an SNP guest
    /// measures them; `None` without a [`kernel`](Self::kernel). Each call computes them anew.
    ///
    /// ```
    /// use kvm_ops_machine::Image;
    ///
    /// let firmware = Image::from_bytes("firmware", vec![0; 4096]);
    /// assert_eq!(firmware.kernel_hashes(), None);
    /// let quiet = firmware.kernel(vec![1; 512]).cmdline("quiet");
    /// assert_ne!(quiet.kernel_hashes(), quiet.clone().cmdline("debug").kernel_hashes());
    /// ```
    #[cfg(feature = "sev")]
    pub fn kernel_hashes(&self) -> Option<kvm_ops_ovmf::KernelHashes> {
        let kernel = self.kernel.as_ref()?;
        let initrd = self.initrd.as_deref().unwrap_or_default();
        let hashes = kvm_ops_ovmf::KernelHashes::new(kernel, initrd, self.cmdline.as_deref());
        Some(hashes)
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
            .field("kernel", &self.kernel.as_ref().map(|kernel| kernel.len()))
            .field("acpi", &self.acpi)
            .finish()
    }
}

/// Reads an image or initial RAM disk, which has bytes.
fn read_image(path: &Path) -> Result<Vec<u8>, MachineError> {
    let bytes = read_file(path, Image::MAX_BYTES)?;
    if bytes.is_empty() {
        return Err(MachineError::EmptyImage {
            name: path.display().to_string(),
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_image_is_read_from_a_file_that_has_bytes() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let empty = Image::open(file.path()).unwrap_err();
        assert!(matches!(empty, MachineError::EmptyImage { .. }));

        file.write_all(b"\x7fELF").unwrap();
        let image = Image::open(file.path()).unwrap();
        assert_eq!((image.len(), image.format()), (4, Some(ImageFormat::Elf)));
        assert_eq!(image.name(), file.path().display().to_string());
        assert!(image.open_initrd(file.path()).unwrap().initrd.is_some());
    }
}
