//! Operands and failures of the RMP instructions.

use super::access::AccessFault;
use super::entry::PageSize;
use std::fmt;

/// Request of an RMPUPDATE for a page. All fields zero gives the page back to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RmpUpdate {
    /// Guest physical address.
    pub gpa: u64,
    /// True if the page is assigned.
    pub assigned: bool,
    /// Size of the page.
    pub size: PageSize,
    /// True if the entry is fixed until firmware releases it.
    pub immutable: bool,
    /// ASID of the guest; 0 for the firmware.
    pub asid: u32,
}

impl RmpUpdate {
    /// Gives a page back to the host.
    pub fn shared() -> Self {
        Self::default()
    }

    /// Gives a page to the firmware.
    pub fn firmware() -> Self {
        Self {
            assigned: true,
            immutable: true,
            ..Self::default()
        }
    }

    /// Assigns a page to a guest, which then accepts it with PVALIDATE.
    pub fn guest(asid: u32, gpa: u64) -> Self {
        Self {
            assigned: true,
            asid,
            gpa,
            ..Self::default()
        }
    }

    /// Assigns a page to a guest for SNP_LAUNCH_UPDATE.
    pub fn pre_guest(asid: u32, gpa: u64) -> Self {
        Self {
            immutable: true,
            ..Self::guest(asid, gpa)
        }
    }

    /// The same for a page of another size.
    pub fn size(mut self, size: PageSize) -> Self {
        self.size = size;
        self
    }
}

/// Failure codes of the RMP instructions, as they come back in rAX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum RmpError {
    /// 1: an operand is wrong.
    Input,
    /// 2: the entry may not be changed.
    Permission,
    /// 3: another processor holds the entry.
    InUse,
    /// 4: a 4 KiB and a 2 MiB entry would overlap.
    Overlap,
    /// 4 of PSMASH: the address has no entry.
    BadAddress,
    /// 6: the entry is smaller than the operand says.
    SizeMismatch,
    /// The instruction is not enabled: invalid opcode.
    NotEnabled,
    /// Another code, only through injection.
    Other(u32),
}

impl RmpError {
    /// The code in rAX; `None` where the instruction faults instead.
    pub fn code(self) -> Option<u32> {
        match self {
            RmpError::Input => Some(1),
            RmpError::Permission => Some(2),
            RmpError::InUse => Some(3),
            RmpError::Overlap | RmpError::BadAddress => Some(4),
            RmpError::SizeMismatch => Some(6),
            RmpError::NotEnabled => None,
            RmpError::Other(code) => Some(code),
        }
    }

    pub(crate) fn from_code(code: u32) -> Self {
        match code {
            1 => RmpError::Input,
            2 => RmpError::Permission,
            3 => RmpError::InUse,
            4 => RmpError::Overlap,
            6 => RmpError::SizeMismatch,
            other => RmpError::Other(other),
        }
    }
}

impl fmt::Display for RmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RmpError::Input => f.write_str("bad input (1)"),
            RmpError::Permission => f.write_str("the entry may not be changed (2)"),
            RmpError::InUse => f.write_str("the entry is in use (3)"),
            RmpError::Overlap => f.write_str("page sizes overlap (4)"),
            RmpError::BadAddress => f.write_str("the address has no entry (4)"),
            RmpError::SizeMismatch => f.write_str("page size mismatch (6)"),
            RmpError::NotEnabled => f.write_str("SYSCFG.SNP_EN is not set on every core"),
            RmpError::Other(code) => write!(f, "code {code}"),
        }
    }
}

impl std::error::Error for RmpError {}

/// Failure of a guest's PVALIDATE or RMPADJUST: a fault, or a failure code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestRmpError {
    /// The instruction completed with this code.
    Code(RmpError),
    /// The instruction faulted before it did anything.
    Fault(AccessFault),
}

impl fmt::Display for GuestRmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestRmpError::Code(_) => f.write_str("the instruction failed"),
            GuestRmpError::Fault(_) => f.write_str("the instruction faulted"),
        }
    }
}

impl std::error::Error for GuestRmpError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            GuestRmpError::Code(e) => Some(e),
            GuestRmpError::Fault(e) => Some(e),
        }
    }
}

impl From<RmpError> for GuestRmpError {
    fn from(e: RmpError) -> Self {
        GuestRmpError::Code(e)
    }
}

impl From<AccessFault> for GuestRmpError {
    fn from(e: AccessFault) -> Self {
        GuestRmpError::Fault(e)
    }
}

/// RMPADJUST's operand: the VMPL whose permissions change, and to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmpAdjust {
    /// The VMPL whose permissions change; below the caller's.
    pub target_vmpl: u8,
    /// Its new permissions, bits of [`permission`](crate::permission).
    pub permissions: u8,
    /// True if the page becomes the register state of a vCPU.
    pub vmsa: bool,
}
