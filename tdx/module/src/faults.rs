//! The machine around the module: clock, model-specific registers, and faults armed by a test.

use crate::arena::lock;
use crate::leaf::HostLeaf;
use crate::status::Status;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Events a processor can have pending.
pub mod pending {
    /// External interrupt.
    pub const INTR: u8 = 1;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// System management interrupt.
    pub const SMI: u8 = 4;
}

/// How PCONFIG fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum KeyEngineFault {
    /// Not enough entropy for a key.
    Entropy,
    /// Another processor uses the key engine.
    Busy,
}

/// A fault for [`crate::Platform::inject`]. Counted faults replace an earlier count of their kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Fault {
    /// The next `count` executions of RDRAND fail.
    Rdrand {
        /// How many.
        count: u32,
    },
    /// The next `count` executions of RDSEED fail.
    Rdseed {
        /// How many.
        count: u32,
    },
    /// The next `count` executions of PCONFIG fail so.
    KeyEngine {
        /// How.
        outcome: KeyEngineFault,
        /// How many.
        count: u32,
    },
    /// Someone writes IA32_TSC_ADJUST.
    TscAdjust(u64),
    /// Someone sets or clears IA32_MISC_ENABLE.LIMIT_CPUID_MAXVAL.
    LimitCpuidMaxval(bool),
    /// The TSC jumps.
    TscAdd(i64),
    /// The `nth` call of a leaf from now on (1 is the next) returns `status` and does nothing.
    ForceStatus {
        /// Which leaf.
        leaf: HostLeaf,
        /// Which call of it.
        nth: u64,
        /// What it returns.
        status: Status,
    },
}

/// Armed faults and registers.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    rdrand: AtomicU32,
    rdseed: AtomicU32,
    pconfig: Mutex<Option<(KeyEngineFault, u32)>>,
    pub(crate) tsc_adjust: AtomicU64,
    pub(crate) limit_cpuid_maxval: AtomicBool,
    tsc: AtomicU64,
    any_forced: AtomicBool,
    forced: Mutex<HashMap<HostLeaf, Vec<(u64, Status)>>>,
}

fn take_one(count: &AtomicU32) -> bool {
    // The common case reads only, so that processors do not fight for the line.
    count.load(Ordering::Relaxed) != 0
        && count
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |n| n.checked_sub(1))
            .is_ok()
}

impl Machine {
    pub(crate) fn new() -> Self {
        // Any start value will do, but one that leaves room to jump back from.
        Machine {
            tsc: AtomicU64::new(1 << 40),
            ..Machine::default()
        }
    }

    pub(crate) fn inject(&self, fault: Fault) {
        match fault {
            Fault::Rdrand { count } => self.rdrand.store(count, Ordering::Release),
            Fault::Rdseed { count } => self.rdseed.store(count, Ordering::Release),
            Fault::KeyEngine { outcome, count } => {
                *lock(&self.pconfig) = (count > 0).then_some((outcome, count));
            }
            Fault::TscAdjust(v) => self.tsc_adjust.store(v, Ordering::Release),
            Fault::LimitCpuidMaxval(v) => self.limit_cpuid_maxval.store(v, Ordering::Release),
            Fault::TscAdd(ticks) => {
                self.advance(ticks as u64);
            }
            Fault::ForceStatus { leaf, nth, status } => {
                lock(&self.forced)
                    .entry(leaf)
                    .or_default()
                    .push((nth.max(1), status));
                self.any_forced.store(true, Ordering::Release);
            }
        }
    }

    pub(crate) fn rdrand(&self) -> bool {
        !take_one(&self.rdrand)
    }

    /// Four random words within the given number of tries.
    pub(crate) fn rdseed_four(&self, tries: u32) -> bool {
        let mut got = 0;
        for _ in 0..tries {
            got += u32::from(!take_one(&self.rdseed));
            if got == 4 {
                return true;
            }
        }
        false
    }

    pub(crate) fn pconfig(&self) -> Result<(), KeyEngineFault> {
        let mut armed = lock(&self.pconfig);
        match armed.take() {
            None => Ok(()),
            Some((fault, count)) => {
                *armed = (count > 1).then_some((fault, count - 1));
                Err(fault)
            }
        }
    }

    pub(crate) fn tsc(&self) -> u64 {
        self.tsc.load(Ordering::Acquire)
    }

    pub(crate) fn advance(&self, ticks: u64) -> u64 {
        self.tsc
            .fetch_add(ticks, Ordering::AcqRel)
            .wrapping_add(ticks)
    }

    /// The status forced on this call of a leaf, if any.
    pub(crate) fn forced(&self, leaf: HostLeaf) -> Option<Status> {
        if !self.any_forced.load(Ordering::Acquire) {
            return None;
        }
        let mut forced = lock(&self.forced);
        let list = forced.get_mut(&leaf)?;
        let mut result = None;
        list.retain_mut(|(left, status)| {
            *left -= 1;
            if *left == 0 {
                result = Some(*status);
            }
            *left != 0
        });
        if list.is_empty() {
            forced.remove(&leaf);
            self.any_forced.store(!forced.is_empty(), Ordering::Release);
        }
        result
    }
}
