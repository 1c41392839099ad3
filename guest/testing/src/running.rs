//! Code of a guest on this thread: how it is left where its vCPU does not run on.

use std::any::Any;
use std::cell::Cell;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// The thread runs code of a guest for as long as this lives.
struct Running;

impl Running {
    fn enter() -> Self {
        DEPTH.set(DEPTH.get() + 1);
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// Runs code of a guest. The error is the value with which it was [left](leave); panics of the code go
/// on.
pub(crate) fn run<R, S: Any>(guest: impl FnOnce() -> R) -> Result<R, S> {
    let running = Running::enter();
    let result = catch_unwind(AssertUnwindSafe(guest));
    drop(running);
    result.or_else(|cause| match cause.downcast::<S>() {
        Ok(stopped) => Err(*stopped),
        Err(other) => resume_unwind(other),
    })
}

/// Leaves the code of a guest for the innermost [`run`]. Outside of it: a panic with the reason.
pub(crate) fn leave<S: Any + Send + Display>(stopped: S) -> ! {
    if DEPTH.get() > 0 {
        resume_unwind(Box::new(stopped));
    }
    panic!("{stopped}");
}
