//! The way in for processors that execute at the same time, and for work during which none of them does.
//!
//! First come, first served. Who holds the gate with others asks [`is_wanted`](Gate::is_wanted) every now and then,
//! leaves if it says so, and comes back behind the one who wants to be alone.

#[cfg(loom)]
use loom::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};
use std::sync::PoisonError;
#[cfg(not(loom))]
use std::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};

/// How often who waits gives its processor away before it sleeps: the others leave soon, and to sleep and wake takes
/// longer.
#[cfg(not(loom))]
const YIELDS: u32 = 50;

#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Someone waits to be alone: a hint, that no decision hangs on.
    wanted: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// Tickets: the next one to hand out, and the one whose turn it is.
    next: u64,
    serving: u64,
    /// Holders that share the gate.
    inside: u32,
    /// Tickets of those who wait to be alone.
    alone: u32,
    /// Threads that sleep. Without one nothing is notified, which would be a system call.
    asleep: u32,
}

/// The right to execute beside others. None is alone meanwhile.
#[derive(Debug)]
pub(crate) struct Shared<'a>(&'a Gate);

/// The right to work while nobody else has a right.
#[derive(Debug)]
pub(crate) struct Alone<'a>(&'a Gate);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain values; a panic elsewhere leaves nothing half done in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready`.
    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        ready: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        #[cfg(not(loom))]
        for _ in 0..YIELDS {
            if ready(&state) {
                return state;
            }
            drop(state);
            std::thread::yield_now();
            state = self.lock();
        }
        while !ready(&state) {
            state.asleep += 1;
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.asleep -= 1;
        }
        state
    }

    fn notify(&self, state: &State) {
        if state.asleep > 0 {
            self.changed.notify_all();
        }
    }

    /// Waits for the right to execute beside others.
    pub(crate) fn share(&self) -> Shared<'_> {
        let mut state = self.lock();
        let ticket = state.next;
        state.next += 1;
        state = self.wait(state, |state| state.serving == ticket);
        state.inside += 1;
        // The next one may share it, too.
        state.serving += 1;
        self.notify(&state);
        Shared(self)
    }

    /// Waits for the right to be alone.
    pub(crate) fn alone(&self) -> Alone<'_> {
        let mut state = self.lock();
        let ticket = state.next;
        state.next += 1;
        state.alone += 1;
        self.wanted.store(true, Ordering::Relaxed);
        state = self.wait(state, |state| state.serving == ticket && state.inside == 0);
        state.alone -= 1;
        self.wanted.store(state.alone > 0, Ordering::Relaxed);
        Alone(self)
    }

    /// True if someone waits to be alone.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.inside -= 1;
        if state.inside == 0 {
            self.0.notify(&state);
        }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.serving += 1;
        self.0.notify(&state);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn who_is_alone_is_alone_and_those_who_share_are_together() {
        let gate = Gate::default();
        let (a, b) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for n in 0..6 {
                let (gate, a, b) = (&gate, &a, &b);
                scope.spawn(move || {
                    for _ in 0..500 {
                        if n < 2 {
                            let _alone = gate.alone();
                            a.store(a.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                            b.store(b.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                        } else {
                            let _shared = gate.share();
                            let seen = (a.load(Ordering::Relaxed), b.load(Ordering::Relaxed));
                            assert_eq!(seen.0, seen.1);
                        }
                    }
                });
            }
        });
        assert_eq!(a.into_inner(), 1000);
        let (_one, _other) = (gate.share(), gate.share());
    }

    #[test]
    fn who_wants_to_be_alone_comes_before_those_who_come_later() {
        let gate = Gate::default();
        let order = Mutex::new(Vec::new());
        let shared = gate.share();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _alone = gate.alone();
                order.lock().unwrap().push("alone");
            });
            while !gate.is_wanted() {
                std::thread::yield_now();
            }
            scope.spawn(|| {
                let _shared = gate.share();
                order.lock().unwrap().push("shared");
            });
            while gate.lock().next < 3 {
                std::thread::yield_now();
            }
            drop(shared);
        });
        assert_eq!(*order.lock().unwrap(), ["alone", "shared"]);
        assert!(!gate.is_wanted());
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --release -p kvm-ops-sim --lib gate`
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    struct Guarded {
        gate: Gate,
        value: UnsafeCell<u32>,
    }

    // SAFETY: the value is read by those who share the gate, and written by who is alone; the model checks it.
    unsafe impl Sync for Guarded {}

    impl Guarded {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                gate: Gate::default(),
                value: UnsafeCell::new(0),
            })
        }

        fn look(&self) -> u32 {
            let _shared = self.gate.share();
            // SAFETY: as above.
            self.value.with(|value| unsafe { *value })
        }

        fn add(&self) {
            let _alone = self.gate.alone();
            // SAFETY: as above.
            self.value.with_mut(|value| unsafe { *value += 1 });
        }
    }

    #[test]
    fn nobody_shares_the_gate_with_who_is_alone_and_everybody_comes_in() {
        loom::model(|| {
            let guarded = Guarded::new();
            let other = Arc::clone(&guarded);
            let shares = thread::spawn(move || (other.look(), other.look()));
            let other = Arc::clone(&guarded);
            let alone = thread::spawn(move || other.add());
            let seen = guarded.look();
            let (first, second) = shares.join().unwrap();
            alone.join().unwrap();
            assert!(first <= second && second <= 1 && seen <= 1);
            assert_eq!(guarded.look(), 1);
        });
    }

    #[test]
    fn two_who_want_to_be_alone_are_alone_one_after_the_other() {
        loom::model(|| {
            let guarded = Guarded::new();
            let other = Arc::clone(&guarded);
            let alone = thread::spawn(move || other.add());
            guarded.add();
            alone.join().unwrap();
            assert_eq!(guarded.look(), 2);
            assert!(!guarded.gate.is_wanted());
        });
    }

    #[test]
    fn who_stays_until_it_is_wanted_lets_the_other_in() {
        loom::model(|| {
            let guarded = Guarded::new();
            let other = Arc::clone(&guarded);
            let alone = thread::spawn(move || other.add());
            while {
                let _shared = guarded.gate.share();
                // SAFETY: as above.
                let waits = guarded.value.with(|value| unsafe { *value } == 0);
                // It executes until somebody wants to be alone.
                while waits && !guarded.gate.is_wanted() {
                    thread::yield_now();
                }
                waits
            } {}
            alone.join().unwrap();
        });
    }
}
