//! Turns and time: the processors of a VM execute one after the other, or at the same time, and share one clock.
//!
//! One after the other, a run is the same each time. A turn is also the time at which memory slots may change: a
//! processor keeps pointers to memory, and looks at the generation of the slots when its turn begins. The clock
//! counts instructions. While every processor sleeps, it jumps to the next deadline.
//!
//! At the same time ([`Turns::parallel`]), processors have turns together, and who changes slots has one alone. The
//! clock is the host's, and each processor sleeps on its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::gate::{self, Gate};
use super::order::Order;
use crate::irq::{self, Wake};

#[derive(Debug, Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
    /// Of processors that execute at the same time.
    together: Option<Together>,
}

#[derive(Debug)]
struct Together {
    gate: Gate,
    start: Instant,
    /// The clock at the start: later than 0 once a guest came from another VM, whose time goes on.
    at_start: AtomicU64,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Threads that wait for a change. Without one nothing is notified, which would be a system call.
    waiting: u32,
    /// Tickets: the next one to hand out, and the one whose turn it is.
    next: u64,
    serving: u64,
    /// Tickets that were given up before it was their turn.
    given_up: BTreeSet<u64>,
    /// Ticks since the VM was created.
    clock: u64,
    /// Processors that have run and do not sleep. Time jumps when there is none.
    pub(super) awake: BTreeSet<u32>,
    pub(super) asleep: BTreeMap<u32, Sleeper>,
    /// Processors that are left out of the order.
    absent: BTreeSet<u32>,
    pub(super) order: Order,
    /// The next change of a timer of the platform that interrupts.
    timer: Option<u64>,
}

/// A processor that sleeps until its wake says otherwise.
#[derive(Debug)]
pub(crate) struct Sleeper {
    /// The clock at which it wakes by itself.
    pub(crate) until: Option<u64>,
    pub(crate) wake: Arc<Wake>,
    /// True for messages that wake it.
    pub(crate) hears: fn(&irq::State) -> bool,
}

impl Sleeper {
    /// True if a message came that wakes it.
    pub(super) fn hears(&self) -> bool {
        self.wake.with(self.hears)
    }
}

/// A ticket that waits for its turn. Dropping it gives the place up.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    turns: &'a Turns,
    ticket: u64,
}

/// The right to execute, or to change memory slots.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    /// Held until the turn ends, with processors that execute at the same time; a ticket otherwise.
    held: Option<Held<'a>>,
}

#[derive(Debug)]
#[allow(dead_code)] // Held for their drops.
enum Held<'a> {
    Shared(gate::Shared<'a>),
    Alone(gate::Alone<'a>),
}

impl Turns {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain values; a panic elsewhere leaves nothing half done in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until another thread [notifies](Self::notify), for so long at the most.
    pub(super) fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        longest: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        state.waiting += 1;
        let mut state = match longest {
            None => self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
            Some(longest) => {
                let waited = self.changed.wait_timeout(state, longest);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        state.waiting -= 1;
        state
    }

    /// Wakes all who wait, after a change.
    pub(super) fn notify(&self, state: &State) {
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// For processors that execute at the same time.
    pub(crate) fn parallel() -> Self {
        Self {
            together: Some(Together {
                gate: Gate::default(),
                start: Instant::now(),
                at_start: AtomicU64::new(0),
            }),
            ..Self::default()
        }
    }

    /// True if processors execute at the same time.
    pub(crate) fn is_parallel(&self) -> bool {
        self.together.is_some()
    }

    /// Waits for a turn in which no processor executes: first come, first served.
    pub(crate) fn take(&self) -> Turn<'_> {
        match &self.together {
            None => self.queue().wait(),
            Some(together) => self.turn(Held::Alone(together.gate.alone())),
        }
    }

    /// Waits for a turn to execute in, or to use memory through a processor.
    pub(crate) fn take_to_execute(&self) -> Turn<'_> {
        match &self.together {
            None => self.queue().wait(),
            Some(together) => self.turn(Held::Shared(together.gate.share())),
        }
    }

    fn turn<'a>(&'a self, held: Held<'a>) -> Turn<'a> {
        Turn {
            turns: self,
            held: Some(held),
        }
    }

    /// A place behind all who wait.
    fn queue(&self) -> Place<'_> {
        let mut state = self.lock();
        let ticket = state.next;
        state.next += 1;
        Place {
            turns: self,
            ticket,
        }
    }

    /// Ticks since the VM was created, each a nanosecond.
    pub(crate) fn clock(&self) -> u64 {
        self.host_clock().unwrap_or_else(|| self.lock().clock)
    }

    /// The clock, if it is that of the host. It never goes back, whoever looks.
    pub(crate) fn host_clock(&self) -> Option<u64> {
        self.together.as_ref().map(Together::clock)
    }

    /// The guest of another VM, whose clock is `clock`, goes on here: this clock is no earlier from now on. No processor
    /// executes in either VM.
    #[cfg_attr(not(any(feature = "tdx", feature = "sev")), allow(dead_code))]
    pub(crate) fn go_on_from(&self, clock: u64) {
        match &self.together {
            None => self.take().pass_time(clock),
            Some(together) => {
                let ahead = clock.saturating_sub(together.clock());
                together.at_start.fetch_add(ahead, Ordering::Relaxed);
            }
        }
    }

    /// A processor takes part from now on.
    pub(crate) fn join(&self, id: u32) {
        self.change(|state| state.wake(id));
    }

    /// A processor that joined is gone.
    pub(crate) fn part(&self, id: u32) {
        self.change(|state| {
            state.forget(id);
            state.jump_if_all_sleep();
        });
    }

    /// A processor sleeps.
    pub(crate) fn sleep(&self, id: u32, sleeper: Sleeper) {
        self.change(|state| {
            state.forget(id);
            state.asleep.insert(id, sleeper);
            // Who comes late to sleep has come.
            if let Some(absent) = state.order.absent().filter(|absent| *absent != id) {
                state.leave_out(absent);
            }
            state.wake_who_hear();
            state.wake_due();
            state.jump_if_all_sleep();
        });
    }

    /// The processor is awake again, whatever woke it.
    pub(crate) fn rise(&self, id: u32) {
        self.change(|state| {
            if state.asleep.contains_key(&id) || state.absent.contains(&id) {
                state.wake(id);
            }
        });
    }

    /// Changes who is awake. Processors that execute at the same time are in no order, and time does not wait for
    /// them.
    pub(super) fn change(&self, change: impl FnOnce(&mut State)) {
        if self.is_parallel() {
            return;
        }
        let mut state = self.lock();
        change(&mut state);
        let State { awake, order, .. } = &mut *state;
        if order.settle(awake) {
            self.notify(&state);
        }
    }
}

