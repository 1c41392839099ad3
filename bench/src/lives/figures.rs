//! The figures of VM lives, written by `lives` and read by `report`.

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
    /// TDs, by size and by the method of building and removal.
    pub tds: Vec<TdLife>,
    /// VMs of every technology.
    pub small: Vec<SmallLife>,
    /// Many VMs at once.
    pub many: Vec<Many>,
    /// Measurements that were skipped, with the reasons.
    pub skipped: Vec<String>,
}

/// The way in which a TD gets its private memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Build {
    /// The guest touches each page, and each touch faults.
    Faults,
    /// `pre_fault_memory` before the guest runs.
    PreFault,
}

/// The way in which a TD's private memory is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Each page is removed separately while the key is live, as in Linux 7.1.
    LeafByLeaf,
    /// Whole ranges are removed while the key is live, with one TDH.MEM.TRACK each.
    Ranges,
    /// The key is released first, then each page is reclaimed: the framework's `destroy`.
    KeyFirst,
}

/// The life of a TD.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TdLife {
    /// Private memory in GiB.
    pub gib: u64,
    /// The number of its 4 KiB pages.
    pub pages: u64,
    /// The way in which the memory came.
    pub build: Build,
    /// The way in which it was removed.
    pub end: End,
    /// The number of measured rounds.
    pub rounds: usize,
    /// The phases in order.
    pub phases: Vec<Phase>,
}

/// A phase of a life.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Phase {
    /// The phase's name.
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
    /// Finds a phase by name.
    pub fn phase(&self, name: &str) -> Option<&Phase> {
        self.phases.iter().find(|phase| phase.name == name)
    }
}

/// The life of one VM with little memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SmallLife {
    /// The technology.
    pub tech: String,
    /// The number of measured lives.
    pub rounds: usize,
    /// Its phases.
    pub phases: Vec<SmallPhase>,
}

/// A phase of the life of a small VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SmallPhase {
    /// The phase's name.
    pub name: String,
    /// Processor time in nanoseconds, the lower quartile of the rounds.
    pub ns: f64,
    /// SEAMCALLs, or commands of the AMD SP, per life: a mean, because lives share flushes.
    pub firmware: f64,
    /// RMP instructions and WBINVDs per life.
    pub instructions: f64,
}

/// Several VMs alive at once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Many {
    /// The technology.
    pub tech: String,
    /// The number of VMs.
    pub vms: u64,
    /// The number of threads that share the VMs.
    pub threads: u64,
    /// Wall-clock time per VM for the whole life, in nanoseconds: the fastest round.
    pub wall_ns: f64,
    /// Processor time of all threads per VM, in nanoseconds: the median round.
    pub processor_ns: f64,
}
