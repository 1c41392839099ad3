//! Lives of VMs through the framework, on the software platforms: their duration, and their calls
//! to the firmware.

mod clock;
pub mod figures;
mod many;
mod small;
mod td;
mod touch;

use std::error::Error;
use std::path::Path;

use self::figures::Lives;
use crate::system;

/// The plan of a measurement.
#[derive(Debug)]
pub struct Plan {
    /// Sizes of TDs, in GiB.
    pub gib: Vec<u64>,
    /// The number of measured lives of a small VM.
    pub rounds: usize,
}

/// Measures everything and writes the figures.
pub fn write(out: &Path, plan: &Plan) -> Result<(), Box<dyn Error>> {
    let mut lives = Lives {
        cpu: system::cpu(),
        kernel: system::kernel()?,
        rustc: env!("KVM_OPS_BENCH_RUSTC").to_owned(),
        ..Lives::default()
    };
    td::measure(plan, &mut lives)?;
    small::measure(plan, &mut lives)?;
    many::measure(plan, &mut lives)?;
    crate::figures::write(out, &lives)
}
