//! SIGINT and SIGTERM: the first stops the machines in an orderly way, the second ends at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops_machine::Stopper;

use crate::exit_code::Code;
use crate::failure::Failure;
use crate::term;

/// What a signal stops. A handle.
#[derive(Clone, Default)]
pub(crate) struct Interrupt(Arc<State>);

#[derive(Default)]
struct State {
    seen: AtomicBool,
    stoppers: Mutex<Vec<Stopper>>,
}

impl Interrupt {
    /// Takes the signals over. Once in a process.
    pub(crate) fn install() -> Result<Self, Failure> {
        let interrupt = Self::default();
        let handle = interrupt.clone();
        ctrlc::set_handler(move || handle.signal())
            .map_err(|error| Failure::because("cannot take over SIGINT", error))?;
        Ok(interrupt)
    }

    /// Has the signal stop this machine too; at once, if it came already.
    pub(crate) fn stops(&self, stopper: Stopper) {
        self.stoppers().push(stopper.clone());
        if self.seen() {
            stopper.stop();
        }
    }

    /// Whether a signal came.
    pub(crate) fn seen(&self) -> bool {
        self.0.seen.load(Ordering::SeqCst)
    }

    /// Forgets the machines; they are gone.
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
        // Nothing panics under the lock.
        self.0
            .stoppers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
