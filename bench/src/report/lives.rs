//! The report on lives of VMs on the software platforms.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use super::plot::{self, Bar, Scale, Series};
use crate::lives::figures::{Build, End, Lives, TdLife};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Look<'a>(&'a Lives);

impl<'a> Look<'a> {
    fn td(&self, gib: u64, end: End) -> Result<&'a TdLife> {
        let mut of_size = self.0.tds.iter().filter(|td| td.gib == gib);
        let found = of_size.find(|td| td.end == end);
        found.ok_or_else(|| format!("no TD of {gib} GiB, {end:?}").into())
    }

    fn sizes(&self) -> Vec<u64> {
        let mut sizes: Vec<u64> = self.0.tds.iter().map(|td| td.gib).collect();
        sizes.dedup();
        sizes
    }
}

/// Sums the SEAMCALLs and nanoseconds of some phases.
fn sum(td: &TdLife, phases: &[&str]) -> Result<(u64, f64)> {
    let mut total = (0, 0.0);
    for name in phases {
        let phase = td.phase(name).ok_or_else(|| format!("no phase {name}"))?;
        total.0 += phase.total();
        total.1 += phase.ns;
    }
    Ok(total)
}

const BUILD: [&str; 2] = ["build", "run"];
const END: [&str; 2] = ["remove", "destroy"];

fn of_build(build: Build) -> &'static str {
    match build {
        Build::Faults => "a fault for each page, as the guest accepts it",
        Build::PreFault => "`pre_fault_memory`, then the guest accepts",
    }
}

fn of_end(end: End) -> &'static str {
    match end {
        End::LeafByLeaf => "leaf by leaf with a live key, as Linux 7.1",
        End::Ranges => "in ranges of a GiB with a live key",
        End::KeyFirst => "key first, then reclaim: `destroy`",
    }
}

/// Writes the document's section.
pub fn section(lives: &Lives) -> Result<String> {
    let mut out = String::new();
    writeln!(
        out,
        "\n# Lives of VMs on the software platforms\n\n\
         What the framework itself does over a VM's life, from `Machine::build` to its report that \
         nothing is left, on the software TDX module and the software AMD SP. Printed by\n\n\
         ```text\n\
         cargo run --release -p kvm-ops-bench -- lives --out bench/figures/intel-xeon/lives.json\n\
         ```\n\n\
         {}, Linux {}, {}. **Counts are exact**: the command stops where a phase makes other \
         SEAMCALLs than the TD's size says, and `cargo test -p kvm-ops-bench` checks the same with \
         small TDs. **Times are those of the models**, processor time of the calling thread, ways \
         interleaved: a SEAMCALL of the model is a call of a function, one of the real module a change of \
         the processor's mode, and its cache write-backs go to memory. Only the ratios of the times say \
         something, and they say it of the models.\n",
        lives.cpu, lives.kernel, lives.rustc
    )?;
    for skipped in &lives.skipped {
        writeln!(out, "**Skipped:** {skipped}.\n")?;
    }
    building(&mut out, lives)?;
    ending(&mut out, lives)?;
    phases(&mut out, lives)?;
    small(&mut out, lives)?;
    many(&mut out, lives)?;
    Ok(out)
}

fn building(out: &mut String, lives: &Lives) -> Result<()> {
    writeln!(
        out,
        "## A TD's memory comes\n\n\
         | private memory | way | SEAMCALLs | a page | ms | ns a page | times the fastest |\n\
         |---:|---|---:|---:|---:|---:|---:|"
    )?;
    let look = Look(lives);
    for gib in look.sizes() {
        // The time of the faster way to build, as the reference.
        let pre = sum(look.td(gib, End::KeyFirst)?, &BUILD)?.1;
        for end in [End::LeafByLeaf, End::KeyFirst] {
            let td = look.td(gib, end)?;
            let (calls, ns) = sum(td, &BUILD)?;
            let pages = td.pages as f64;
            writeln!(
                out,
                "| {gib} GiB | {} | {calls} | {:.2} | {:.0} | {:.0} | {:.2} |",
                of_build(td.build),
                calls as f64 / pages,
                ns / 1e6,
                ns / pages,
                ns / pre
            )?;
        }
    }
    writeln!(
        out,
        "\nA fault costs a TDH.VP.ENTER that mapping beforehand saves. Both end with every page \
         accepted. The tables (TDH.MEM.SEPT.ADD) are one in 512 pages.\n"
    )?;
    Ok(())
}

