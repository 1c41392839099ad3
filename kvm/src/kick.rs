//! Kicks: making a vCPU leave the guest from another thread, so that none is ever lost.
//!
//! Two things make `KVM_RUN` return `EINTR`: the byte `immediate_exit` in the page that a vCPU
//! shares with the kernel, which the kernel reads when `KVM_RUN` starts; and a signal, which it
//! looks for before each entry to the guest and which interrupts a running guest. Alone either
//! loses kicks: a byte that is set after the kernel read it, a signal that is handled before
//! `KVM_RUN` starts. Together they cover each other:
//!
//! * the kicker sets the byte first, then, if the vCPU is inside `vcpu_run`, sends the signal;
//! * if the signal is handled before `KVM_RUN` starts, the byte was set before that, and the
//!   kernel sees it;
//! * if the signal comes after the kernel read the byte, it is pending or interrupts the guest.
//!
//! The byte stays set until a `vcpu_run` returns `Interrupted`, so a kick that comes while the
//! vCPU is on its way out with another exit, or not in `vcpu_run` at all, ends the next one. The
//! kernel completes a pending I/O or MMIO access before it looks at the byte, so the data that the embedder
//! filled in is never lost either; of an MMIO access that it splits, the other parts come first.
//!
//! One mutex holds which thread is inside `vcpu_run`. The kicker keeps it while it signals, and
//! the vCPU takes it on the way out, so the thread that is signalled is still inside `vcpu_run`:
//! it cannot have ended, nor have become another vCPU's. The same mutex holds the shared page,
//! which goes when the vCPU does. Taking an uncontended mutex twice costs far less than the exit.

use std::mem;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::Kick;

use crate::run_page::RunPage;
use crate::signal;

/// The state that a vCPU shares with its kick handles.
#[derive(Debug)]
pub(crate) struct Kicker {
    signal: libc::c_int,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` when the vCPU is gone.
    page: Option<Arc<RunPage>>,
    /// The thread that is inside `vcpu_run`.
    running: Option<libc::pthread_t>,
    /// True while no `vcpu_run` has answered the last kick.
    kicked: bool,
}

impl Kicker {
    /// For the vCPU of that page; `signal` comes from [`signal::kick_signal`].
    pub(crate) fn new(page: Arc<RunPage>, signal: libc::c_int) -> Arc<Self> {
        Arc::new(Self {
            signal,
            state: Mutex::new(State {
                page: Some(page),
                running: None,
                kicked: false,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that panics runs under the lock; were it poisoned, the state would be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread goes into `KVM_RUN`; it has left when the guard is dropped.
    pub(crate) fn enter(&self) -> Running<'_> {
        signal::unblock(self.signal);
        // SAFETY: `pthread_self` has no conditions.
        self.state().running = Some(unsafe { libc::pthread_self() });
        Running {
            kicker: self,
            interrupted: false,
        }
    }

    /// As [`enter`](Self::enter), for a `KVM_RUN` that only completes the last exit: it returns at
    /// once, as if kicked, and answers no kick.
    pub(crate) fn enter_to_finish(&self) -> Running<'_> {
        let running = self.enter();
        if let Some(page) = &self.state().page {
            page.immediate_exit().store(1, Ordering::SeqCst);
        }
        running
    }

    /// The vCPU is gone: handles do nothing from now on.
    pub(crate) fn retire(&self) {
        self.state().page = None;
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        let mut state = self.state();
        if mem::replace(&mut state.kicked, true) {
            // An earlier kick is not yet answered: it set the byte before this `vcpu_run` began,
            // or it has sent the signal.
            return;
        }
        let Some(page) = &state.page else { return };
        page.immediate_exit().store(1, Ordering::SeqCst);
        if let Some(thread) = state.running {
            // SAFETY: the thread is alive, because it is inside `vcpu_run` and cannot leave
            // without the lock that this function holds; the signal has a handler.
            unsafe { libc::pthread_kill(thread, self.signal) };
        }
    }
}

/// A thread inside `vcpu_run`.
pub(crate) struct Running<'a> {
    kicker: &'a Kicker,
    /// True if `vcpu_run` returns `Interrupted`, which answers every kick so far.
    pub(crate) interrupted: bool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.kicker.state();
        state.running = None;
        state.kicked &= !self.interrupted;
        let kicked = state.kicked;
        if let Some(page) = &state.page {
            page.immediate_exit().store(kicked.into(), Ordering::SeqCst);
        }
    }
}
