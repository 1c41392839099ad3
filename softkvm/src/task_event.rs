//! Eventfds of a process in software.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_ops_uapi::Errno;

use crate::{EventFd, Watch};

type Wake = Arc<dyn Fn() + Send + Sync>;

/// A counter, and what is called for it.
pub(crate) struct Event {
    id: u64,
    state: Mutex<State>,
    this: Weak<Self>,
}

#[derive(Default)]
struct State {
    count: u64,
    wake: Option<Wake>,
}

impl Event {
    pub(crate) fn new() -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new_cyclic(|this| Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            state: Mutex::default(),
            this: Weak::clone(this),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the counter, which is 0 then.
    pub(crate) fn take(&self) -> u64 {
        std::mem::take(&mut self.lock().count)
    }

    /// Calls who watches, if there is something to tell.
    fn tell(&self) {
        let wake = {
            let mut state = self.lock();
            let wake = state.wake.clone().filter(|_| state.count != 0);
            if wake.is_some() {
                state.count = 0;
            }
            wake
        };
        // Not under the lock: it may signal others, and this one.
        if let Some(wake) = wake {
            wake();
        }
    }
}

impl EventFd for Event {
    fn id(&self) -> u64 {
        self.id
    }

    fn signal(&self) {
        {
            let mut state = self.lock();
            state.count = state.count.saturating_add(1);
        }
        self.tell();
    }

    fn watch(&self, wake: Box<dyn Fn() + Send + Sync>) -> Result<Box<dyn Watch>, Errno> {
        {
            let mut state = self.lock();
            if state.wake.is_some() {
                return Err(Errno::EBUSY);
            }
            state.wake = Some(wake.into());
        }
        self.tell();
        Ok(Box::new(Watched(Weak::clone(&self.this))))
    }
}

struct Watched(Weak<Event>);

impl Watch for Watched {}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(event) = self.0.upgrade() {
            event.lock().wake = None;
        }
    }
}
