//! The mirror beside what else could hold the same mapping, and beside what the machine itself takes.
//!
//! `cargo bench -p kvm-ops-mmu` prints every table; `-- work`, `threads` and `designs` choose some, and
//! `quick` leaves 16 GiB out. With `-- report` it
//! also writes the tables into docs/mirror.md and draws docs/plots/mirror-*.svg.
//! `-- peer=mirror` measures peers of that name only. `-- cycles=1000,2000,4000` sets what a SEAMCALL is taken to cost.

#![allow(missing_docs, unreachable_pub)]

#[cfg(target_arch = "x86_64")]
mod designs;
#[cfg(target_arch = "x86_64")]
mod limits;
#[cfg(target_arch = "x86_64")]
mod peers;
#[cfg(target_arch = "x86_64")]
#[allow(dead_code)]
#[path = "../../../bench/src/report/plot.rs"]
mod plot;
#[cfg(target_arch = "x86_64")]
mod report;
#[cfg(target_arch = "x86_64")]
mod threads;
#[cfg(target_arch = "x86_64")]
mod timing;
#[cfg(target_arch = "x86_64")]
mod work;

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    eprintln!("the peers are page tables of x86-64, and so is the clock of the SEAMCALL model");
}

#[cfg(target_arch = "x86_64")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| args.iter().any(|arg| arg == name);
    let cycles = match args.iter().find_map(|arg| arg.strip_prefix("cycles=")) {
        Some(list) => list
            .split(',')
            .map(str::parse)
            .collect::<Result<Vec<u64>, _>>()?,
        None => vec![1000, 2000, 4000],
    };
    let only = args.iter().find_map(|arg| arg.strip_prefix("peer="));
    let sections = ["work", "threads", "designs"];
    let all = !sections.into_iter().any(has);
    let mut report = report::Report::default();
    if all || has("work") {
        work::measure(&mut report, 1, 9, only);
        if !has("quick") {
            work::measure(&mut report, 16, 3, only);
        }
    }
    if all || has("threads") {
        threads::measure(&mut report);
    }
    if all || has("designs") {
        designs::measure(&mut report, &cycles);
    }
    if has("report") {
        report.write()?;
    }
    Ok(())
}
