//! SIGINT and SIGTERM: the first signal stops the machines in an orderly way, the second ends the
//! process at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops_machine::Stopper;

use crate::exit_code::Code;
use crate::failure::Failure;
use crate::term;

/// A handle to the machines that a signal stops.
#[derive(Clone, Default)]
pub(crate) struct Interrupt(Arc<State>);

#[derive(Default)]
struct State {
    seen: AtomicBool,
    stoppers: Mutex<Vec<Stopper>>,
}

impl Interrupt {
    /// Installs the signal handler. Call it once per process.
    pub(crate) fn install() -> Result<Self, Failure> {
        let interrupt = Self::default();
        let handle = interrupt.clone();
        ctrlc::set_handler(move || handle.signal())
            .map_err(|error| Failure::because("cannot take over SIGINT", error))?;
        Ok(interrupt)
    }

    /// Adds a machine to stop. It is stopped at once if a signal has already come.
    pub(crate) fn stops(&self, stopper: Stopper) {
        self.stoppers().push(stopper.clone());
        if self.seen() {
            stopper.stop();
        }
    }

    /// Returns true if a signal has come.
    pub(crate) fn seen(&self) -> bool {
        self.0.seen.load(Ordering::SeqCst)
    }

    /// Forgets the machines, after they are gone.
    pub(crate) fn clear(&self) {
        self.stoppers().clear();
    }

    fn signal(&self) {
        if self.0.seen.swap(true, Ordering::SeqCst) {
            std::process::exit(Code::Interrupted as i32);
        }
        term::complain("interrupted: stopping the guests; once more ends at once");
        for stopper in self.stoppers().iter() {
            stopper.stop();
        }
    }

    fn stoppers(&self) -> MutexGuard<'_, Vec<Stopper>> {
        // Nothing panics while it holds the lock.
        self.0
            .stoppers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