fn ending(out: &mut String, lives: &Lives) -> Result<()> {
    writeln!(
        out,
        "## A TD ends\n\n\
         | private memory | way | SEAMCALLs | a page | ms | ns a page | times `destroy` |\n\
         |---:|---|---:|---:|---:|---:|---:|"
    )?;
    let look = Look(lives);
    for gib in look.sizes() {
        let fastest = sum(look.td(gib, End::KeyFirst)?, &END)?;
        for end in [End::LeafByLeaf, End::Ranges, End::KeyFirst] {
            let td = look.td(gib, end)?;
            let (calls, ns) = sum(td, &END)?;
            let pages = td.pages as f64;
            writeln!(
                out,
                "| {gib} GiB | {} | {calls} | {:.2} | {:.0} | {:.0} | {:.2} |",
                of_end(td.end),
                calls as f64 / pages,
                ns / 1e6,
                ns / pages,
                ns / fastest.1
            )?;
        }
    }
    writeln!(
        out,
        "\nPlot: [the end of a TD][plots.md].\n\n\
         While the key is live, a page takes TDH.MEM.RANGE.BLOCK, TDH.MEM.PAGE.REMOVE and \
         TDH.PHYMEM.PAGE.WBINVD, and a TDH.MEM.TRACK for each page or for each range. Once the key \
         is gone it takes one TDH.PHYMEM.PAGE.RECLAIM. Linux 7.1 removes leaf by leaf, because \
         guest_memfd gives its memory back before the VM releases the key; for patches that release \
         the key first (`KVM_TDX_TERMINATE_VM`, not merged in 7.1) their authors measured on hardware \
         72 s against 24 s with 18 GB, 517 s against 134 s with 107 GB. With real TDs every \
         TDH.MEM.TRACK also interrupts the vCPUs that are inside, which a TD without running vCPUs, as \
         here, does not show.\n"
    )?;
    Ok(())
}

fn phases(out: &mut String, lives: &Lives) -> Result<()> {
    let look = Look(lives);
    let Some(largest) = look.sizes().last().copied() else {
        return Ok(());
    };
    writeln!(
        out,
        "## SEAMCALLs by phase\n\nA TD of {largest} GiB with one vCPU.\n\n\
         | phase | SEAMCALL | faults, leaf by leaf | pre-fault, ranges | pre-fault, key first |\n\
         |---|---|---:|---:|---:|"
    )?;
    let tds = [
        look.td(largest, End::LeafByLeaf)?,
        look.td(largest, End::Ranges)?,
        look.td(largest, End::KeyFirst)?,
    ];
    for name in ["create", "build", "run", "remove", "destroy"] {
        let of_phase = |td: &TdLife| td.phase(name).map(|p| p.calls.clone()).unwrap_or_default();
        let calls = tds.map(of_phase);
        let mut leaves: Vec<&String> = calls.iter().flat_map(|c| c.keys()).collect();
        leaves.sort_unstable();
        leaves.dedup();
        for leaf in leaves {
            let [a, b, c] = [0, 1, 2].map(|n| calls[n].get(leaf).copied().unwrap_or(0));
            writeln!(out, "| {name} | {leaf} | {a} | {b} | {c} |")?;
        }
    }
    writeln!(out)?;
    Ok(())
}

