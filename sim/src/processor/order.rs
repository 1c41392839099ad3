//! The order in which the processors of a TD or SEV guest execute: one after the other, each for a share of instructions.
//!
//! A processor keeps its place while its host serves an exit. So the next one executes from where the others are, and
//! not from where their threads happen to be: a run with several vCPUs is the same each time.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::time::{Duration, Instant};

use super::turns::{State, Turns};

/// Instructions of a share.
const SHARE: u64 = 20_000;
/// Instructions after which PAUSE ends a share. A thread change costs about as much.
const PATIENCE: u64 = 1_000;

/// The time that a processor waits for its share at once: then its thread looks for kicks.
const WAIT: Duration = Duration::from_millis(1);
/// The time after which a processor that has the share and does not come is left out until it does.
const ABSENT: Duration = Duration::from_secs(1);

/// The processor whose share it is.
#[derive(Debug)]
pub(super) struct Order {
    holder: Option<u32>,
    left: u64,
    executing: bool,
    /// Since when the holder has the share, or when it last executed.
    since: Instant,
}

impl Default for Order {
    fn default() -> Self {
        Self {
            holder: None,
            left: 0,
            executing: false,
            since: Instant::now(),
        }
    }
}

impl Order {
    /// Gives the share to the next one that is awake.
    fn pass(&mut self, awake: &BTreeSet<u32>) {
        let after = self.holder.map_or(Bound::Unbounded, Bound::Excluded);
        let next = awake.range((after, Bound::Unbounded)).next();
        if let Some(next) = next.or(awake.first()) {
            self.holder = Some(*next);
            self.left = SHARE;
            self.since = Instant::now();
        }
    }

    /// Gives the share on if its holder sleeps. True if it did.
    pub(super) fn settle(&mut self, awake: &BTreeSet<u32>) -> bool {
        let before = self.holder;
        if before.is_none_or(|id| !awake.contains(&id)) {
            self.pass(awake);
        }
        self.holder != before
    }

    /// The instructions that a processor may execute now.
    fn share_of(&mut self, id: u32, awake: &BTreeSet<u32>) -> Option<u64> {
        if self.holder == Some(id) && self.left == 0 {
            self.pass(awake);
        }
        (self.holder == Some(id)).then_some(self.left)
    }

    /// The holder, if it has been away for long.
    pub(super) fn absent(&self) -> Option<u32> {
        let away = !self.executing && self.since.elapsed() >= ABSENT;
        self.holder.filter(|_| away)
    }

    fn spend(&mut self, instructions: u64, pauses: bool) {
        self.executing = false;
        self.since = Instant::now();
        self.left = self.left.saturating_sub(instructions);
        if pauses && SHARE - self.left >= PATIENCE {
            self.left = 0;
        }
    }
}

impl Turns {
    /// Waits for the share of a processor, for a short while. Returns the instructions that it may execute, which it
    /// then [spends](Self::spend).
    pub(crate) fn share(&self, id: u32) -> Option<u64> {
        self.rise(id);
        let end = Instant::now() + WAIT;
        let mut state = self.lock();
        loop {
            let State { order, awake, .. } = &mut *state;
            let before = order.holder;
            if let Some(left) = order.share_of(id, awake) {
                order.executing = true;
                return Some(left);
            }
            if let Some(absent) = order.absent() {
                state.leave_out(absent);
            }
            let State { order, awake, .. } = &mut *state;
            order.settle(awake);
            if order.holder != before {
                self.notify(&state);
                continue;
            }
            let left = end.checked_duration_since(Instant::now())?;
            state = self.wait(state, Some(left));
        }
    }

    /// The processor executed that many instructions of its share, and stopped at a PAUSE or not.
    pub(crate) fn spend(&self, id: u32, instructions: u64, pauses: bool) {
        let mut state = self.lock();
        if state.order.holder == Some(id) {
            state.order.spend(instructions, pauses);
        }
    }

    /// Wakes the processors for which a message came: at once, and not when their threads find it.
    pub(crate) fn heard(&self) {
        self.change(State::wake_who_hear);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::irq::{self, Wake};
    use crate::processor::Sleeper;

    fn sleeper(until: Option<u64>, wake: &Arc<Wake>) -> Sleeper {
        Sleeper {
            until,
            wake: Arc::clone(wake),
            hears: irq::State::has_mail,
        }
    }

    #[test]
    fn shares_go_round_by_number_and_an_exit_keeps_the_place() {
        let turns = Turns::default();
        [1, 3, 7].into_iter().for_each(|id| turns.join(id));
        for _ in 0..2 {
            for id in [1, 3, 7] {
                assert_eq!(turns.share(id), Some(SHARE));
                turns.spend(id, 5, false);
                // Another one asks in vain.
                assert_eq!(turns.share(if id == 1 { 7 } else { 1 }), None);
                assert_eq!(turns.share(id), Some(SHARE - 5));
                turns.spend(id, SHARE - 5, false);
                // It is passed on when the holder comes back.
                assert_eq!(turns.share(id), None);
            }
        }
    }

    #[test]
    fn a_pause_ends_a_share_that_has_lasted() {
        let turns = Turns::default();
        [0, 1].into_iter().for_each(|id| turns.join(id));
        assert!(turns.share(0).is_some());
        turns.spend(0, PATIENCE - 1, true);
        assert_eq!(turns.share(0), Some(SHARE - PATIENCE + 1));
        turns.spend(0, 1, true);
        assert_eq!((turns.share(0), turns.share(1)), (None, Some(SHARE)));
    }

    #[test]
    fn a_message_wakes_a_sleeper_before_its_thread_comes() {
        let turns = Turns::default();
        let wakes = [Arc::<Wake>::default(), Arc::default()];
        [0, 1].into_iter().for_each(|id| turns.join(id));
        turns.sleep(1, sleeper(None, &wakes[1]));
        assert!(turns.share(0).is_some());
        wakes[1].post(0x40);
        turns.heard();
        turns.spend(0, SHARE, false);
        assert_eq!(turns.share(0), None, "it is the other one's share");
        assert_eq!(turns.share(1), Some(SHARE));
    }

    #[test]
    fn one_that_comes_late_to_sleep_keeps_its_deadline() {
        let turns = Turns::default();
        let wake = Arc::<Wake>::default();
        turns.join(0);
        assert!(turns.share(0).is_some());
        turns.spend(0, 5, false);
        std::thread::sleep(ABSENT);
        turns.sleep(0, sleeper(Some(500), &wake));
        assert_eq!(turns.take().clock(), 500);
        assert!(wake.take_due());
    }

    #[test]
    fn one_that_does_not_come_is_left_out_until_it_does() {
        let turns = Turns::default();
        [0, 1].into_iter().for_each(|id| turns.join(id));
        let start = Instant::now();
        let share = loop {
            if let Some(share) = turns.share(1) {
                break share;
            }
        };
        assert!(start.elapsed() >= ABSENT);
        turns.spend(1, share, false);
        assert_eq!(turns.share(1), Some(SHARE), "it is alone");
        assert_eq!(turns.share(0), None, "it is in the round again");
        turns.spend(1, SHARE, false);
        assert_eq!((turns.share(1), turns.share(0)), (None, Some(SHARE)));
    }
}
