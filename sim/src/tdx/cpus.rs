//! Logical processors: the assignment of threads to processors, and the order of turns.
//!
//! A real thread has its processor to itself while it runs. Here threads may be more than
//! processors, and a processor executes for one at a time, in the order in which they came. One
//! that waits behind a guest has it interrupted once it ran for a slice of time, as a scheduler's
//! timer would.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Time that a guest runs before a thread that waits for its processor interrupts it.
const SLICE: Duration = Duration::from_millis(1);

/// The processors of one machine.
#[derive(Debug)]
pub(crate) struct Cpus {
    cpus: Box<[Cpu]>,
    /// The number of threads on each.
    threads: Mutex<Box<[u32]>>,
}

#[derive(Debug, Default)]
struct Cpu {
    /// Kicks sent here so far.
    kicks: AtomicU64,
    queue: Mutex<Queue>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// The ticket of the next to come.
    next: u64,
    /// The ticket whose turn it is.
    serving: u64,
    /// Since when.
    since: Option<Instant>,
}

/// The right to execute on a processor.
pub(crate) struct Turn<'a>(&'a Cpu);

/// The processor of a thread. It is given back when the thread ends.
struct Seat {
    cpus: Weak<Cpus>,
    cpu: usize,
}

thread_local! {
    static SEATS: RefCell<Vec<Seat>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(cpus) = self.cpus.upgrade() {
            cpus.threads()[self.cpu] -= 1;
        }
    }
}

impl Cpu {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Three plain values; nothing panics while they change.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cpus {
    pub(crate) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            cpus: (0..count).map(|_| Cpu::default()).collect(),
            threads: Mutex::new(vec![0; count].into()),
        })
    }

    fn threads(&self) -> MutexGuard<'_, Box<[u32]>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The processor of the calling thread: its old one, else the one with the fewest threads.
    /// `online` tells the processors that may be used; with none online, the first one is used.
    pub(crate) fn this(self: &Arc<Self>, online: impl Fn(usize) -> bool) -> usize {
        SEATS.with_borrow_mut(|seats| {
            let mine = seats
                .iter()
                .position(|seat| Weak::as_ptr(&seat.cpus) == Arc::as_ptr(self));
            match mine {
                Some(i) if online(seats[i].cpu) => return seats[i].cpu,
                Some(i) => drop(seats.swap_remove(i)),
                None => seats.retain(|seat| seat.cpus.strong_count() != 0),
            }
            let mut threads = self.threads();
            let cpu = (0..threads.len())
                .filter(|cpu| online(*cpu))
                .min_by_key(|cpu| threads[*cpu])
                .unwrap_or(0);
            threads[cpu] += 1;
            let cpus = Arc::downgrade(self);
            seats.push(Seat { cpus, cpu });
            cpu
        })
    }

    /// Sends a processor a kick, which also reaches those who wait for it now.
    pub(crate) fn kick(&self, cpu: usize) {
        if let Some(this) = self.cpus.get(cpu) {
            this.kicks.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Waits for the processor. `interrupt` makes the guest that runs there leave it, or the next
    /// that enters: a kick that came while this thread waited may have ended another's run only.
    pub(crate) fn take(&self, cpu: usize, interrupt: impl Fn()) -> Option<Turn<'_>> {
        let this = self.cpus.get(cpu)?;
        let kicks = this.kicks.load(Ordering::SeqCst);
        let mut queue = this.queue();
        let ticket = queue.next;
        queue.next += 1;
        while queue.serving != ticket {
            queue = this
                .moved
                .wait_timeout(queue, SLICE)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            let served = queue.since.is_some_and(|since| since.elapsed() >= SLICE);
            if queue.serving != ticket && served {
                interrupt();
            }
        }
        queue.since = Some(Instant::now());
        drop(queue);
        if this.kicks.load(Ordering::SeqCst) != kicks {
            interrupt();
        }
        Some(Turn(this))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.serving += 1;
        if queue.serving != queue.next {
            self.0.moved.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    #[test]
    fn threads_spread_over_the_processors_and_leave_their_place_when_they_end() {
        let cpus = Cpus::new(4);
        for _ in 0..3 {
            let barrier = std::sync::Barrier::new(4);
            let mut used: Vec<usize> = std::thread::scope(|scope| {
                let on_cpu = || {
                    let cpu = cpus.this(|_| true);
                    barrier.wait();
                    assert_eq!(cpus.this(|_| true), cpu, "a thread stays");
                    cpu
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(on_cpu)).collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            used.sort_unstable();
            assert_eq!(used, [0, 1, 2, 3]);
        }
    }

    #[test]
    fn a_thread_moves_when_its_processor_goes_offline() {
        let cpus = Cpus::new(2);
        let first = cpus.this(|_| true);
        assert_ne!(cpus.this(|cpu| cpu != first), first);
    }

    #[test]
    fn one_executes_at_a_time_and_whoever_waits_interrupts_who_stays() {
        let cpus = Cpus::new(1);
        let (inside, interrupted) = (AtomicUsize::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        let turn = cpus.take(0, || interrupted.store(true, Ordering::Release));
                        assert_eq!(inside.fetch_add(1, Ordering::AcqRel), 0);
                        // Spins until another thread wants the processor; behind the last one none waits.
                        let start = Instant::now();
                        while !interrupted.swap(false, Ordering::AcqRel)
                            && start.elapsed() < 50 * SLICE
                        {
                            std::thread::yield_now();
                        }
                        inside.fetch_sub(1, Ordering::AcqRel);
                        drop(turn);
                    }
                });
            }
        });
        assert!(cpus.take(1, || ()).is_none(), "there is no second one");
    }

    #[test]
    fn a_kick_reaches_those_who_wait_and_not_those_who_come_later() {
        let cpus = Cpus::new(1);
        let interrupts = AtomicUsize::new(0);
        let count = || {
            interrupts.fetch_add(1, Ordering::SeqCst);
        };
        let held = cpus.take(0, || ());
        // No thread runs for a slice: only the kick interrupts.
        cpus.cpus[0].queue().since = None;
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| drop(cpus.take(0, count)));
            while cpus.cpus[0].queue().next != 2 {
                std::thread::yield_now();
            }
            cpus.kick(0);
            drop(held);
            waits.join().unwrap();
        });
        assert_eq!(interrupts.load(Ordering::SeqCst), 1);
        drop(cpus.take(0, count));
        assert_eq!(interrupts.load(Ordering::SeqCst), 1);
    }
}
