//! Why an instruction of an SEV guest did not complete.

use super::Exit;
use kvm_ops_guest::sev::msr::Termination;
use soft_amd_sp::AccessFault;
use std::fmt;

/// An instruction that touches memory, for messages.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load with the C-bit set.
    Read,
    /// A store with the C-bit set.
    Write,
    /// A load with the C-bit clear.
    ReadShared,
    /// A store with the C-bit clear.
    WriteShared,
    /// PVALIDATE.
    Pvalidate,
    /// RMPADJUST.
    Rmpadjust,
}

impl Access {
    pub(super) const fn is_shared(self) -> bool {
        matches!(self, Self::ReadShared | Self::WriteShared)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "private read",
            Self::Write => "private write",
            Self::ReadShared => "shared read",
            Self::WriteShared => "shared write",
            Self::Pvalidate => "PVALIDATE",
            Self::Rmpadjust => "RMPADJUST",
        })
    }
}

/// Why an instruction did not complete.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// #VC with error code 0x404: the host has assigned the page, and the guest has not validated it.
    NotValidated {
        /// The address.
        gpa: u64,
        /// The instruction.
        access: Access,
    },
    /// The host did not enter the vCPU again.
    Stopped(Stopped),
}

impl Fault {
    /// The reason for a port that has no other way to fail.
    pub(super) fn into_stopped(self) -> Stopped {
        match self {
            Self::Stopped(stopped) => stopped,
            Self::NotValidated { gpa, access } => Stopped {
                access: Some((access, gpa)),
                cause: StopCause::Refused(AccessFault::NotValidated { gpa }),
            },
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotValidated { gpa, access } => write!(
                f,
                "#VC at a {access} at {gpa:#x}: the guest has not validated the page (PVALIDATE)"
            ),
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

/// A vCPU that the host did not enter again. Its next instruction is tried anew.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// The instruction that it was at, and the address, if it touches memory.
    pub access: Option<(Access, u64)>,
    /// Why.
    pub cause: StopCause,
}

impl Stopped {
    /// The host does not enter it again after this exit.
    pub(super) const fn denied(exit: Exit) -> Self {
        Self {
            access: None,
            cause: StopCause::Denied(exit),
        }
    }
}

/// Why a host did not enter a vCPU again.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// It touched a page as private that it made shared.
    NotPrivate,
    /// It touched a page as shared that it did not make shared.
    NotShared,
    /// It touched an address that is no memory.
    NoMemory,
    /// It asked to be ended.
    Terminated(Termination),
    /// The processor refused the instruction: #GP of PVALIDATE above VMPL0, #UD without SNP.
    Refused(AccessFault),
    /// The nested page table or the RMP does not have the page as the guest has it, and the host does
    /// nothing about it.
    Nested(AccessFault),
    /// The host does not enter it again after this exit.
    Denied(Exit),
    /// The host enters it again and again, and does nothing about this fault.
    NoProgress(AccessFault),
}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPrivate => f.write_str(
                "the page is shared: the guest made it so (page state change), and uses it as private",
            ),
            Self::NotShared => f.write_str(
                "the page is private: the guest has not made it shared (page state change)",
            ),
            Self::NoMemory => f.write_str("there is no memory"),
            Self::Terminated(Termination { set, reason }) => {
                write!(f, "the guest asked to be ended, with reason {set:#x}:{reason:#x}")
            }
            Self::Refused(fault) => write!(f, "the processor refuses it: {fault}"),
            Self::Nested(fault) => fault.fmt(f),
            Self::Denied(exit) => write!(f, "the host does not enter it again after: {exit}"),
            Self::NoProgress(fault) => write!(f, "the host does nothing about: {fault}"),
        }
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the vcpu stopped")?;
        if let Some((access, gpa)) = self.access {
            write!(f, " at a {access} at {gpa:#x}")?;
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
