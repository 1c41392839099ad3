//! The gate at the entry into the guest: hold vCPUs out by closing it.

use core::sync::atomic::{AtomicU32, Ordering};

const CLOSED: u32 = 1 << 31;

/// Counts the vCPUs that are inside.
#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicU32);

impl Gate {
    /// `None` while it is closed.
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        let entered = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |seen| {
                (seen & CLOSED == 0).then_some(seen + 1)
            });
        entered.ok().map(|_| Inside(&self.0))
    }

    /// Lets no vCPU in until [`open`](Self::open).
    pub(crate) fn close(&self) {
        self.0.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Lets vCPUs in again.
    pub(crate) fn open(&self) {
        self.0.fetch_and(!CLOSED, Ordering::AcqRel);
    }

    /// The number of vCPUs inside.
    pub(crate) fn inside(&self) -> u32 {
        self.0.load(Ordering::Acquire) & !CLOSED
    }
}

/// A vCPU that is inside.
pub(crate) struct Inside<'a>(&'a AtomicU32);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_lets_no_vcpu_in_and_counts_those_inside() {
        let gate = Gate::default();
        let (a, b) = (gate.enter(), gate.enter());
        assert_eq!(gate.inside(), 2);
        gate.close();
        assert!(gate.enter().is_none());
        drop((a, b));
        assert_eq!(gate.inside(), 0);
        assert!(gate.enter().is_none());
        gate.open();
        assert!(gate.enter().is_some());
    }
}
