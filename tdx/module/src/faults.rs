//! The machine around the module: clock, model-specific registers, and faults armed by a test.

use crate::arena::lock;
use crate::leaf::HostLeaf;
use crate::status::{Code, Operand, Status};
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

/// Failures of PCONFIG.
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
        /// Number of failures.
        count: u32,
    },
    /// The next `count` executions of RDSEED fail.
    Rdseed {
        /// Number of failures.
        count: u32,
    },
    /// The next `count` executions of PCONFIG fail with `outcome`.
    KeyEngine {
        /// The failure.
        outcome: KeyEngineFault,
        /// Number of failures.
        count: u32,
    },
    /// Software outside the module writes IA32_TSC_ADJUST.
    TscAdjust(u64),
    /// Software outside the module sets or clears IA32_MISC_ENABLE.LIMIT_CPUID_MAXVAL.
    LimitCpuidMaxval(bool),
    /// The TSC jumps.
    TscAdd(i64),
    /// From now on, `per_mille` of 1000 calls fail as they may on a busy machine: locks taken, no entropy, key
    /// engine in use. Which ones follows from the seed, the processor and how many calls it has made, so a
    /// run with one thread a processor can be repeated. A failing call does nothing, and leaves all registers
    /// but RAX alone. 0 ends it.
    Transient {
        /// Seed.
        seed: u64,
        /// Calls of 1000 that fail.
        per_mille: u16,
    },
    /// The `nth` call of a leaf from now on (1 is the next) returns `status` and does nothing.
    ForceStatus {
        /// The leaf.
        leaf: HostLeaf,
        /// Number of the call, from 1.
        nth: u64,
        /// Status it returns.
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
    /// State of the generator behind RDRAND and RDSEED.
    random: AtomicU64,
    tsc: AtomicU64,
    any_forced: AtomicBool,
    forced: Mutex<HashMap<HostLeaf, Vec<(u64, Status)>>>,
    transient_per_mille: AtomicU32,
    transient_seed: AtomicU64,
}

fn take_one(count: &AtomicU32) -> bool {
    // The common case reads only, so that processors do not fight for the line.
    count.load(Ordering::Relaxed) != 0
        && count
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |n| n.checked_sub(1))
            .is_ok()
}

