//! Why a conversion stopped, and what is left of it.

use super::RmpCode;
use crate::{GpaRange, PageSize};
use core::fmt;

/// A conversion, validation or adjustment that stopped before its end.
///
/// Everything of the range before [`rest`](Self::rest) is done. The pages of `rest` are in **no known
/// state**: some of it may be validated, cleared, shared, or as it was. The guest keeps it out of
/// use; see the TDX counterpart, [`tdx::ConvertError`](crate::tdx::ConvertError).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvertError {
    /// The part that was not done.
    pub rest: GpaRange,
    /// Why.
    pub cause: Cause,
}

impl fmt::Display for ConvertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stopped before {}", self.rest)
    }
}

impl core::error::Error for ConvertError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// Why it stopped.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// PVALIDATE or RMPADJUST refused.
    Rmp {
        /// Its code.
        code: RmpCode,
        /// The size that was tried.
        size: PageSize,
    },
    /// PVALIDATE found the page as it should become: see [`Unchanged`](super::Unchanged).
    Unchanged {
        /// The size that was tried.
        size: PageSize,
    },
    /// The host refused a page state change, with this error.
    PageState(u32),
    /// The host's response in the GHCB MSR is none to the request.
    Response(u64),
    /// The host refused KVM_HC_MAP_GPA_RANGE, with this answer (a negated errno).
    Hypercall(i64),
    /// The answer given to the machine is not of the step that it asked for.
    OutOfStep,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rmp { code, size } => write!(f, "{code} for a {size} page"),
            Self::Unchanged { size } => {
                write!(
                    f,
                    "pvalidate changed nothing at the {size} page: it was so before"
                )
            }
            Self::PageState(error) => write!(f, "the host refused the page state: {error:#x}"),
            Self::Response(msr) => write!(f, "no response to the request: {msr:#018x}"),
            Self::Hypercall(answer) => write!(f, "the host answered {answer} to the hypercall"),
            Self::OutOfStep => f.write_str("answer to another step"),
        }
    }
}

impl core::error::Error for Cause {}
