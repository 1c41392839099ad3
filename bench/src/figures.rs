//! The figures file, written by `time` and read by `report`.

use std::error::Error;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::designs::fleet::Fleet;
use crate::designs::registry::Body;

/// One run of `time`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    /// The processor's name.
    pub cpu: String,
    /// The kernel's release.
    pub kernel: String,
    /// The compiler.
    pub rustc: String,
    /// True if no branch crosses or ends at a 32-byte boundary.
    pub aligned_branches: bool,
    /// The number of rounds that count: the quieter half.
    pub rounds: usize,
    /// The number of operations in one run of a loop.
    pub operations: usize,
    /// Every design.
    pub times: Vec<Time>,
    /// Real operations of KVM, if this machine has it.
    pub kvm: Option<KvmTimes>,
}

/// The time of one design over one fleet, in nanoseconds per operation, loop included.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Time {
    /// The form.
    pub form: String,
    /// Its body.
    pub body: Body,
    /// The fleet.
    pub fleet: Fleet,
    /// The mean over the loop's four placements; for each, the lower quartile of the rounds.
    pub ns: f64,
    /// The fastest placement.
    pub low: f64,
    /// The slowest placement.
    pub high: f64,
}

/// The time of KVM's operations here, in nanoseconds, in the fastest round.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct KvmTimes {
    /// `ioctl(KVM_CHECK_EXTENSION)`: the shortest call.
    pub ioctl: f64,
    /// `ioctl(KVM_RUN)` of a guest that does one OUT: entry, exit, return to user space.
    pub exit: f64,
}

impl Figures {
    /// The time of one design.
    pub fn get(&self, form: &str, body: Body, fleet: Fleet) -> Option<&Time> {
        self.times
            .iter()
            .find(|t| t.form == form && t.body == body && t.fleet == fleet)
    }

    /// Reads a figures file.
    pub fn read(file: &Path) -> Result<Self, Box<dyn Error>> {
        let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()).into())
    }
}

/// Writes a figures file.
pub fn write(file: &Path, figures: &impl Serialize) -> Result<(), Box<dyn Error>> {
    let mut text = serde_json::to_string_pretty(figures)?;
    text.push('\n');
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()).into())
}
