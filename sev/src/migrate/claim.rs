//! The flag of a VM whose context moves (Linux `migration_in_progress`).

use kvm_ops::{Error, Result};

use super::sync::{AtomicBool, Ordering};

/// One move at a time for each VM. A move that finds the flag set fails at once, so two moves in
/// opposite directions cannot deadlock, whatever the order of their claims.
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