impl Machine {
    /// The machine at power-on; `random` is the state of its random-number generator.
    pub(crate) fn new(random: u64) -> Self {
        Machine {
            random: AtomicU64::new(random),
            tsc: AtomicU64::new(TSC_AT_POWER_ON),
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
            Fault::Transient { seed, per_mille } => {
                self.transient_seed.store(seed, Ordering::Release);
                self.transient_per_mille
                    .store(per_mille.into(), Ordering::Release);
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

    pub(crate) fn rdrand(&self) -> Option<u64> {
        (!take_one(&self.rdrand)).then(|| self.next_random())
    }

    /// Four random words, if RDSEED gives them within the given number of tries.
    pub(crate) fn rdseed_four(&self, tries: u32) -> Option<[u64; 4]> {
        let mut words = [0; 4];
        let mut got = 0;
        for _ in 0..tries {
            if take_one(&self.rdseed) {
                continue;
            }
            words[got] = self.next_random();
            got += 1;
            if got == words.len() {
                return Some(words);
            }
        }
        None
    }

    /// SplitMix64: one sequence for the whole machine, in the order of execution.
    fn next_random(&self) -> u64 {
        let state = self.random.fetch_add(SPLITMIX_STEP, Ordering::AcqRel);
        mix(state)
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

    /// The transient failure of a processor's `n`th call, if it is to have one.
    pub(crate) fn transient(&self, lp: usize, n: &AtomicU64, leaf: HostLeaf) -> Option<Status> {
        let per_mille = self.transient_per_mille.load(Ordering::Acquire);
        if per_mille == 0 {
            return None;
        }
        let n = n.fetch_add(1, Ordering::Relaxed);
        let seed = self.transient_seed.load(Ordering::Acquire);
        let random = mix(seed ^ mix((lp as u64) << 48 ^ n));
        if random % 1000 >= u64::from(per_mille) {
            return None;
        }
        let failures = transient_failures(leaf);
        failures
            .get((random >> 32) as usize % failures.len().max(1))
            .copied()
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

/// Increment of SplitMix64's state per output.
const SPLITMIX_STEP: u64 = 0x9E37_79B9_7F4A_7C15;
/// Leaves room to jump back from.
const TSC_AT_POWER_ON: u64 = 1_000_000_000_000;

/// The output of SplitMix64 whose state before the step is `x`.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(SPLITMIX_STEP);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Statuses with which a leaf can fail through no fault of its caller.
fn transient_failures(leaf: HostLeaf) -> &'static [Status] {
    use HostLeaf as L;
    const NO_ENTROPY: Status = Code::RND_NO_ENTROPY.status();
    const SYS_BUSY: Status = Code::SYS_BUSY.status();
    const NO_KEY: Status = Code::KEY_GENERATION_FAILED.status();
    const KET: Status = Code::OPERAND_BUSY.on(Operand::KET);
    const KOT: Status = Code::OPERAND_BUSY.on(Operand::KOT);
    const RCX: Status = Code::OPERAND_BUSY.on(Operand::RCX);
    const RDX: Status = Code::OPERAND_BUSY.on(Operand::RDX);
    const TDR: Status = Code::OPERAND_BUSY.on(Operand::TDR);
    const TREE: Status = Code::OPERAND_BUSY.on(Operand::SEPT_TREE);
    const MIG: Status = Code::OPERAND_BUSY.on(Operand::MIG);
    const MIGSC: Status = Code::OPERAND_BUSY.on(Operand::MIGSC);
    const BINDINGS: Status = Code::OPERAND_BUSY.on(Operand::SERVTD_BINDINGS);
    const RTMR: Status = Code::OPERAND_BUSY.on(Operand::RTMR);
    const EPOCH: Status = Code::OPERAND_BUSY.on(Operand::TD_EPOCH);
    const WBCACHE: Status = Code::OPERAND_BUSY.on(Operand::WBCACHE);
    match leaf {
        L::SysInit | L::SysLpInit => &[NO_ENTROPY, SYS_BUSY],
        L::SysConfig => &[SYS_BUSY],
        L::SysKeyConfig => &[NO_KEY, KET, SYS_BUSY],
        L::SysTdmrInit => &[RCX],
        L::MngCreate => &[NO_ENTROPY, KOT, RCX],
        L::MngKeyConfig => &[NO_KEY, KET, RCX],
        L::MngAddcx => &[RCX, RDX],
        L::MngVpflushdone | L::MngKeyFreeid => &[KOT, RCX],
        L::MngInit | L::MngRd | L::MngWr | L::MrFinalize => &[RCX],
        L::VpCreate | L::MrExtend | L::MemPageAdd => &[RCX, RDX],
        L::VpAddcx | L::VpInit | L::VpFlush | L::VpRd | L::VpWr => &[RCX, TDR],
        L::VpEnter => &[RCX, TDR, TREE, EPOCH],
        L::MemTrack => &[RCX, EPOCH],
        L::MemSeptAdd
        | L::MemSeptRemove
        | L::MemSeptRd
        | L::MemPageAug
        | L::MemPageRemove
        | L::MemPagePromote
        | L::MemPageDemote
        | L::MemPageRelocate
        | L::MemRangeBlock
        | L::MemRangeUnblock
        | L::MemRd
        | L::ExportUnblockw
        | L::MemWr => &[RDX, TREE, RCX],
        L::ServtdBind => &[RCX, RDX, BINDINGS, RTMR],
        L::ServtdPrebind => &[RCX, BINDINGS],
        L::MigStreamCreate => &[RCX, RDX, MIG],
        L::ExportStateImmutable => &[NO_ENTROPY, RCX, MIG, MIGSC],
        L::ImportStateImmutable => &[NO_ENTROPY, RCX, MIGSC],
        L::ExportStateTd | L::ImportStateTd | L::ImportTrack | L::ImportAbort => &[RCX, MIGSC],
        L::ExportStateVp | L::ImportStateVp => &[RCX, TDR, MIGSC],
        L::ExportTrack | L::ExportAbort => &[RCX, MIG, MIGSC],
        L::ExportPause | L::ImportCommit | L::ImportEnd => &[RCX],
        L::ExportMem | L::ImportMem => &[RDX, MIG, MIGSC, TREE],
        L::ExportBlockw | L::ExportRestore => &[RDX, TREE],
        L::PhymemPageReclaim => &[RCX, TDR],
        L::PhymemPageRdmd | L::PhymemPageWbinvd => &[RCX],
        L::PhymemCacheWb => &[WBCACHE, KOT],
        L::SysInfo
        | L::SysRd
        | L::SysRdall
        | L::SysLpShutdown
        | L::SysShutdown
        | L::SysUpdate
        | L::MngKeyReclaimid => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The first outputs of the published reference for the seed 1234567.
        let machine = Machine::new(1_234_567);
        let first = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
        ];
        assert_eq!(machine.rdseed_four(4), Some(first));
        assert_eq!(machine.rdrand(), Some(16_408_922_859_458_223_821));
    }

    #[test]
    fn an_execution_that_fails_takes_no_number() {
        let (machine, other) = (Machine::new(7), Machine::new(7));
        machine.inject(Fault::Rdseed { count: 2 });
        machine.inject(Fault::Rdrand { count: 1 });
        assert_eq!(machine.rdrand(), None);
        assert_eq!(machine.rdseed_four(6), other.rdseed_four(4));
        machine.inject(Fault::Rdseed { count: 3 });
        assert_eq!(machine.rdseed_four(6), None, "three of six tries fail");
    }
}
