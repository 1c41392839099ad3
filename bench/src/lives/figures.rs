//! The figures of lives: what `lives` writes and `report` reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One run of `lives`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Lives {
    /// The processor's name.
    pub cpu: String,
    /// The kernel's release.
    pub kernel: String,
    /// The compiler.
    pub rustc: String,
    /// TDs by size and way.
    pub tds: Vec<TdLife>,
    /// VMs of every technology.
    pub small: Vec<SmallLife>,
    /// Many VMs at once.
    pub many: Vec<Many>,
    /// What was not measured, and why.
    pub skipped: Vec<String>,
}

/// How a TD's private memory comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Build {
    /// The guest touches each page, and each is a fault.
    Faults,
    /// `pre_fault_memory` before the guest runs.
    PreFault,
}

/// How a TD's private memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Each page removed by itself while the key is live, as Linux 7.1 does.
    LeafByLeaf,
    /// Whole ranges removed while the key is live: one TDH.MEM.TRACK for each.
    Ranges,
    /// The key first, then each page reclaimed: the framework's `destroy`.
    KeyFirst,
}

/// A TD's life.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TdLife {
    /// Private memory in GiB.
    pub gib: u64,
    /// Its 4 KiB pages.
    pub pages: u64,
    /// How the memory came.
    pub build: Build,
    /// How it went.
    pub end: End,
    /// How often this was measured.
    pub rounds: usize,
    /// The phases in order.
    pub phases: Vec<Phase>,
}

/// A phase of a life.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Phase {
    /// Which.
    pub name: String,
    /// Calls to the firmware that succeeded, by name.
    pub calls: BTreeMap<String, u64>,
    /// Processor time in nanoseconds, the median of the rounds.
    pub ns: f64,
}

impl Phase {
    /// All calls.
    pub fn total(&self) -> u64 {
        self.calls.values().sum()
    }
}

impl TdLife {
    /// The phase of that name.
    pub fn phase(&self, name: &str) -> Option<&Phase> {
        self.phases.iter().find(|phase| phase.name == name)
    }
}

/// The life of one VM with little memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SmallLife {
    /// The technology.
    pub tech: String,
    /// How many lives were measured.
    pub rounds: usize,
    /// Its phases.
    pub phases: Vec<SmallPhase>,
}

/// A phase of such a life.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SmallPhase {
    /// Which.
    pub name: String,
    /// Processor time in nanoseconds, the lower quartile of the rounds.
    pub ns: f64,
    /// SEAMCALLs, or commands of the AMD SP, of one life: the mean, because several share a flush.
    pub firmware: f64,
    /// RMP instructions and WBINVDs of one life.
    pub instructions: f64,
}

/// Several VMs alive at once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Many {
    /// The technology.
    pub tech: String,
    /// How many VMs.
    pub vms: u64,
    /// Threads that they are spread over.
    pub threads: u64,
    /// Time on the clock for all of it, for each VM, in nanoseconds: the fastest round.
    pub wall_ns: f64,
    /// Processor time of all threads for each VM, in nanoseconds: the median round.
    pub processor_ns: f64,
}
