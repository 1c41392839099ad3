//! The machine around the AMD SP: memory, RMP, cores and the keys of the memory controllers.

pub(crate) mod access;
pub(crate) mod entry;
pub(crate) mod open;
pub(crate) mod region;
pub(crate) mod rmp;
pub(crate) mod rmp_types;
pub(crate) mod turn;

use crate::builder::Config;
use crate::cipher::MemoryKey;
use crate::observe::{Monitor, Operation};
use crate::sync::{Lock, Shared, SharedGuard};
use access::{AccessFault, GuestPage};
use entry::RmpEntry;
use kvm_ops_turns::Turns;
use region::Memory;
use std::fmt;
use std::sync::Arc;

/// An instruction that the model counts and can make fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Instruction {
    RmpUpdate,
    Psmash,
    Pvalidate,
    RmpAdjust,
    Wbinvd,
}

impl Instruction {
    /// Every instruction.
    pub const ALL: [Instruction; 5] = [
        Instruction::RmpUpdate,
        Instruction::Psmash,
        Instruction::Pvalidate,
        Instruction::RmpAdjust,
        Instruction::Wbinvd,
    ];
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Instruction::RmpUpdate => "rmpupdate",
            Instruction::Psmash => "psmash",
            Instruction::Pvalidate => "pvalidate",
            Instruction::RmpAdjust => "rmpadjust",
            Instruction::Wbinvd => "wbinvd",
        })
    }
}

/// Rules that apply to the guest that runs with an ASID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Legacy,
    Snp,
}

/// State of an ASID in the memory controllers.
pub(crate) struct Slot {
    pub(crate) key: Arc<MemoryKey>,
    pub(crate) owner: Owner,
    /// Those at the pages that its processors have open.
    pub(crate) turns: Arc<Turns>,
}

impl Slot {
    pub(crate) fn new(key: Arc<MemoryKey>, owner: Owner) -> Self {
        Self {
            key,
            owner,
            turns: Arc::new(Turns::new()),
        }
    }
}

/// Per-core facts.
struct Cores {
    /// For each core, true if it ran WBINVD since an ASID was last released.
    flushed: Vec<bool>,
    /// For each core, SYSCFG.SNP_EN.
    snp_enabled: Vec<bool>,
}

pub(crate) struct Machine {
    pub(crate) config: Config,
    pub(crate) memory: Memory,
    pub(crate) monitor: Lock<Monitor>,
    slots: Box<[Shared<Option<Slot>>]>,
    cores: Lock<Cores>,
}

impl Machine {
    pub(crate) fn new(config: Config) -> Self {
        let cores = config.cores as usize;
        Self {
            memory: Memory::new(config.regions),
            monitor: Lock::new(Monitor::new(config.trace_capacity)),
            slots: (0..=config.max_asid).map(|_| Shared::new(None)).collect(),
            cores: Lock::new(Cores {
                flushed: vec![false; cores],
                snp_enabled: vec![false; cores],
            }),
            config,
        }
    }

    /// The slot of an ASID, held until the guard is dropped; `None` for an ASID that does not exist.
    pub(crate) fn slot(&self, asid: u32) -> Option<SharedGuard<'_, Option<Slot>>> {
        Some(self.slots.get(asid as usize)?.read())
    }

    /// Gives an ASID its key, or takes it away.
    pub(crate) fn set_slot(&self, asid: u32, slot: Option<Slot>) {
        if let Some(place) = self.slots.get(asid as usize) {
            *place.write() = slot;
        }
    }

    /// WBINVD on one core; `false` if there is no such core.
    pub(crate) fn wbinvd(&self, core: u32) -> bool {
        let operation = Operation::Instruction(Instruction::Wbinvd);
        let injected = self.monitor.lock().injected(operation);
        let mut cores = self.cores.lock();
        let Some(flushed) = cores.flushed.get_mut(core as usize) else {
            return false;
        };
        // An injected failure is a core that did not get there.
        if injected.is_none() {
            *flushed = true;
        }
        drop(cores);
        self.monitor
            .lock()
            .record(operation, [core.into(), 0], injected.unwrap_or(0));
        true
    }

    pub(crate) fn forget_wbinvd(&self) {
        self.cores.lock().flushed.fill(false);
    }

    pub(crate) fn all_flushed(&self) -> bool {
        self.cores.lock().flushed.iter().all(|f| *f)
    }

    /// Sets SYSCFG.SNP_EN on a core; `false` if there is no such core.
    pub(crate) fn enable_snp(&self, core: u32) -> bool {
        match self.cores.lock().snp_enabled.get_mut(core as usize) {
            Some(enabled) => {
                *enabled = true;
                true
            }
            None => false,
        }
    }

    pub(crate) fn disable_snp(&self) {
        self.cores.lock().snp_enabled.fill(false);
    }

    /// Returns true if the RMP is in force: SYSCFG.SNP_EN is set on every core.
    pub(crate) fn snp_enabled(&self) -> bool {
        self.cores.lock().snp_enabled.iter().all(|e| *e)
    }
}
