//! The answer of a call that fails.

use std::fmt;

use kvm_ops_uapi::Errno;
use kvm_ops_uapi::checks::Check;

pub(crate) type Result<T, E = Refusal> = std::result::Result<T, E>;

/// An errno, and the check that it comes from where the kernel's order of checks names one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    errno: Errno,
    check: Option<Check>,
    injected: bool,
}

impl Refusal {
    /// What the caller finds in `errno`.
    pub const fn errno(&self) -> Errno {
        self.errno
    }

    /// The check that failed. `None` where firmware or the software machine refused.
    pub const fn check(&self) -> Option<Check> {
        self.check
    }

    /// True if the call was not made, because a plan of faults says so.
    pub const fn is_injected(&self) -> bool {
        self.injected
    }

    pub(crate) const fn injected(errno: Errno) -> Self {
        Self {
            errno,
            check: None,
            injected: true,
        }
    }
}

impl From<Check> for Refusal {
    fn from(check: Check) -> Self {
        Self {
            errno: check.errno,
            check: Some(check),
            injected: false,
        }
    }
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            check: None,
            injected: false,
        }
    }
}

impl From<kvm_ops::Error> for Refusal {
    fn from(error: kvm_ops::Error) -> Self {
        tracing::debug!(%error, "refused below the interface");
        Errno(error.errno()).into()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.check {
            Some(check) => check.fmt(f),
            None if self.injected => write!(f, "{} (injected)", self.errno),
            None => self.errno.fmt(f),
        }
    }
}

impl std::error::Error for Refusal {}

/// Fails with the check unless its condition holds.
pub(crate) fn ensure(holds: bool, check: Check) -> Result<()> {
    if holds { Ok(()) } else { Err(check.into()) }
}