fn small(out: &mut String, lives: &Lives) -> Result<()> {
    let rounds = lives.small.first().map_or(0, |life| life.rounds);
    writeln!(
        out,
        "## A small VM of each technology\n\n\
         1 MiB, one vCPU; of a confidential VM one page measured. The guest writes and reads its memory, \
         private where it has such, prints a byte and shuts down. Microseconds of processor time, the \
         lower quartile of {rounds} lives, technologies interleaved; SEAMCALLs or AMD SP commands, and RMP \
         instructions and WBINVDs, as the mean of the lives (ASIDs are flushed several at once).\n\n\
         | technology | build and measure | run | destroy | all, us | times normal | firmware calls | instructions |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|"
    )?;
    let all = |n: usize| lives.small[n].phases.iter().map(|p| p.ns).sum::<f64>();
    for (n, life) in lives.small.iter().enumerate() {
        // The row of the same vendor's normal VM.
        let normal = if n < 2 { 0 } else { 2 };
        write!(out, "| {} |", life.tech)?;
        for phase in &life.phases {
            write!(out, " {:.1} |", phase.ns / 1e3)?;
        }
        let sum = |f: fn(&crate::lives::figures::SmallPhase) -> f64| {
            life.phases.iter().map(f).sum::<f64>()
        };
        writeln!(
            out,
            " {:.1} | {:.1} | {:.2} | {:.2} |",
            all(n) / 1e3,
            all(n) / all(normal),
            sum(|p| p.firmware),
            sum(|p| p.instructions)
        )?;
    }
    writeln!(out, "\nPlot: [lives of small VMs][plots.md].\n")?;
    Ok(())
}

fn many(out: &mut String, lives: &Lives) -> Result<()> {
    let vms = lives.many.first().map_or(0, |many| many.vms);
    writeln!(
        out,
        "## Several at once\n\n\
         {vms} such VMs alive at once on one host, from one thread and half of them from each of two: \
         microseconds for each VM. The clock is that of the fastest round, and **of little worth where \
         other programs share the two processors, as here**; processor time is the median round's, and \
         says what two threads cost each other: locks, and cache lines that both write.\n\n\
         | technology | clock, 1 thread | clock, 2 threads | processors, 1 thread | processors, 2 threads | times |\n\
         |---|---:|---:|---:|---:|---:|"
    )?;
    for pair in lives.many.chunks_exact(2) {
        let [one, two] = pair else { continue };
        writeln!(
            out,
            "| {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.2} |",
            one.tech,
            one.wall_ns / 1e3,
            two.wall_ns / 1e3,
            one.processor_ns / 1e3,
            two.processor_ns / 1e3,
            two.processor_ns / one.processor_ns
        )?;
    }
    writeln!(out)?;
    Ok(())
}

/// Draws the removal of TDs and the small lives.
pub fn draw(lives: &Lives, plots: &Path) -> Result<()> {
    let look = Look(lives);
    let names: Vec<String> = look.sizes().iter().map(|g| format!("{g} GiB")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut series = Vec::new();
    for (name, end) in [
        ("leaf by leaf", End::LeafByLeaf),
        ("ranges", End::Ranges),
        ("key first", End::KeyFirst),
    ] {
        let mut bars = Vec::new();
        for gib in look.sizes() {
            bars.push(Some(Bar::exact(sum(look.td(gib, end)?, &END)?.1 / 1e6)));
        }
        series.push(Series { name, bars });
    }
    plot::bars(
        &plots.join("life-end.svg"),
        "The end of a TD: private memory and control structures",
        "ms of processor time on the software TDX module",
        Scale::Linear,
        &names,
        &series,
    )?;

    let names: Vec<&str> = lives.small.iter().map(|life| life.tech.as_str()).collect();
    let of = |n: usize| {
        let phases = lives.small.iter().map(|life| life.phases.get(n));
        phases.map(|p| p.map(|p| Bar::exact(p.ns / 1e3))).collect()
    };
    plot::bars(
        &plots.join("life-small.svg"),
        "The life of a small VM, by phase",
        "us of processor time on the software platforms",
        Scale::Linear,
        &names,
        &[
            Series {
                name: "build and measure",
                bars: of(0),
            },
            Series {
                name: "run",
                bars: of(1),
            },
            Series {
                name: "destroy",
                bars: of(2),
            },
        ],
    )
}
