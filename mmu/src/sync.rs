//! Atomics: the processor's, or those of the model checker.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicBool, Ordering};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, Ordering};

/// Nothing but for the model checker, which takes SeqCst accesses for AcqRel ones and has a total
/// order of SeqCst fences only.
#[inline(always)]
pub(crate) fn total_order() {
    #[cfg(loom)]
    loom::sync::atomic::fence(Ordering::SeqCst);
}