impl Together {
    fn clock(&self) -> u64 {
        let since = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        since.saturating_add(self.at_start.load(Ordering::Relaxed))
    }
}

impl<'a> Place<'a> {
    /// Waits for the turn.
    pub(crate) fn wait(self) -> Turn<'a> {
        let Self { turns, ticket } = self;
        // The turn gives on what the place would give up.
        std::mem::forget(self);
        let mut state = turns.lock();
        while state.serving != ticket {
            state = turns.wait(state, None);
        }
        Turn { turns, held: None }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        if state.serving == self.ticket {
            state.serve_next();
            self.turns.notify(&state);
        } else {
            state.given_up.insert(self.ticket);
        }
    }
}

impl<'a> Turn<'a> {
    /// A place for the next turn, behind those who wait already. Who queues only after this turn may be behind
    /// the others' next turns, as their threads run before this one does again. `None` for a turn that others have, too.
    pub(crate) fn queue_again(&self) -> Option<Place<'a>> {
        self.held.is_none().then(|| self.turns.queue())
    }

    /// True for a turn that other processors may have, too.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.held, Some(Held::Shared(_)))
    }

    pub(crate) fn clock(&self) -> u64 {
        self.turns.clock()
    }

    /// True if someone waits until this turn ends.
    pub(crate) fn is_wanted(&self) -> bool {
        match &self.turns.together {
            None => {
                let state = self.turns.lock();
                state.next > state.serving + 1
            }
            Some(together) => together.gate.is_wanted(),
        }
    }

    /// The clock is at least `clock` now. That of the host needs nobody to say so.
    pub(crate) fn pass_time(&self, clock: u64) {
        if self.turns.is_parallel() {
            return;
        }
        let mut state = self.turns.lock();
        state.clock = state.clock.max(clock);
        state.wake_due();
    }

    /// The next change of a timer of the platform.
    pub(crate) fn set_timer(&self, at: Option<u64>) {
        if !self.turns.is_parallel() {
            self.turns.lock().timer = at;
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.held.is_some() {
            return;
        }
        let waited = {
            let mut state = self.turns.lock();
            state.serve_next();
            state.waiting > 0
        };
        // Whoever wakes finds the state unlocked.
        if waited {
            self.turns.changed.notify_all();
        }
    }
}

impl State {
    /// The turn is that of the next ticket that was not given up.
    fn serve_next(&mut self) {
        self.serving += 1;
        while self.given_up.remove(&self.serving) {
            self.serving += 1;
        }
    }

    /// A processor is awake.
    pub(super) fn wake(&mut self, id: u32) {
        self.forget(id);
        self.awake.insert(id);
    }

    /// Wakes the processors for which a message came: time does not jump past it until their threads find it.
    pub(super) fn wake_who_hear(&mut self) {
        let hears = |(id, sleeper): (&u32, &Sleeper)| sleeper.hears().then_some(*id);
        let awake: Vec<u32> = self.asleep.iter().filter_map(hears).collect();
        awake.into_iter().for_each(|id| self.wake(id));
    }

    /// A processor is none any more.
    fn forget(&mut self, id: u32) {
        self.awake.remove(&id);
        self.asleep.remove(&id);
        self.absent.remove(&id);
    }

    /// Wakes the sleepers whose time has come.
    fn wake_due(&mut self) {
        let clock = self.clock;
        let due = |sleeper: &Sleeper| sleeper.until.is_some_and(|at| at <= clock);
        let awake = &mut self.awake;
        self.asleep.retain(|id, sleeper| {
            if due(sleeper) {
                sleeper.wake.nudge();
                awake.insert(*id);
            }
            !due(sleeper)
        });
    }

