//! Why an instruction of a guest did not complete.

use super::{Exit, ViolationBy};
use soft_tdx_module::{LpError, Status};
use std::fmt;

/// An access to memory, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The first byte, with the shared bit.
    pub gpa: u64,
    /// The length in bytes.
    pub len: usize,
    /// A write.
    pub is_write: bool,
    /// The first eight bytes that it writes, in the order of the processor; 0 for a read.
    pub data: u64,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpa, len, .. } = self;
        let what = if self.is_write { "write" } else { "read" };
        write!(f, "{what} of {len} bytes at {gpa:#x}")
    }
}

/// An exception or interrupt that was delivered instead of an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// The vector: 20 is #VE.
    pub vector: u8,
    /// The error code, where the exception has one.
    pub error: Option<u32>,
    /// The access that caused it, if one did.
    pub access: Option<Access>,
    /// The page of the access was given and is not accepted.
    pub is_pending: bool,
}

impl Exception {
    /// The vector of #VE.
    pub const VE: u8 = 20;

    pub(super) const UD: Self = Self {
        vector: 6,
        error: None,
        access: None,
        is_pending: false,
    };

    /// Returns whether it is #VE.
    pub const fn is_ve(&self) -> bool {
        self.vector == Self::VE
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vector {
            Self::VE => f.write_str("#VE")?,
            8 => f.write_str("#DF")?,
            13 => f.write_str("#GP")?,
            14 => f.write_str("#PF")?,
            6 => f.write_str("#UD")?,
            vector => write!(f, "vector {vector:#x}")?,
        }
        if let Some(access) = self.access {
            write!(f, " at a {access}")?;
        }
        if self.is_pending {
            f.write_str(": ")?;
            f.write_str(NOT_ACCEPTED)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Exception({self})")
    }
}

const NOT_ACCEPTED: &str =
    "the page is pending: the guest has not accepted it (TDG.MEM.PAGE.ACCEPT)";

/// Why an instruction did not complete.
#[derive(Clone, PartialEq, Eq)]
pub enum Fault {
    /// An exception was delivered, and no handler completed the instruction.
    Exception(Exception),
    /// The vCPU stopped.
    Stopped(Stopped),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exception(exception) => exception.fmt(f),
            Self::Stopped(stopped) => stopped.fmt(f),
        }
    }
}

/// As [`Display`](fmt::Display), so that what `unwrap` prints can be read.
impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fault({self})")
    }
}

impl std::error::Error for Fault {}

impl From<Stopped> for Fault {
    fn from(stopped: Stopped) -> Self {
        Self::Stopped(stopped)
    }
}

/// A vCPU that never runs again.
#[derive(Clone, PartialEq, Eq)]
pub struct Stopped {
    /// The vCPU.
    pub vcpu: usize,
    /// The access that it was at, if it was at one.
    pub access: Option<Access>,
    /// Why.
    pub cause: StopCause,
}

/// Why a vCPU never runs again.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// It touched a page that it has not accepted, and ATTRIBUTES.SEPT_VE_DISABLE turns that into an exit.
    NotAccepted {
        /// The page.
        gpa: u64,
    },
    /// It touched the private alias of a page that it made shared.
    NotPrivate {
        /// The page.
        gpa: u64,
    },
    /// It touched the shared alias of a page that it did not make shared.
    NotShared {
        /// The page, without the shared bit.
        gpa: u64,
    },
    /// It touched or accepted an address that is no memory.
    NoMemory {
        /// The page.
        gpa: u64,
    },
    /// It asked to be ended: ReportFatalError.
    FatalError {
        /// The guest's code.
        code: u64,
        /// The guest's text, without its padding.
        text: String,
    },
    /// The TD or the vCPU is lost: the host altered private memory, or a triple fault.
    Lost(Status),
    /// An exception came, and the guest has no handler that completes the instruction.
    Unhandled(Box<Exception>),
    /// The host does not enter it again after this exit.
    Denied(Box<Exit>),
    /// The host enters it again and again, and does nothing about this exit.
    NoProgress(Box<Exit>),
    /// The processor cannot execute: a test took it offline, or uses it itself.
    Processor(LpError),
}

impl StopCause {
    /// The cause behind an exit after which the host stops; `is_shared` is the host's view of the page.
    pub(super) fn of(exit: &Exit, shared_bit: u64, ram: u64, is_shared: bool) -> Self {
        match exit {
            Exit::Lost(status) => Self::Lost(*status),
            Exit::Vmcall(kvm_ops_guest::tdx::Vmcall::FatalError { code, text }) => {
                let text = String::from_utf8_lossy(text);
                Self::FatalError {
                    code: *code,
                    text: text.trim_end_matches('\0').to_owned(),
                }
            }
            Exit::Violation { gpa, by } => {
                let (bare, shared_alias) = (gpa & !shared_bit, gpa & shared_bit != 0);
                match (by, shared_alias) {
                    (ViolationBy::PendingAccess, _) => Self::NotAccepted { gpa: bare },
                    _ if bare >= ram => Self::NoMemory { gpa: bare },
                    (_, true) if !is_shared => Self::NotShared { gpa: bare },
                    (_, false) if is_shared => Self::NotPrivate { gpa: bare },
                    _ => Self::Denied(Box::new(exit.clone())),
                }
            }
            _ => Self::Denied(Box::new(exit.clone())),
        }
    }
}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAccepted { gpa } => write!(f, "page {gpa:#x}: {NOT_ACCEPTED}"),
            Self::NotPrivate { gpa } => write!(
                f,
                "page {gpa:#x} is shared: the guest made it so (MapGPA), and uses its private address"
            ),
            Self::NotShared { gpa } => write!(
                f,
                "page {gpa:#x} is private: the guest has not made it shared (MapGPA)"
            ),
            Self::NoMemory { gpa } => write!(f, "there is no memory at {gpa:#x}"),
            Self::FatalError { code, text } => {
                write!(f, "the guest reported a fatal error, {code:#x}: {text:?}")
            }
            Self::Lost(status) => write!(f, "the td is lost: {status}"),
            Self::Unhandled(exception) => write!(f, "no handler for {exception}"),
            Self::Denied(exit) => write!(f, "the host does not enter it again after: {exit}"),
            Self::NoProgress(exit) => write!(f, "the host does nothing about: {exit}"),
            Self::Processor(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vcpu {} stopped", self.vcpu)?;
        if let Some(access) = self.access {
            write!(f, " at a {access}")?;
        }
        write!(f, ": {}", self.cause)
    }
}

/// As [`Display`](fmt::Display), so that what `unwrap` prints can be read.
impl fmt::Debug for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stopped({self})")
    }
}

impl std::error::Error for Stopped {}
