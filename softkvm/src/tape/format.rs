//! The text of a record.

use std::fmt::{self, Write};
use std::time::Duration;

use super::fields::takes_address;
use super::places::Place;

/// The first line.
pub(super) const HEAD: &str = "kvm-ops record 1";

/// The start of the last line of a record that was given up.
pub(super) const LOST: &str = "lost ";

/// The maker of the machine's processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vendor {
    Intel,
    Amd,
}

/// The machine of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Machine {
    pub(super) vendor: Vendor,
    /// CPUID leaf 0x8000001f.
    pub(super) encryption: [u32; 4],
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.vendor {
            Vendor::Intel => "intel",
            Vendor::Amd => "amd",
        };
        write!(f, "machine {name}")?;
        let mut registers = self.encryption.iter();
        registers.try_for_each(|register| write!(f, " {register:x}"))
    }
}

/// A device that a program opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// `/dev/kvm`.
    Kvm,
    /// `/dev/sev`.
    Sev,
}

/// A file that a call made, by its number among all files of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NewFile {
    Vm,
    Vcpu,
    GuestMemfd { size: u64, flags: u64 },
    Stats,
}

/// A call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// It is the file of that number from then on.
    Open(Device, u32),
    Ioctl {
        file: u32,
        number: u32,
        /// 0 or 1 where it is an address.
        argument: u64,
    },
}

impl What {
    /// An ioctl of the file of that number.
    pub(super) fn ioctl(file: u32, (number, argument): (u32, u64)) -> Self {
        Self::Ioctl {
            file,
            number,
            argument: match takes_address(number) {
                true => u64::from(argument != 0),
                false => argument,
            },
        }
    }
}

/// A step of a call, in the order in which the kernel's side takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// In front of the call, and behind the one before it, a clock of this number told its thread this time.
    Clock(i32, Duration),
    /// There too, its thread took the lock of this name, which another thread had: the taking of that number.
    Lock(String, u64),
    /// The program's side of the run page: bytes that it changed since the last run.
    PageIn(usize, Vec<u8>),
    /// Bytes that were read.
    Read(Place, Vec<u8>),
    /// So many bytes could not be read.
    ReadFault(Place, usize),
    /// Bytes that were written.
    Write(Place, Vec<u8>),
    /// So many bytes could not be written.
    WriteFault(Place),
    New(u32, NewFile),
    /// The eventfd in the descriptor field at this offset of the argument has that number from then on.
    Event(u32, usize),
    /// The kernel's side of the run page.
    PageOut(usize, Vec<u8>),
    /// Bytes at an offset of the slot that the n-th call for slots set.
    Memory(u32, u64, Vec<u8>),
    Signal(u32),
}

/// The end of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Value(i64),
    /// The file of that number.
    File(u32),
    Errno(i32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) thread: u32,
    pub(super) what: What,
    pub(super) steps: Vec<Step>,
    pub(super) answer: Answer,
}

/// A whole record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) machine: Machine,
    pub(super) calls: Vec<Call>,
}

/// A text that is no record. It names the line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordError {
    pub(super) line: usize,
    pub(super) why: &'static str,
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

impl std::error::Error for RecordError {}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clock(clock, time) => {
                let (seconds, rest) = (time.as_secs(), time.subsec_nanos());
                write!(f, " clock {clock} {seconds}.{rest:09}")
            }
            Self::Lock(lock, number) => write!(f, " lock {lock} {number}"),
            Self::PageIn(at, bytes) => write!(f, " page-in {at:x} {}", Hex(bytes)),
            Self::Read(place, bytes) => write!(f, " read {place} {}", Hex(bytes)),
            Self::ReadFault(place, bytes) => write!(f, " read-fault {place} {bytes}"),
            Self::Write(place, bytes) => write!(f, " write {place} {}", Hex(bytes)),
            Self::WriteFault(place) => write!(f, " write-fault {place}"),
            Self::New(number, NewFile::Vm) => write!(f, " new {number} vm"),
            Self::New(number, NewFile::Vcpu) => write!(f, " new {number} vcpu"),
            Self::New(number, NewFile::Stats) => write!(f, " new {number} stats"),
            Self::New(number, NewFile::GuestMemfd { size, flags }) => {
                write!(f, " new {number} guest_memfd {size:x} {flags:x}")
            }
            Self::Event(number, at) => write!(f, " event {number} {at}"),
            Self::PageOut(at, bytes) => write!(f, " page-out {at:x} {}", Hex(bytes)),
            Self::Memory(slot, at, bytes) => write!(f, " memory {slot} {at:x} {}", Hex(bytes)),
            Self::Signal(number) => write!(f, " signal {number}"),
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(Device::Kvm, file) => write!(f, "open /dev/kvm {file}"),
            Self::Open(Device::Sev, file) => write!(f, "open /dev/sev {file}"),
            Self::Ioctl {
                file,
                number,
                argument,
            } => {
                let ioctl = kvm_ops_uapi::ioctl::Ioctl::from_number(*number);
                let name = ioctl.map_or("unknown", |ioctl| ioctl.name());
                write!(f, "ioctl {file} {number:x} {name} {argument:x}")
            }
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(value) => write!(f, "= {value}"),
            Self::File(file) => write!(f, "= file {file}"),
            Self::Errno(errno) => write!(f, "= error {errno} {}", kvm_ops_uapi::Errno(*errno)),
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "thread {} {}", self.thread, self.what)?;
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        writeln!(f, "{}", self.answer)
    }
}

/// The lines in front of the first call.
pub(super) fn head(machine: Machine) -> String {
    format!("{HEAD}\n{machine}\n")
}

/// The runs of bytes that differ, with their offsets. Short gaps are part of a run.
pub(super) fn changes(before: &[u8], after: &[u8]) -> Vec<(usize, Vec<u8>)> {
    const GAP: usize = 16;
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (at, (old, new)) in before.iter().zip(after).enumerate() {
        match runs.last_mut() {
            _ if old == new => {}
            Some((_, end)) if at - *end < GAP => *end = at + 1,
            _ => runs.push((at, at + 1)),
        }
    }
    let bytes = |(start, end): (usize, usize)| (start, after[start..end].to_vec());
    runs.into_iter().map(bytes).collect()
}

/// Writes bytes for a message: the first ones only.
pub(super) fn shown(bytes: &[u8]) -> String {
    const MOST: usize = 64;
    let mut text = Hex(&bytes[..bytes.len().min(MOST)]).to_string();
    if bytes.len() > MOST {
        let _ = write!(text, ".. ({} bytes)", bytes.len());
    }
    text
}
