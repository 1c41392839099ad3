//! Why a conversion stopped, and what is left of it.

use super::{CompletionStatus, VmcallStatus};
use crate::{GpaRange, PageSize};
use core::fmt;

/// A conversion or an acceptance that stopped before its end.
///
/// Everything of the range before [`rest`](Self::rest) is done. The pages of `rest` are in **no known
/// state**: the host may have converted some of it, all or nothing, whatever it said. The guest
/// must not use those pages again, neither as private memory (they may be shared) nor give them
/// back to its allocator. It may try the conversion again; otherwise it keeps them out of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvertError {
    /// The part that was not done.
    pub rest: GpaRange,
    /// Why.
    pub cause: Cause,
}

impl fmt::Display for ConvertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "conversion stopped before {}", self.rest)
    }
}

impl core::error::Error for ConvertError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// Why a conversion stopped.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The TDX module refused the TDCALL.
    Module(CompletionStatus),
    /// The host refused MapGPA.
    Host {
        /// Its answer.
        status: VmcallStatus,
        /// The address where it claims to have stopped.
        at: u64,
    },
    /// The host answers RETRY and does nothing.
    NoProgress {
        /// The number of times in a row.
        tries: u32,
    },
    /// The host answers RETRY with an address that is not a page of what remains. Going on from
    /// there would skip pages, convert some twice, or convert pages that the guest did not ask for.
    RetryOutside {
        /// The address, as the host gave it.
        answer: u64,
    },
    /// Something that should be locked for a moment is locked for ever.
    Busy {
        /// The number of times in a row.
        tries: u32,
        /// The last status.
        status: CompletionStatus,
    },
    /// A page that should be new to the guest is in use as private already: see
    /// [`AlreadyAccepted`](super::AlreadyAccepted).
    AlreadyAccepted {
        /// The size that was to be accepted.
        size: PageSize,
    },
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Module(status) => write!(f, "the tdx module answered {status}"),
            Self::Host { status, at } => write!(f, "the host answered {status} at {at:#x}"),
            Self::NoProgress { tries } => {
                write!(f, "the host answered RETRY {tries} times without progress")
            }
            Self::RetryOutside { answer } => {
                write!(f, "the host wants a retry at {answer:#x}, outside the rest")
            }
            Self::Busy { tries, status } => write!(f, "{status}, {tries} times in a row"),
            Self::AlreadyAccepted { size } => write!(f, "the {size} page was accepted before"),
        }
    }
}

impl core::error::Error for Cause {}