    /// The order goes on without a processor, until it comes.
    pub(super) fn leave_out(&mut self, id: u32) {
        self.forget(id);
        self.absent.insert(id);
        self.jump_if_all_sleep();
    }

    /// With all processors asleep the clock jumps to the next deadline. A timer of the platform is
    /// looked at by the first of them.
    fn jump_if_all_sleep(&mut self) {
        if !self.awake.is_empty() {
            return;
        }
        let sleepers = self.asleep.values().filter_map(|sleeper| sleeper.until);
        let Some(next) = sleepers.chain(self.timer).min() else {
            return;
        };
        self.clock = self.clock.max(next);
        if self.timer.is_some_and(|at| at <= self.clock)
            && let Some((id, first)) = self.asleep.pop_first()
        {
            first.wake.nudge();
            self.awake.insert(id);
        }
        self.wake_due();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn sleeper(until: Option<u64>, wake: &Arc<Wake>) -> Sleeper {
        Sleeper {
            until,
            wake: Arc::clone(wake),
            hears: irq::State::has_mail,
        }
    }

    #[test]
    fn one_holder_at_a_time() {
        let turns = Turns::default();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let _turn = turns.take();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(turns.lock().serving, 2000);
    }

    #[test]
    fn who_queues_during_the_turn_comes_before_those_who_queue_after_it() {
        let turns = Turns::default();
        let turn = turns.take();
        let place = turn.queue_again().unwrap();
        drop(turn);
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _turn = turns.take();
                order.lock().unwrap().push("other");
            });
            while turns.lock().next < 3 {
                std::thread::yield_now();
            }
            let _turn = place.wait();
            order.lock().unwrap().push("first");
        });
        assert_eq!(*order.lock().unwrap(), ["first", "other"]);
    }

    #[test]
    fn a_place_that_is_given_up_is_passed_over() {
        let turns = Turns::default();
        let turn = turns.take();
        let (early, late) = (turn.queue_again().unwrap(), turn.queue_again().unwrap());
        drop(early);
        drop(turn);
        drop(late);
        let turn = turns.take();
        assert!(!turn.is_wanted());
        assert!(turns.lock().given_up.is_empty());
    }

    #[test]
    fn a_turn_is_wanted_while_another_waits_for_it() {
        let turns = Turns::default();
        let turn = turns.take();
        assert!(!turn.is_wanted());
        std::thread::scope(|scope| {
            scope.spawn(|| drop(turns.take()));
            while !turn.is_wanted() {
                std::thread::yield_now();
            }
            drop(turn);
        });
        assert!(!turns.take().is_wanted());
    }

    #[test]
    fn time_jumps_only_while_all_sleep_and_wakes_the_first_deadline() {
        let turns = Turns::default();
        let wakes = [Arc::<Wake>::default(), Arc::default()];
        (0..2).for_each(|id| turns.join(id));
        turns.sleep(0, sleeper(Some(500), &wakes[0]));
        assert_eq!(turns.take().clock(), 0, "the other one executes");
        turns.sleep(1, sleeper(Some(300), &wakes[1]));
        assert_eq!(turns.take().clock(), 300);
        assert_eq!((wakes[0].take_due(), wakes[1].take_due()), (false, true));
        turns.take().pass_time(500);
        assert!(wakes[0].take_due());
        // A timer of the platform wakes the first sleeper.
        turns.take().set_timer(Some(900));
        turns.sleep(0, sleeper(None, &wakes[0]));
        turns.sleep(1, sleeper(Some(1000), &wakes[1]));
        assert_eq!(turns.take().clock(), 900);
        assert_eq!((wakes[0].take_due(), wakes[1].take_due()), (true, false));
        turns.take().set_timer(None);
        turns.part(0);
        assert_eq!(turns.take().clock(), 1000);
    }

    #[test]
    fn time_does_not_jump_past_a_message_that_its_sleeper_has_not_found_yet() {
        let turns = Turns::default();
        let wakes = [Arc::<Wake>::default(), Arc::default()];
        (0..2).for_each(|id| turns.join(id));
        turns.sleep(0, sleeper(Some(500), &wakes[0]));
        wakes[0].post(0x40);
        turns.sleep(1, sleeper(Some(300), &wakes[1]));
        assert_eq!(turns.take().clock(), 0);
        // It has taken the message.
        wakes[0].take_vectors();
        turns.sleep(0, sleeper(Some(500), &wakes[0]));
        assert_eq!(turns.take().clock(), 300);
    }

    #[test]
    fn a_sleeper_that_a_message_woke_is_counted_once() {
        let turns = Turns::default();
        let wake = Arc::<Wake>::default();
        turns.join(0);
        for _ in 0..3 {
            turns.sleep(0, sleeper(None, &wake));
            turns.rise(0);
            turns.rise(0);
        }
        assert_eq!(turns.lock().awake.len(), 1);
        turns.part(0);
        assert!(turns.lock().awake.is_empty());
    }
}
