//! The report on journeys of TDs.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use super::plot::{self, Bar, Scale, Series};
use crate::journeys::{Journeys, Run};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Writes the document's section.
pub fn section(journeys: &Journeys) -> Result<String> {
    let mut out = String::new();
    let [before, after] = journeys.cipher;
    writeln!(
        out,
        "\n# TDs that migrate\n\n\
         `kvm-ops migrate send` and `receive` with `--tech tdx --rounds 8`: two processes, each with a \
         software TDX module, and a Unix socket between them. The TD's program writes all the time: first every page, and \
         then those of its *working set* again and again ([docs/migration.md][migration.md]). Printed by\n\n\
         ```text\n\
         cargo build --release -p kvm-ops-cli\n\
         cargo run --release -p kvm-ops-bench -- journeys --program target/release/kvm-ops \
         --out bench/figures/amd-epyc/journeys.json\n\
         ```\n\n\
         {}, {} processors, Linux {}, {}; the load average was {:.1} when the run began, **so the rates are those of \
         a shared machine, and only their relations say something**. *Epochs* are 8 while the TD ran, two while it was \
         stopped, and the one that the start token begins. *Sent* and *dirtied* are MB/s while the TD ran, \
         over its last seconds; *left* are the pages that were still to be sent when it was stopped; *expected* is \
         the time that they take at the rate before, and *downtime* the time from the stop until the target \
         owned the TD.\n\n\
         | memory | working set | epochs | pages | s | sent | dirtied | left | expected, ms | downtime, ms |\n\
         |---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        journeys.cpu, journeys.processors, journeys.kernel, journeys.rustc, journeys.load
    )?;
    for run in &journeys.runs {
        writeln!(
            out,
            "| {} MiB | {} MiB | {} | {} | {:.1} | {:.0} | {:.0} | {} | {:.1} | {:.1} |",
            run.mib,
            run.working_set,
            run.rounds,
            run.pages,
            run.seconds,
            run.sent,
            run.dirtied,
            run.left,
            run.expected * 1e3,
            run.downtime * 1e3
        )?;
    }
    let sent = |run: &Run| run.sent / before.max(after);
    let (least, most) = range(journeys, sent)?;
    if let Some(run) = journeys.runs.iter().find(|run| run.lost() > 0) {
        return Err(format!("a TD of {} MiB lost {} pages", run.mib, run.lost()).into());
    }
    let (below, above) = range(journeys, |run| run.downtime / run.expected)?;
    writeln!(
        out,
        "\nThe cipher alone, AES-256-GCM over pages of 4 KiB on one thread, did {before:.0} MB/s before the run and \
         {after:.0} MB/s after it, so pages travelled at {least:.2} to {most:.2} times its rate. Each page goes \
         through it once at each end; beside it there are the encryption of the memory of both machines, the \
         copies between, and the program, which wants a processor too. \
         The downtime was {below:.2} to {above:.2} times the expected one. What is left at the stop is what \
         the program dirtied in the last round, and never more than its working set and its first page, so a working set \
         bounds the downtime of a TD of any size. In each journey the arrived program found every page as it had \
         written it, and MRTD, RTMRs, ATTRIBUTES and XFAM were the same at both hosts.\n\n\
         Plots: [downtime][plots.md], [rates][plots.md].\n"
    )?;
    Ok(out)
}

fn range(journeys: &Journeys, of: impl Fn(&Run) -> f64) -> Result<(f64, f64)> {
    let values: Vec<f64> = journeys.runs.iter().map(of).collect();
    let least = values.iter().copied().reduce(f64::min);
    let most = values.iter().copied().reduce(f64::max);
    least.zip(most).ok_or_else(|| "no journeys".into())
}

/// Draws the plots.
pub fn draw(journeys: &Journeys, plots: &Path) -> Result<()> {
    let names: Vec<String> = journeys
        .runs
        .iter()
        .map(|run| format!("{} MiB, {} MiB written", run.mib, run.working_set))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let bars = |of: fn(&Run) -> f64| {
        journeys
            .runs
            .iter()
            .map(|run| Some(Bar::exact(of(run))))
            .collect()
    };
    plot::bars(
        &plots.join("journeys-downtime.svg"),
        "Downtime of a TD that migrates, by size and working set",
        "ms",
        Scale::Linear,
        &names,
        &[
            Series {
                name: "downtime",
                bars: bars(|run| run.downtime * 1e3),
            },
            Series {
                name: "expected when stopped",
                bars: bars(|run| run.expected * 1e3),
            },
        ],
    )?;
    let [before, after] = journeys.cipher;
    let cipher = Some(Bar::exact(before.max(after)));
    plot::bars(
        &plots.join("journeys-rates.svg"),
        "A TD that migrates: pages sent and dirtied, and the cipher alone",
        "MB/s",
        Scale::Linear,
        &names,
        &[
            Series {
                name: "sent",
                bars: bars(|run| run.sent),
            },
            Series {
                name: "dirtied",
                bars: bars(|run| run.dirtied),
            },
            Series {
                name: "AES-256-GCM alone",
                bars: vec![cipher; names.len()],
            },
        ],
    )
}
