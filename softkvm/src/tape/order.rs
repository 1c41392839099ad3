//! The order in which a program's threads take its locks. It decides what one of them finds that the other left.

use std::collections::{BTreeMap, HashMap};
use std::thread::{self, ThreadId};
use std::time::Instant;

use super::format::{Call, Step};
use super::play::{Inner, Mismatch};
use super::record::Recorder;
use super::turns::Waited;

/// A lock of a recorded run.
#[derive(Default)]
pub(super) struct Taken {
    /// How often threads of the record have taken it.
    count: u64,
    last: Option<ThreadId>,
}

impl Recorder {
    /// The calling thread has taken a lock, and holds it. Only hand-overs are written down: the number of the taking, where another
    /// thread of the record took the lock before.
    pub(crate) fn took(&self, lock: &str) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let own = thread::current().id();
        let Some(looks) = state.looks.get_mut(&own) else {
            return;
        };
        let taken = state.taken.entry(lock.to_owned()).or_default();
        taken.count += 1;
        if taken.last.replace(own) != Some(own) {
            looks.push(Step::Lock(lock.to_owned(), taken.count));
        }
    }
}

/// The hand-overs of each lock: the number of the taking, and the thread of the record.
pub(super) type HandOvers = HashMap<String, BTreeMap<u64, u32>>;

pub(super) fn hand_overs(calls: &[Call]) -> HandOvers {
    let mut all = HandOvers::new();
    for call in calls {
        for step in &call.steps {
            if let Step::Lock(lock, number) = step {
                let of_lock = all.entry(lock.clone()).or_default();
                of_lock.insert(*number, call.thread);
            }
        }
    }
    all
}

/// A lock in a replay.
#[derive(Default)]
pub(super) struct Held {
    count: u64,
    is_held: bool,
    /// Threads that wait for their turn.
    waiting: u32,
}

/// Who may take a lock.
#[derive(PartialEq, Eq)]
enum Turn {
    /// The calling thread, after another one.
    HandOver,
    /// The calling thread again.
    Own,
    /// Another thread.
    Other,
    /// The record does not say: the thread has made no call, or the record has no more of its hand-overs.
    Unknown,
}

impl Inner {
    fn whose(&self, state: &super::play::State, lock: &str) -> Turn {
        let own = state.threads.get(&thread::current().id());
        let (Some(own), Some(hand_overs)) = (own, self.hand_overs.get(lock)) else {
            return Turn::Unknown;
        };
        let next = state.held.get(lock).map_or(0, |held| held.count) + 1;
        if hand_overs.get(&next) == Some(own) {
            return Turn::HandOver;
        }
        let owner = hand_overs.range(..=next).next_back();
        if owner.is_some_and(|(_, owner)| owner == own) {
            return Turn::Own;
        }
        match hand_overs.range(next..).any(|(_, thread)| thread == own) {
            true => Turn::Other,
            false => Turn::Unknown,
        }
    }

    /// Waits until the calling thread may take a lock. False if the order does not matter.
    pub(super) fn wait_for_lock(&self, lock: &str) -> Result<bool, Mismatch> {
        let late = Instant::now() + self.patience;
        let mut state = self.lock();
        loop {
            match self.whose(&state, lock) {
                Turn::HandOver | Turn::Own => return Ok(true),
                Turn::Unknown => return Ok(false),
                Turn::Other => {}
            }
            let held = state.held.entry(lock.to_owned()).or_default();
            held.waiting += 1;
            let waited = self.wait(state, late);
            state = match waited {
                Waited::On(mut state) => {
                    if let Some(held) = state.held.get_mut(lock) {
                        held.waiting -= 1;
                    }
                    state
                }
                Waited::Over(call) => {
                    let got = format!(
                        "a thread waits for the lock {lock}, which another one does not take"
                    );
                    return Err(self.mismatch(call, got));
                }
            };
        }
    }

    pub(super) fn took(&self, lock: &str) {
        let mut state = self.lock();
        let held = state.held.entry(lock.to_owned()).or_default();
        held.count += 1;
        held.is_held = true;
        drop(state);
        self.moved.notify_all();
    }

    pub(super) fn released(&self, lock: &str) {
        if let Some(held) = self.lock().held.get_mut(lock) {
            held.is_held = false;
        }
    }

    /// True if the program comes no further without the calling thread: the next call of the record is its own, or the next
    /// taking of a lock that is free, and another thread had it or waits for it.
    pub(super) fn is_awaited(&self) -> bool {
        let state = self.lock();
        let Some(own) = state.threads.get(&thread::current().id()) else {
            return false;
        };
        if self
            .calls
            .get(state.next)
            .is_some_and(|call| call.thread == *own)
        {
            return true;
        }
        self.hand_overs.keys().any(|lock| {
            let held = state.held.get(lock);
            let is_free = held.is_none_or(|held| !held.is_held);
            let others_wait = held.is_some_and(|held| held.waiting != 0);
            is_free
                && match self.whose(&state, lock) {
                    Turn::HandOver => true,
                    Turn::Own => others_wait,
                    Turn::Other | Turn::Unknown => false,
                }
        })
    }
}
