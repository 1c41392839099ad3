//! The step of a TD's life, which vCPU threads read and the owner moves on.

use core::sync::atomic::{AtomicU8, Ordering};

use kvm_ops::Step;

/// A [`Step`] that threads share.
#[derive(Debug)]
pub(crate) struct StepCell(AtomicU8);

impl StepCell {
    pub(crate) const fn new() -> Self {
        Self(AtomicU8::new(Step::Created as u8))
    }

    pub(crate) fn get(&self) -> Step {
        let raw = self.0.load(Ordering::Acquire);
        // Only `set` and `poison` write it, and only steps.
        Step::ALL
            .into_iter()
            .find(|step| *step as u8 == raw)
            .unwrap_or(Step::Poisoned)
    }

    pub(crate) fn set(&self, to: Step) {
        self.0.store(to as u8, Ordering::Release);
    }

    /// Poisons a TD whose key is in use. Without its key a TD has nothing left that could break.
    pub(crate) fn poison(&self) {
        let _ = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |raw| {
                (raw < Step::KeyReleased as u8).then_some(Step::Poisoned as u8)
            });
    }
}
