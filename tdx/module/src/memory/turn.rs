//! Turns at the memory that the processors of a TD have open.

#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

/// The turns at the open pages of one key, in the order in which they were asked for: one has a turn alone, or several
/// processors have turns together.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    queue: Mutex<Queue>,
    moved: Condvar,
    closed: AtomicU64,
    written: AtomicU64,
}

/// Tickets: the next to hand out, and the one whose turn it is.
#[derive(Debug, Default)]
struct Queue {
    next: u64,
    serving: u64,
    /// Turns that are had together.
    inside: u32,
}

/// The right to use the bytes of [`GuestFrame`](super::GuestFrame)s of a TD by their pointers, until it is dropped. The
/// module itself takes a turn alone when it touches such a page, on any thread: a thread that has one must not call
/// the module, but for [`Platform::guest_page`](crate::Platform::guest_page),
/// [`Platform::guest_try_read`](crate::Platform::guest_try_read) and
/// [`Platform::guest_try_write`](crate::Platform::guest_try_write).
#[derive(Debug)]
pub struct GuestTurn {
    turns: Arc<Turns>,
    is_shared: bool,
}

impl Queue {
    /// Someone waits: a notification is a system call, whether a thread waits or not.
    fn is_awaited(&self) -> bool {
        self.next != self.serving
    }
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Plain values; a panic elsewhere leaves nothing half done in them.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a ticket, and waits until it is served and `ready`.
    fn queue(&self, ready: impl Fn(&Queue) -> bool) -> MutexGuard<'_, Queue> {
        let mut queue = self.lock();
        let ticket = queue.next;
        queue.next += 1;
        while queue.serving != ticket || !ready(&queue) {
            queue = self
                .moved
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue
    }

    fn turn(self: &Arc<Self>, is_shared: bool) -> GuestTurn {
        GuestTurn {
            turns: self.clone(),
            is_shared,
        }
    }

    /// Waits for a turn that nobody else has.
    pub(crate) fn take(self: &Arc<Self>) -> GuestTurn {
        drop(self.queue(|queue| queue.inside == 0));
        self.turn(false)
    }

    /// Waits for a turn that others may share.
    pub(crate) fn share(self: &Arc<Self>) -> GuestTurn {
        let mut queue = self.queue(|_| true);
        queue.inside += 1;
        // The next one may share it, too.
        queue.serving += 1;
        let awaited = queue.is_awaited();
        drop(queue);
        if awaited {
            self.moved.notify_all();
        }
        self.turn(true)
    }

    /// Takes a turn alone if no thread has or awaits one.
    pub(super) fn try_take(self: &Arc<Self>) -> Option<GuestTurn> {
        let mut queue = self.lock();
        let is_free = !queue.is_awaited() && queue.inside == 0;
        queue.next += u64::from(is_free);
        is_free.then(|| self.turn(false))
    }

    /// A page was closed: whoever has a pointer to it asks again.
    pub(super) fn note_closed(&self) {
        self.closed.fetch_add(1, Ordering::AcqRel);
    }

    /// The module wrote to an open page.
    pub(super) fn note_written(&self) {
        self.written.fetch_add(1, Ordering::AcqRel);
    }
}

impl GuestTurn {
    /// How often a frame of the TD was taken back. It does not change while the turn lasts.
    #[must_use]
    pub fn closed(&self) -> u64 {
        self.turns.closed.load(Ordering::Acquire)
    }

    /// How often the module wrote to a frame of the TD: a report, zeros, what a debugger writes. A processor that keeps
    /// decoded code compares it with memory when this is another number. It does not change while the turn lasts.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.turns.written.load(Ordering::Acquire)
    }

    /// True for a turn alone at these pages.
    pub(super) fn is_at(&self, turns: &Arc<Turns>) -> bool {
        Arc::ptr_eq(&self.turns, turns) && !self.is_shared
    }
}

