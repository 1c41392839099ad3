//! Status words: the TDX module's in RAX, the host's in R10.

use core::fmt;

/// The TDX module's status word (TDX module ABI, "Function Completion Status Codes").
///
/// Bit 63 says *error*, but a cleared bit 63 does not say *success*: PAGE_ALREADY_ACCEPTED has it
/// clear. Compare [`CompletionStatus::code`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CompletionStatus(pub u64);

impl CompletionStatus {
    /// Everything is as asked.
    pub const SUCCESS: u64 = 0;
    /// An operand is not valid; the detail names it.
    pub const OPERAND_INVALID: u64 = 0xC000_0100_0000_0000;
    /// Something is locked at the moment; the detail names it.
    pub const OPERAND_BUSY: u64 = 0x8000_0200_0000_0000;
    /// The page is the guest's already. No error by bit 63.
    pub const PAGE_ALREADY_ACCEPTED: u64 = 0x0000_0B0A_0000_0000;
    /// The host mapped the range with smaller pages.
    pub const PAGE_SIZE_MISMATCH: u64 = 0xC000_0B0B_0000_0000;
    /// There is no #VE whose information was not fetched.
    pub const NO_VALID_VE_INFO: u64 = 0xC000_0704_0000_0000;

    /// The word without its detail, to be compared with the constants.
    pub const fn code(self) -> u64 {
        self.0 & 0xFFFF_FFFF_0000_0000
    }

    /// Bits 31 to 0: an operand, a level, or nothing.
    pub const fn detail(self) -> u32 {
        self.0 as u32
    }

    /// Returns whether it is exactly SUCCESS.
    pub const fn is_success(self) -> bool {
        self.code() == Self::SUCCESS
    }
}

impl fmt::Display for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code() {
            Self::SUCCESS => f.write_str("SUCCESS"),
            Self::OPERAND_INVALID => write!(f, "OPERAND_INVALID ({:#x})", self.0),
            Self::OPERAND_BUSY => write!(f, "OPERAND_BUSY ({:#x})", self.0),
            Self::PAGE_ALREADY_ACCEPTED => write!(f, "PAGE_ALREADY_ACCEPTED ({:#x})", self.0),
            Self::PAGE_SIZE_MISMATCH => write!(f, "PAGE_SIZE_MISMATCH ({:#x})", self.0),
            Self::NO_VALID_VE_INFO => write!(f, "NO_VALID_VE_INFO ({:#x})", self.0),
            _ => write!(f, "{:#018x}", self.0),
        }
    }
}

impl fmt::Debug for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CompletionStatus({self})")
    }
}

impl core::error::Error for CompletionStatus {}

/// The host's answer in R10 to a TDG.VP.VMCALL (GHCI, "TDG.VP.VMCALL completion status").
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VmcallStatus(pub u64);

impl VmcallStatus {
    /// Done, says the host.
    pub const SUCCESS: Self = Self(0);
    /// Not all is done: call again.
    pub const RETRY: Self = Self(1);
    /// An operand is not valid.
    pub const INVALID_OPERAND: Self = Self(0x8000_0000_0000_0000);
    /// The GPA is in use already.
    pub const GPA_INUSE: Self = Self(0x8000_0000_0000_0001);
    /// A GPA or length is not aligned.
    pub const ALIGN_ERROR: Self = Self(0x8000_0000_0000_0002);
    /// The host has no such sub-function.
    pub const SUBFUNC_UNSUPPORTED: Self = Self(0x8000_0000_0000_0003);
}

impl fmt::Display for VmcallStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SUCCESS => f.write_str("SUCCESS"),
            Self::RETRY => f.write_str("RETRY"),
            Self::INVALID_OPERAND => f.write_str("INVALID_OPERAND"),
            Self::GPA_INUSE => f.write_str("GPA_INUSE"),
            Self::ALIGN_ERROR => f.write_str("ALIGN_ERROR"),
            Self::SUBFUNC_UNSUPPORTED => f.write_str("SUBFUNC_UNSUPPORTED"),
            Self(other) => write!(f, "{other:#018x}"),
        }
    }
}

impl fmt::Debug for VmcallStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmcallStatus({self})")
    }
}

impl core::error::Error for VmcallStatus {}
