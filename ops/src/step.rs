//! The steps of a VM's life, and what is allowed in which.

use core::fmt;

/// A step of a VM's life. A VM only moves forward, and any step may lead to
/// [`Poisoned`](Step::Poisoned).
///
/// ```text
/// Created --vm_init--> Initialized --vm_finalize--> Runnable
///    |                      |                          |
///    +----------------------+----- mmu_release_hkid ---+--> KeyReleased
///                                                             |
///                                        drain_private --> Drained --vm_free--> (gone)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// The VM exists; it may hold a memory key, but has no parameters yet.
    Created,
    /// Parameters are set; vCPUs, slots and initial pages may be added.
    Initialized,
    /// The initial contents are closed; vCPUs may run.
    Runnable,
    /// The memory key is gone; nothing runs any more.
    KeyReleased,
    /// All private pages are given back; only the VM itself is left.
    Drained,
    /// An operation failed in a way that cannot be undone; only the teardown is allowed.
    Poisoned,
}

impl Step {
    /// Every step.
    pub const ALL: [Step; 6] = [
        Self::Created,
        Self::Initialized,
        Self::Runnable,
        Self::KeyReleased,
        Self::Drained,
        Self::Poisoned,
    ];

    /// `Ok` if this is `wanted`, else [`Error::WrongState`](crate::Error::WrongState), or
    /// [`Error::Poisoned`](crate::Error::Poisoned) for a poisoned VM.
    #[inline]
    pub const fn require(self, wanted: Step) -> crate::Result<()> {
        self.require_one_of(&[wanted])
    }

    /// As [`require`](Self::require), with several steps that will do.
    #[inline]
    pub const fn require_one_of(self, wanted: &[Step]) -> crate::Result<()> {
        let mut i = 0;
        while i < wanted.len() {
            if wanted[i] as u8 == self as u8 {
                return Ok(());
            }
            i += 1;
        }
        Err(match self {
            Self::Poisoned => crate::Error::Poisoned,
            _ => crate::Error::WrongState(self),
        })
    }

    /// `Ok` while the VM's key is in use and nothing failed: slots and vCPUs may change.
    #[inline]
    pub const fn require_live(self) -> crate::Result<()> {
        self.require_one_of(&[Self::Initialized, Self::Runnable])
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created but not initialised",
            Self::Initialized => "initialised but not finalised",
            Self::Runnable => "runnable",
            Self::KeyReleased => "without its key",
            Self::Drained => "drained",
            Self::Poisoned => "poisoned",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn only_the_wanted_steps_pass_and_poison_has_its_own_error() {
        for at in Step::ALL {
            for wanted in Step::ALL {
                let expected = match at {
                    _ if at == wanted => Ok(()),
                    Step::Poisoned => Err(Error::Poisoned),
                    _ => Err(Error::WrongState(at)),
                };
                assert_eq!(at.require(wanted), expected);
            }
            let live = matches!(at, Step::Initialized | Step::Runnable);
            assert_eq!(at.require_live().is_ok(), live);
        }
    }
}