impl Drop for GuestTurn {
    fn drop(&mut self) {
        let awaited = {
            let mut queue = self.turns.lock();
            match self.is_shared {
                true => queue.inside -= 1,
                false => queue.serving += 1,
            }
            queue.inside == 0 && queue.is_awaited()
        };
        if awaited {
            self.turns.moved.notify_all();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn who_is_alone_is_alone_and_each_gets_a_turn() {
        let turns = Arc::<Turns>::default();
        let (inside, together) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for n in 0..5 {
                let (turns, inside, together) = (&turns, &inside, &together);
                scope.spawn(move || {
                    for _ in 0..500 {
                        if n > 1 {
                            let turn = turns.share();
                            together.fetch_add(1, Ordering::SeqCst);
                            assert_eq!(inside.load(Ordering::SeqCst), 0);
                            together.fetch_sub(1, Ordering::SeqCst);
                            drop(turn);
                            continue;
                        }
                        let taken = if n == 0 { turns.try_take() } else { None };
                        let turn = taken.unwrap_or_else(|| turns.take());
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        assert_eq!(together.load(Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
        });
        assert!(turns.try_take().is_some());
    }

    #[test]
    fn processors_have_turns_together_and_nobody_else_has_one_then() {
        let turns = Arc::<Turns>::default();
        let (one, other) = (turns.share(), turns.share());
        assert!(turns.try_take().is_none());
        drop(one);
        assert!(turns.try_take().is_none());
        drop(other);
        let alone = turns.try_take().unwrap();
        assert!(turns.try_take().is_none());
        assert!(alone.is_at(&turns) && !alone.is_at(&Arc::default()));
        drop(alone);
        assert!(turns.try_take().is_some());
    }

    #[test]
    fn who_wants_to_be_alone_comes_before_processors_that_come_later() {
        let turns = Arc::<Turns>::default();
        let order = Mutex::new(Vec::new());
        let first = turns.share();
        std::thread::scope(|scope| {
            let (turns, order) = (&turns, &order);
            scope.spawn(|| {
                let _alone = turns.take();
                order.lock().unwrap().push("alone");
            });
            while turns.lock().next != 2 {
                std::thread::yield_now();
            }
            scope.spawn(|| {
                let _shared = turns.share();
                order.lock().unwrap().push("shared");
            });
            while turns.lock().next != 3 {
                std::thread::yield_now();
            }
            drop(first);
        });
        assert_eq!(*order.lock().unwrap(), ["alone", "shared"]);
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --release -p soft-tdx-module --lib turn`
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use loom::thread;

    /// Two words that the module changes alone, one after the other: in a turn, processors see both as one change left them.
    #[derive(Default)]
    struct Page {
        turns: Arc<Turns>,
        words: [AtomicU32; 2],
    }

    impl Page {
        fn look(&self) -> u32 {
            let _turn = self.turns.share();
            let [first, second] = [&self.words[0], &self.words[1]].map(|word| word.load(Relaxed));
            assert_eq!(first, second);
            first
        }

        fn add(&self, turn: GuestTurn) {
            let [first, second] =
                [&self.words[0], &self.words[1]].map(|word| word.fetch_add(1, Relaxed));
            assert_eq!(first, second);
            drop(turn);
        }
    }

    #[test]
    fn the_module_writes_alone_and_everybody_gets_a_turn() {
        loom::model(|| {
            let page = Arc::new(Page::default());
            let other = page.clone();
            let processor = thread::spawn(move || (other.look(), other.look()));
            let other = page.clone();
            let module = thread::spawn(move || other.add(other.turns.take()));
            let seen = page.look();
            let (first, second) = processor.join().unwrap();
            module.join().unwrap();
            assert!(first <= second && second <= 1 && seen <= 1);
            assert_eq!(page.look(), 1);
        });
    }

    #[test]
    fn who_takes_a_turn_only_if_it_is_free_disturbs_nobody() {
        loom::model(|| {
            let page = Arc::new(Page::default());
            let other = page.clone();
            let module = thread::spawn(move || match other.turns.try_take() {
                Some(turn) => {
                    other.add(turn);
                    1
                }
                None => 0,
            });
            page.add(page.turns.take());
            let seen = page.look();
            let added = module.join().unwrap();
            assert!((1..=1 + added).contains(&seen));
            assert_eq!(page.look(), 1 + added);
        });
    }
}
