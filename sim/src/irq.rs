//! Kicks and interrupts: what wakes a vCPU from outside.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use kvm_ops::Kick;

/// What waits for one vCPU. Shared by the vCPU, its kick handles and its VM.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    kicked: bool,
    /// Vectors that wait for the guest to halt, one bit each: the IRR of a local APIC.
    pending: [u64; 4],
}

impl State {
    /// The highest vector first, as a local APIC delivers them.
    fn take_vector(&mut self) -> Option<u8> {
        for (i, word) in self.pending.iter_mut().enumerate().rev() {
            if *word != 0 {
                let bit = 63 - word.leading_zeros();
                *word &= !(1 << bit);
                return Some((i as u32 * 64 + bit) as u8);
            }
        }
        None
    }
}

/// Why a halt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    Kicked,
    Interrupt(u8),
}

impl Wake {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is two plain values; a panic elsewhere leaves nothing half done in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take_kick(&self) -> bool {
        std::mem::take(&mut self.lock().kicked)
    }

    pub(crate) fn take_vector(&self) -> Option<u8> {
        self.lock().take_vector()
    }

    pub(crate) fn post(&self, vector: u8) {
        self.lock().pending[usize::from(vector / 64)] |= 1 << (vector % 64);
        self.changed.notify_all();
    }

    pub(crate) fn cancel(&self) {
        self.lock().pending = [0; 4];
    }

    pub(crate) fn has_pending(&self) -> bool {
        self.lock().pending != [0; 4]
    }

    /// Blocks until a kick or an interrupt comes. A kick wins, and leaves the interrupt pending.
    pub(crate) fn wait(&self) -> Woken {
        let mut state = self.lock();
        loop {
            if std::mem::take(&mut state.kicked) {
                return Woken::Kicked;
            }
            if let Some(vector) = state.take_vector() {
                return Woken::Interrupt(vector);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Kick for Wake {
    fn kick(&self) {
        self.lock().kicked = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_come_highest_first_and_once() {
        let wake = Wake::default();
        for vector in [16, 255, 63, 64, 255] {
            wake.post(vector);
        }
        let order: Vec<u8> = std::iter::from_fn(|| wake.take_vector()).collect();
        assert_eq!(order, [255, 64, 63, 16]);
    }

    #[test]
    fn a_kick_before_the_wait_is_not_lost_and_keeps_the_interrupt() {
        let wake = Wake::default();
        wake.post(32);
        wake.kick();
        assert_eq!(wake.wait(), Woken::Kicked);
        assert_eq!(wake.wait(), Woken::Interrupt(32));
    }
}
