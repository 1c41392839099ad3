//! The flag of a VM whose context is on the move (Linux `migration_in_progress`).

use kvm_ops::{Error, Result};

use super::sync::{AtomicBool, Ordering};

/// One move at a time for each VM. Whoever finds the flag set is told so and does not wait: two
/// moves in opposite directions cannot deadlock, whatever the order in which they claim.
pub(crate) struct Claim(AtomicBool);

impl Claim {
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Claims the VM.
    pub(crate) fn claim(&self) -> Result<Claimed<'_>> {
        match self
            .0
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
        {
            Ok(_) => Ok(Claimed(self)),
            Err(_) => Err(Error::Busy),
        }
    }
}

/// A claim that is held.
pub(crate) struct Claimed<'a>(&'a Claim);

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::Release);
    }
}
