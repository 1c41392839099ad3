//! The errors of machines.

use std::io;
use std::path::PathBuf;

use kvm_ops::{CreateError, Diagnosis, Error, Field, Gpa, VcpuId};

use crate::layout::RAM_HOLE;
use crate::{FileKind, ImageFormat, Recognition};

/// The reason why a machine could not be built or run. The cause, where there is one, is its
/// `source()`; [`hint`](Self::hint) says what can be done.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// An image or initrd could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The path leads to a directory, device or pipe.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file has more bytes than anything of its use has.
    #[error("{} has {bytes:#x} bytes, more than the {limit:#x} that it may have", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size, as far as it is known.
        bytes: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A disk image cannot be opened, or is in use.
    #[error("cannot use disk image {}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A disk image is empty, or ends within a sector.
    #[error("disk image {} has {bytes:#x} bytes, which are no whole sectors of 0x200", path.display())]
    DiskSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The machine has no more slots for PCI devices.
    #[error("the machine has {slots} slots for PCI devices, and each has one")]
    Slots {
        /// The slots.
        slots: usize,
    },
    /// An image whose bytes the host would put into memory that a confidential VM does not share.
    #[error("image {name} cannot start a confidential VM")]
    NotLaunchable {
        /// The image.
        name: String,
    },
    /// The image has no bytes.
    #[error("image {name} is empty")]
    EmptyImage {
        /// The image.
        name: String,
    },
    /// Each byte of the image is zero, or each is 0xff.
    #[error("image {name} is blank: each of its bytes is {value:#04x}")]
    BlankImage {
        /// The image.
        name: String,
        /// The value of its bytes.
        value: u8,
    },
    /// The image is of no kind that runs, and no format was stated.
    #[error("image {name} is {}: {}", recognition.kind(), recognition.why())]
    NotAnImage {
        /// The image.
        name: String,
        /// Its kind, and the marks that show it.
        recognition: Recognition,
    },
    /// The image, or what it unpacks to, does not fit where it belongs.
    #[error("image {name} needs {bytes:#x} bytes at {at}, and there are {room:#x}")]
    ImageTooLarge {
        /// The image.
        name: String,
        /// The size that it needs.
        bytes: u64,
        /// The address.
        at: Gpa,
        /// The room that there is.
        room: u64,
    },
    /// The file ends before what its header promises, or a header field makes no sense.
    #[error("image {name} is not a good {format} image: {what} is {value:#x}")]
    BadHeader {
        /// The image.
        name: String,
        /// The format that it was taken for.
        format: ImageFormat,
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The image could not be parsed.
    #[error("image {name} is not a good {format} image")]
    BadImage {
        /// The image.
        name: String,
        /// The format that it was taken for.
        format: ImageFormat,
        /// The error of the parser.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine would start at an address where nothing was loaded.
    #[error("entry {entry} of image {name} is outside of what is loaded")]
    EntryOutside {
        /// The image.
        name: String,
        /// The address.
        entry: Gpa,
    },
    /// Real-mode code must start in the first MiB.
    #[error("entry {entry} cannot be reached from real mode")]
    EntryAboveRealMode {
        /// The address.
        entry: Gpa,
    },
    /// Two things would lie at the same address.
    #[error("{what} at {start}..{end} overlaps {with}")]
    Overlap {
        /// The one.
        what: &'static str,
        /// Its first byte.
        start: Gpa,
        /// The byte after its last.
        end: Gpa,
        /// The other.
        with: &'static str,
    },
    /// There is no place for the initrd between the kernel and the highest address that the kernel
    /// allows.
    #[error("initrd of {bytes:#x} bytes does not fit between {low} and {high}")]
    InitrdTooLarge {
        /// Its size.
        bytes: u64,
        /// The end of the kernel.
        low: Gpa,
        /// The end of what the kernel can reach.
        high: Gpa,
    },
    /// The kernel takes a shorter command line.
    #[error("kernel command line has {bytes} bytes, and the kernel takes {limit}")]
    CmdlineTooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The command line holds what Linux cannot parse.
    #[error("kernel command line has byte {byte:#x} at {at}")]
    Cmdline {
        /// The byte.
        byte: u8,
        /// Its place, from 0.
        at: usize,
    },
    /// An option does not apply to images of this format.
    #[error("option {option} has no meaning for a {format} image")]
    OptionNotUsed {
        /// The option.
        option: &'static str,
        /// The format.
        format: ImageFormat,
    },
    /// The size of the memory is out of range.
    #[error("memory of {bytes:#x} bytes is {problem}")]
    MemorySize {
        /// The size.
        bytes: u64,
        /// The fault of it.
        problem: &'static str,
    },
    /// More guest programs than vCPUs.
    #[error("{programs} guest programs for {vcpus} vCPUs")]
    TooManyPrograms {
        /// Programs.
        programs: usize,
        /// vCPUs.
        vcpus: u32,
    },
    /// The host runs guest programs, and no code that lies in memory.
    #[error("image {name} needs a processor, and the host `{host}` runs guest programs only")]
    NeedsProcessor {
        /// The image.
        name: String,
        /// The host.
        host: &'static str,
    },
    /// Guest memory could not be mapped.
    #[error("cannot map {bytes:#x} bytes of guest memory")]
    Map {
        /// The size.
        bytes: u64,
        /// The reason.
        source: io::Error,
    },
    /// A guest address is outside of the memory.
    #[error("no memory at {gpa} for {bytes:#x} bytes")]
    Access {
        /// The first byte.
        gpa: Gpa,
        /// Bytes.
        bytes: usize,
    },
    /// A region of memory cannot be a guest's.
    #[error("cannot describe a region of memory")]
    Region {
        /// The reason.
        source: Error,
    },
    /// A device uses a page that a confidential guest keeps to itself.
    #[error("page at {gpa} is private to the guest")]
    Private {
        /// The address.
        gpa: Gpa,
    },
    /// A step that concerns the whole VM failed.
    #[error("cannot {step}")]
    Step {
        /// The step.
        step: &'static str,
        /// The reason, as the VM explains it.
        source: Box<Diagnosis>,
    },
    /// A step that concerns one vCPU failed.
    #[error("cannot {step} of vCPU {vcpu}")]
    Vcpu {
        /// The step.
        step: &'static str,
        /// The vCPU.
        vcpu: VcpuId,
        /// The reason, as the VM explains it.
        source: Box<Diagnosis>,
    },
    /// The system gave no thread.
    #[error("cannot start a thread for vCPU {vcpu}")]
    Thread {
        /// The vCPU.
        vcpu: VcpuId,
        /// The reason.
        source: io::Error,
    },
    /// The VM could not be created.
    #[error("cannot create the VM")]
    Create(#[source] CreateError),
    /// An operation of the VM failed, for a device.
    #[error(transparent)]
    Vm(#[from] Error),
}

impl MachineError {
    /// A way out, if there is one.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Read { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "check the path",
                io::ErrorKind::PermissionDenied => "check the permissions of the file",
                _ => return None,
            },
            Self::Disk { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "check the path",
                io::ErrorKind::PermissionDenied => {
                    "check the permissions of the file, or let the guest only read it"
                }
                io::ErrorKind::ResourceBusy => {
                    "copy the image, or let all machines that use it only read it"
                }
                _ => return None,
            },
            Self::DiskSize { .. } => {
                "a disk image holds the sectors as they are (raw): enlarge the file with `truncate`, or convert it"
            }
            Self::Slots { .. } => "use fewer disks and consoles",
            Self::NotAFile { .. } => "copy what it holds into a file first",
            Self::NotLaunchable { .. } => {
                "give the VM the pages of its measured start (MachineConfig::launch), or an ELF file of 64-bit code, or a TD firmware with TDVF metadata"
            }
            Self::FileTooLarge { .. } => "check the path",
            Self::EmptyImage { .. } => FileKind::Empty.advice(),
            Self::BlankImage { .. } => FileKind::Blank.advice(),
            Self::NotAnImage { recognition, .. } => recognition.kind().advice(),
            Self::ImageTooLarge { at, .. } if at.get() >= RAM_HOLE => {
                "no RAM is there: link it between 0x100000 and 0xb0000000, or run the ROM that is made of it"
            }
            Self::ImageTooLarge { .. } => "give the machine more memory, or load it elsewhere",
            Self::BadHeader { .. } | Self::BadImage { .. } => {
                "check that the file was written completely, and that its format is the stated one"
            }
            Self::EntryOutside { .. } => "state the entry, or link the image elsewhere",
            Self::EntryAboveRealMode { .. } => {
                "load a flat image below 0x100000, or use an ELF image"
            }
            Self::Overlap { what, .. } if *what == REGION => {
                "give each region of memory addresses for itself"
            }
            Self::Overlap { .. } => "link the image at 0x100000 or above",
            Self::InitrdTooLarge { .. } => "give the machine more memory",
            Self::CmdlineTooLong { .. } => "shorten the command line",
            Self::Cmdline { .. } => "use printable ASCII",
            Self::OptionNotUsed { .. } => "leave the option out, or state another format",
            Self::MemorySize { .. } => "use a multiple of 4 KiB between 4 KiB and 1 TiB",
            Self::TooManyPrograms { .. } => "give the machine a vCPU for each program",
            Self::NeedsProcessor { .. } => {
                "run it on /dev/kvm or the software platform, or give guest programs"
            }
            Self::Map { .. } => "use less memory, or raise the limit of the address space",
            Self::Create(CreateError {
                diagnosis: Some(diagnosis),
                ..
            }) => return explained(diagnosis),
            Self::Create(CreateError { error, .. }) => return hint(error),
            Self::Step { source, .. } | Self::Vcpu { source, .. } => return explained(source),
            Self::Region { source } | Self::Vm(source) => return hint(source),
            Self::Access { .. } => "stay within the memory (GuestRam::regions)",
            Self::Private { .. } => {
                "the guest must share a page before a device uses it (MapGPA, a page state change)"
            }
            Self::Thread { .. } => "give the process more threads, or run fewer vCPUs",
        })
    }
}

/// The subject of an overlap that is no image.
pub(crate) const REGION: &str = "a region of memory";

/// A hint for a failure of a VM: that for whoever builds machines, else the advice of the VM.
fn explained(diagnosis: &Diagnosis) -> Option<&'static str> {
    let advice = Some(diagnosis.advice).filter(|advice| !advice.is_empty());
    diagnosis.error.as_ref().and_then(hint).or(advice)
}

/// A hint for an error of the VM.
fn hint(error: &Error) -> Option<&'static str> {
    Some(match error {
        Error::NotOffered(name) if name.0.contains("irqchip") => {
            "give the machine interrupt controllers (MachineConfig::irqchip)"
        }
        Error::HostLacks(_) | Error::NotOffered(_) => "guest programs need a software platform",
        Error::Unsupported(..) => "`kvm-ops doctor` tells what this host offers",
        Error::Invalid(Field::VcpuCount, _) => "use 1 to 4096 vCPUs",
        Error::Invalid(Field::HostAddress | Field::Size | Field::Gpa, _) => {
            "give memory in whole pages of 4 KiB, at addresses that the VM has"
        }
        Error::NotFound(Field::Gsi, _) => "give the line a message (Inside::set_gsi_route)",
        _ => return None,
    })
}
