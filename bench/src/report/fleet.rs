//! The report on fleets of growing size.

use std::error::Error;
use std::fmt::Write as _;

use crate::fleet::{Fleets, Run};

/// Writes the document's section.
pub fn section(fleets: &Fleets) -> Result<String, Box<dyn Error>> {
    let mut out = String::new();
    writeln!(
        out,
        "\n# A fleet that grows\n\n\
         The program `kvm-ops fleet` with normal and confidential VMs side by side, all alive at once; each \
         has 4 MiB and one vCPU and runs the guest `{}`. Printed by\n\n\
         ```text\n\
         cargo build --release -p kvm-ops-cli\n\
         cargo run --release -p kvm-ops-bench -- fleet --program target/release/kvm-ops \
         --out bench/figures/amd-epyc/fleet.json\n\
         ```\n\n\
         {}, {} processors, Linux {}, {}; the least of {} rounds for times and memory, the most for \
         counts, read from /proc. *Linear* is the processor time of a VM as a share of that in the smallest \
         fleet: 1 is linear. The confidential VMs are on the software platforms. Where the normal ones are \
         on /dev/kvm, this machine's KVM is itself inside a VM and interprets ring 0.\n\n\
         | normal VMs | confidential | s | processors, s | ms a VM | linear | KiB a VM | threads a VM | \
         descriptors a VM | mappings a VM | firmware pages a confidential VM |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        fleets.payload, fleets.cpu, fleets.processors, fleets.kernel, fleets.rustc, fleets.rounds
    )?;
    for run in &fleets.runs {
        let first = fleets.runs.iter().find(|first| first.host == run.host);
        let each = |count: u64| count as f64 / run.vms() as f64;
        let place = if run.host == "kvm" {
            "/dev/kvm"
        } else {
            "software host"
        };
        writeln!(
            out,
            "| {} on {place} | {} | {:.1} | {:.1} | {:.2} | {:.2} | {:.0} | {:.2} | {:.2} | {:.2} | {:.2} |",
            run.normal,
            run.confidential,
            run.seconds,
            run.processor,
            time(run) * 1e3,
            first.map_or(1.0, |first| time(run) / time(first)),
            each(run.bytes) / 1024.0,
            each(run.threads),
            each(run.descriptors),
            each(run.mappings),
            run.pages as f64 / run.confidential.max(1) as f64
        )?;
    }
    writeln!(
        out,
        "\nThe program's own memory, threads and descriptors are counted too, which small fleets feel \
         more. cli/tests/fleet_scale.rs holds the pages, keys, exits and firmware calls of a fleet against \
         those of one three times as large.\n"
    )?;
    Ok(out)
}

/// The processor time of a VM.
fn time(run: &Run) -> f64 {
    run.processor / run.vms() as f64
}
