//! A processor whose VM executes its processors at the same time, each on the thread of its vCPU.

use std::time::Duration;

use kvm_ops_cpu::{Cpu, Stopped};

use super::{Next, Processor, Turn};
use crate::irq;

/// Instructions after which a processor looks whether somebody wants to be alone, and for messages: some 10 us.
const SLICE: u64 = 2_000;
/// Slices of a turn, after which the timers of the platform are looked at.
const SLICES: u32 = 10;

impl Processor {
    /// Executes as long as nothing else is to be done, for a turn at the most.
    pub(super) fn execute_beside_others(&mut self, turn: &Turn<'_>) -> Stopped {
        for _ in 0..SLICES {
            self.cpu.advance_to(turn.clock());
            let stopped = self.in_memory(|cpu| cpu.run(SLICE));
            match stopped {
                Stopped::Budget => {}
                // The one that it waits for may need the host's processor.
                Stopped::Paused => std::thread::yield_now(),
                stopped => return stopped,
            }
            if turn.is_wanted() || self.wake.is_called() {
                break;
            }
        }
        Stopped::Budget
    }

    /// Does what the processor cannot do while others execute.
    pub(super) fn run_alone(&mut self) -> Next {
        let vm = std::sync::Arc::clone(&self.vm);
        let turn = vm.turns.take();
        self.shared.mmio().begin();
        self.cpu.advance_to(turn.clock());
        let stopped = self.with_memory(turn.is_shared(), Cpu::run_alone);
        self.count();
        self.stopped(stopped)
    }

    /// Sleeps until the host's clock, which is `now`, is `until`, a timer of the platform changes or a message comes.
    /// Returns false if a kick ended it.
    pub(super) fn sleep_on_host(&self, now: u64, until: Option<u64>) -> bool {
        let until = until.into_iter().chain(self.timer).min();
        let time = until.map(|at| Duration::from_nanos(at.saturating_sub(now)));
        self.wake.wait_at_most(time, irq::State::any_mail)
    }
}
