//! The flag of a VM whose guest moves (Linux `migration_in_progress`).

use super::sync::{AtomicBool, Ordering};
use crate::{Error, Result};

/// One move at a time for each VM. A move that finds the flag set fails at once, so two moves in
/// opposite directions cannot deadlock, whatever the order of their claims.
#[derive(Debug)]
pub struct Claim(AtomicBool);

impl Claim {
    /// A VM that no move involves.
    pub(super) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Claims the VM.
    ///
    /// # Errors
    /// [`Error::Busy`] while somebody else has it.
    pub fn claim(&self) -> Result<Claimed<'_>> {
        match self
            .0
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
        {
            Ok(_) => Ok(Claimed(self)),
            Err(_) => Err(Error::Busy),
        }
    }

    /// Claims the VM; waits while another move involves it, with a turn of `relax` between the looks.
    pub fn wait(&self, mut relax: impl FnMut()) -> Claimed<'_> {
        loop {
            match self.claim() {
                Ok(claimed) => return claimed,
                Err(_) => relax(),
            }
        }
    }
}

/// A claim that is held until the value is dropped.
#[must_use]
#[derive(Debug)]
pub struct Claimed<'a>(&'a Claim);

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::Release);
    }
}
