//! Guest programs written as `async` functions: each action of the guest is awaited.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use kvm_ops_core::guest::{Action, GuestFault, Outcome};
use kvm_ops_core::{Gpa, SharedMask};

/// An action that owns what it writes.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Read { gpa: Gpa, len: usize },
    Write { gpa: Gpa, data: Vec<u8> },
    Share { gpa: Gpa, pages: u64 },
    Hypercall { nr: u64, args: [u64; 4] },
    Tdvmcall { leaf: u64, args: [u64; 4] },
    Tdcall { leaf: u64, args: [u64; 8] },
}

impl Step {
    fn action(&self) -> Action<'_> {
        match self {
            Self::Read { gpa, len } => Action::Read {
                gpa: *gpa,
                len: *len,
            },
            Self::Write { gpa, data } => Action::Write { gpa: *gpa, data },
            Self::Share { gpa, pages } => Action::Share {
                gpa: *gpa,
                pages: *pages,
            },
            Self::Hypercall { nr, args } => Action::Hypercall {
                nr: *nr,
                args: *args,
            },
            Self::Tdvmcall { leaf, args } => Action::Tdvmcall {
                leaf: *leaf,
                args: *args,
            },
            Self::Tdcall { leaf, args } => Action::TdcallWith {
                leaf: *leaf,
                args: *args,
            },
        }
    }
}

/// The outcome of a step.
#[derive(Clone, Debug)]
pub(crate) enum Done {
    Plain,
    Data(Vec<u8>),
    Value(u64),
    Values([u64; 6]),
    Fault(GuestFault),
}

impl Done {
    fn of(outcome: Outcome<'_>) -> Self {
        match outcome {
            Outcome::Data(data) => Self::Data(data.to_vec()),
            Outcome::Value(value) => Self::Value(value),
            Outcome::Values(values) => Self::Values(values),
            Outcome::Fault(fault) => Self::Fault(fault),
            _ => Self::Plain,
        }
    }
}

#[derive(Default)]
struct Shared {
    mask: Option<SharedMask>,
    wanted: Option<Step>,
    done: Option<Done>,
}

/// The guest, as the `async` function sees it.
#[derive(Clone, Default)]
pub(crate) struct Guest(Arc<Mutex<Shared>>);

impl Guest {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        // No panic happens under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mask for shared and private addresses.
    pub(crate) fn mask(&self) -> SharedMask {
        self.lock().mask.unwrap_or(SharedMask::NONE)
    }

    /// Takes a step.
    pub(crate) async fn step(&self, step: Step) -> Done {
        let mut step = Some(step);
        std::future::poll_fn(|_| {
            let mut shared = self.lock();
            if let Some(step) = step.take() {
                (shared.wanted, shared.done) = (Some(step), None);
                return Poll::Pending;
            }
            match shared.done.take() {
                Some(done) => Poll::Ready(done),
                None => Poll::Pending,
            }
        })
        .await
    }
}

/// An `async` function that is driven as a guest program.
pub(crate) struct Driven {
    guest: Guest,
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
    step: Option<Step>,
}

impl Driven {
    pub(crate) fn new<F>(program: impl FnOnce(Guest) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let guest = Guest::default();
        Self {
            future: Box::pin(program(guest.clone())),
            guest,
            step: None,
        }
    }

    /// The next action: a shutdown once the function has returned.
    pub(crate) fn next(&mut self, last: Outcome<'_>) -> Action<'_> {
        {
            let mut shared = self.guest.lock();
            if let Outcome::Start { mask, .. } = last {
                shared.mask = Some(mask);
            }
            shared.done = Some(Done::of(last));
        }
        let mut context = Context::from_waker(Waker::noop());
        self.step = match self.future.as_mut().poll(&mut context) {
            Poll::Ready(()) => {
                self.future = Box::pin(std::future::pending());
                None
            }
            Poll::Pending => self.guest.lock().wanted.take(),
        };
        self.step.as_ref().map_or(Action::Shutdown, Step::action)
    }
}
