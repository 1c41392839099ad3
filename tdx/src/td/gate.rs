//! The gate that every TDH.VP.ENTER passes.
//!
//! Hold the gate to keep vCPUs out temporarily; close it to keep them out for good. A vCPU first
//! marks itself as inside, then looks at the gate; a holder first moves the gate, then looks for
//! vCPUs inside. Both in sequentially consistent order, so one of the two sees the other.

use core::sync::atomic::{AtomicU32, Ordering};

const CLOSED: u32 = 1 << 31;

#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicU32);

/// The state of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GateState {
    Open,
    /// A thread works with all vCPUs out; it opens again soon.
    Held,
    /// It never opens again.
    Closed,
}

impl Gate {
    pub(crate) fn look(&self) -> GateState {
        match self.0.load(Ordering::SeqCst) {
            0 => GateState::Open,
            raw if raw & CLOSED != 0 => GateState::Closed,
            _ => GateState::Held,
        }
    }

    /// Lets no vCPU in until the value is dropped. Those inside stay.
    pub(crate) fn hold(&self) -> Held<'_> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Held(self)
    }

    /// Undoes one [`hold`](Self::hold) whose value was forgotten.
    pub(crate) fn let_go(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }

    pub(crate) fn close(&self) {
        self.0.fetch_or(CLOSED, Ordering::SeqCst);
    }
}

#[must_use]
pub(crate) struct Held<'a>(&'a Gate);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.let_go();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_when_the_last_holder_lets_go_and_never_once_closed() {
        let gate = Gate::default();
        let (a, b) = (gate.hold(), gate.hold());
        drop(a);
        assert_eq!(gate.look(), GateState::Held);
        drop(b);
        assert_eq!(gate.look(), GateState::Open);
        let held = gate.hold();
        gate.close();
        drop(held);
        assert_eq!(gate.look(), GateState::Closed);
    }
}
