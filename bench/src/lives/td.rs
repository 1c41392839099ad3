//! A TD with GiBs of private memory: built, run and destroyed in several ways.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

use kvm_ops::guest::FnProgram;
use kvm_ops::sim::SimHost;
use kvm_ops::{Exit, Gfn, Gpa, Kind, Privacy, Tech, VcpuId, Vendor};
use kvm_ops_machine::{Machine, MachineConfig};
use soft_tdx_module::{Platform, Range, Tdmr};

use super::figures::{Build, End, Lives, Phase, TdLife};
use super::{Plan, clock, touch};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;

/// The ways to compare.
const WAYS: [(Build, End); 3] = [
    (Build::Faults, End::LeafByLeaf),
    (Build::PreFault, End::Ranges),
    (Build::PreFault, End::KeyFirst),
];

/// The memory that the software platform and the mirror need per GiB of private memory, at most.
const HOST_BYTES_FOR_A_GIB: u64 = 96 << 20;

/// Measures all sizes that fit into memory.
pub fn measure(plan: &Plan, lives: &mut Lives) -> Result<(), Box<dyn Error>> {
    for &gib in &plan.gib {
        let needed = gib * HOST_BYTES_FOR_A_GIB;
        if let Some(available) = clock::available_memory().filter(|a| *a < needed) {
            let why = format!(
                "a TD of {gib} GiB: it may need {} MiB, and {} MiB are left",
                needed >> 20,
                available >> 20
            );
            println!("skipped {why}");
            lives.skipped.push(why);
            continue;
        }
        // Short lives get more rounds.
        let rounds = (8 / gib.max(1)).clamp(1, 5) as usize;
        let mut runs: Vec<Vec<Vec<Phase>>> = vec![Vec::new(); WAYS.len()];
        for _ in 0..rounds {
            for ((build, end), runs) in WAYS.into_iter().zip(&mut runs) {
                runs.push(life(gib * GIB, build, end)?);
            }
        }
        for ((build, end), runs) in WAYS.into_iter().zip(runs) {
            let life = TdLife {
                gib,
                pages: gib * GIB / PAGE,
                build,
                end,
                rounds,
                phases: merge(runs),
            };
            print(&life);
            lives.tds.push(life);
        }
    }
    Ok(())
}

/// Merges the phases of several rounds: the calls are equal, the times are medians.
pub fn merge(rounds: Vec<Vec<Phase>>) -> Vec<Phase> {
    let mut merged = rounds.first().cloned().unwrap_or_default();
    for (n, phase) in merged.iter_mut().enumerate() {
        let times: Vec<f64> = rounds.iter().map(|r| r[n].ns).collect();
        phase.ns = clock::quantile(&times, 0.5);
    }
    merged
}

fn print(life: &TdLife) {
    println!("TD of {} GiB, {:?}, {:?}", life.gib, life.build, life.end);
    for phase in &life.phases {
        println!(
            "  {:<10} {:>10} SEAMCALLs {:>10.1} ms  {:?}",
            phase.name,
            phase.total(),
            phase.ns / 1e6,
            phase.calls
        );
    }
}

/// A machine that can hold a TD of this size.
fn host(bytes: u64) -> Result<SimHost, Box<dyn Error>> {
    // One GiB for control pages and tables, one for the module's metadata.
    let region = Range::new(GIB, bytes.next_multiple_of(GIB) + GIB);
    let tdx = Platform::builder()
        .seed(1)
        .memory(region.end() + GIB)
        .cmrs([Range::new(GIB, region.size + GIB)])
        .tdmrs([Tdmr::with_pamt_at(region, region.end())])
        // No timer exits, so that the guest alone determines the number of entries.
        .guest_steps_per_entry(u32::MAX);
    Ok(SimHost::builder(Vendor::Intel).tdx(tdx).build()?)
}

/// Records calls and time of each phase.
struct Watch {
    platform: Arc<Platform>,
    calls: BTreeMap<String, u64>,
    phases: Vec<Phase>,
}

impl Watch {
    fn new(platform: &Arc<Platform>) -> Self {
        Self {
            platform: Arc::clone(platform),
            calls: seamcalls(platform),
            phases: Vec::new(),
        }
    }

    fn phase<T>(&mut self, name: &str, work: impl FnOnce() -> T) -> T {
        let start = clock::processor_time();
        let out = work();
        let ns = (clock::processor_time() - start).as_nanos() as f64;
        let calls = seamcalls(&self.platform);
        let new = calls.iter().filter_map(|(name, n)| {
            let n = n - self.calls.get(name).copied().unwrap_or(0);
            (n > 0).then(|| (name.clone(), n))
        });
        self.phases.push(Phase {
            name: name.to_owned(),
            calls: new.collect(),
            ns,
        });
        self.calls = calls;
        out
    }
}

/// Returns the SEAMCALLs so far, by leaf.
pub fn seamcalls(platform: &Platform) -> BTreeMap<String, u64> {
    let mut calls = BTreeMap::new();
    for ((leaf, _), n) in platform.counts().0 {
        if leaf.starts_with("TDH.") {
            *calls.entry(leaf.to_owned()).or_default() += n;
        }
    }
    calls
}

/// Runs one life. Its phases are create, build, run, remove and destroy.
pub fn life(bytes: u64, build: Build, end: End) -> Result<Vec<Phase>, Box<dyn Error>> {
    let host = host(bytes)?;
    let platform = host.tdx_platform().ok_or("no TDX module")?;
    let mut watch = Watch::new(platform);
    let mut machine = watch.phase("create", || {
        let config = MachineConfig::new()
            .kind(Kind::Of(Tech::Tdx))
            .memory(bytes)
            .program(FnProgram(touch::accept_all(ram(bytes))));
        Machine::build(&host, config)
    })?;
    watch.phase("build", || match build {
        Build::PreFault => pre_fault(&machine, bytes),
        Build::Faults => Ok(()),
    })?;
    watch.phase("run", || run(&mut machine))?;
    watch.phase("remove", || match end {
        End::LeafByLeaf => remove(&machine, bytes, 1),
        End::Ranges => remove(&machine, bytes, 1 << 18),
        End::KeyFirst => Ok(()),
    })?;
    let report = watch.phase("destroy", || machine.destroy());
    if !report.is_clean() {
        return Err(format!("the TD left something behind: {report:?}").into());
    }
    check(&watch.phases, bytes, build, end, platform)?;
    Ok(watch.phases)
}

/// The RAM ranges of a machine of this size.
fn ram(bytes: u64) -> Vec<(Gpa, u64)> {
    const HOLE: u64 = 3 * GIB;
    let low = bytes.min(HOLE);
    let ranges = [(Gpa::new(0), low), (Gpa::new(4 * GIB), bytes - low)];
    ranges.into_iter().filter(|(_, bytes)| *bytes > 0).collect()
}

fn pre_fault(machine: &Machine<SimHost>, bytes: u64) -> Result<(), Box<dyn Error>> {
    for (first, bytes) in ram(bytes) {
        let (mut first, mut pages) = (Gfn::containing(first), bytes / PAGE);
        while pages > 0 {
            let done = machine.vm().pre_fault_memory(first, pages)?;
            first = first.checked_add(done).ok_or("frames run over")?;
            pages -= done;
        }
    }
    Ok(())
}

/// Removes all private memory, `at_once` pages at a time.
fn remove(machine: &Machine<SimHost>, bytes: u64, at_once: u64) -> Result<(), Box<dyn Error>> {
    for (first, bytes) in ram(bytes) {
        let (mut first, mut pages) = (Gfn::containing(first), bytes / PAGE);
        while pages > 0 {
            let vm = machine.vm();
            let done = vm.set_memory_attributes(first, pages.min(at_once), Privacy::Shared)?;
            first = first.checked_add(done).ok_or("frames run over")?;
            pages -= done;
        }
    }
    Ok(())
}

fn run(machine: &mut Machine<SimHost>) -> Result<(), Box<dyn Error>> {
    let vcpu = machine.vcpu_mut(VcpuId(0)).ok_or("no vCPU")?;
    loop {
        match vcpu.vcpu_run()? {
            Exit::Shutdown => return Ok(()),
            Exit::Interrupted => {}
            other => return Err(format!("the guest left with {other:?}").into()),
        }
    }
}

/// The exact number of calls in a life, which follows from its size.
pub fn expected(
    bytes: u64,
    build: Build,
    end: End,
    platform: &Platform,
) -> [BTreeMap<&'static str, u64>; 5] {
    // The pages of the TDCS and of a TDCX in this module.
    const TDCS: u64 = 6;
    const TDCX: u64 = 5;
    /// Fields of the module's limits that the back end reads once per machine; this machine has one
    /// TD.
    const LIMITS: u64 = 8;
    let pages = bytes / PAGE;
    // One for each 2 MiB, one for each GiB, and one for the 512 GiB around them. The root is in the
    // TDCS.
    let tables = bytes.div_ceil(2 << 20) + bytes.div_ceil(GIB) + 1;
    let packages = platform.config().packages as u64;
    let create = [
        ("TDH.SYS.RD", LIMITS),
        ("TDH.MNG.CREATE", 1),
        ("TDH.MNG.KEY.CONFIG", packages),
        ("TDH.MNG.ADDCX", TDCS),
        ("TDH.MNG.INIT", 1),
        ("TDH.VP.CREATE", 1),
        ("TDH.VP.ADDCX", TDCX),
        ("TDH.VP.INIT", 1),
        ("TDH.MR.FINALIZE", 1),
    ];
    let memory = [("TDH.MEM.SEPT.ADD", tables), ("TDH.MEM.PAGE.AUG", pages)];
    let (built, mut ran) = match build {
        Build::PreFault => (memory.to_vec(), vec![("TDH.VP.ENTER", 1)]),
        // One entry for each fault, and one more at the end.
        Build::Faults => (
            vec![],
            [&memory[..], &[("TDH.VP.ENTER", pages + 1)]].concat(),
        ),
    };
    ran.sort_unstable();
    let removal = |tracks| {
        vec![
            ("TDH.MEM.RANGE.BLOCK", pages),
            ("TDH.MEM.TRACK", tracks),
            ("TDH.MEM.PAGE.REMOVE", pages),
            ("TDH.PHYMEM.PAGE.WBINVD", pages),
        ]
    };
    let removed = match end {
        End::LeafByLeaf => removal(pages),
        // A conversion removes at most one GiB.
        End::Ranges => removal(bytes.div_ceil(GIB)),
        End::KeyFirst => vec![],
    };
    let left = if end == End::KeyFirst { pages } else { 0 };
    let destroy = [
        ("TDH.VP.FLUSH", 1),
        ("TDH.MNG.VPFLUSHDONE", 1),
        ("TDH.PHYMEM.CACHE.WB", packages),
        ("TDH.MNG.KEY.FREEID", 1),
        (
            "TDH.PHYMEM.PAGE.RECLAIM",
            left + tables + 1 + TDCS + 1 + TDCX,
        ),
        ("TDH.PHYMEM.PAGE.WBINVD", 1),
    ];
    [create.to_vec(), built, ran, removed, destroy.to_vec()]
        .map(|calls| calls.into_iter().collect())
}

fn check(
    phases: &[Phase],
    bytes: u64,
    build: Build,
    end: End,
    platform: &Platform,
) -> Result<(), Box<dyn Error>> {
    for (phase, want) in phases.iter().zip(expected(bytes, build, end, platform)) {
        let have: BTreeMap<&str, u64> = phase
            .calls
            .iter()
            .map(|(name, n)| (name.as_str(), *n))
            .collect();
        if have != want {
            let name = &phase.name;
            return Err(format!("{name}: {have:?}, not {want:?} ({build:?}, {end:?})").into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Exact counts of SEAMCALLs: `life` compares each phase with the expected calls.
    #[test]
    fn a_life_costs_the_seamcalls_that_its_size_says_in_every_way() {
        for bytes in [2 << 20, 34 << 20] {
            for build in [Build::Faults, Build::PreFault] {
                for end in [End::LeafByLeaf, End::Ranges, End::KeyFirst] {
                    let phases = life(bytes, build, end).expect("a life");
                    assert_eq!(phases.len(), 5);
                }
            }
        }
    }

    #[test]
    fn key_first_takes_a_quarter_of_the_seamcalls_and_one_page_table_each() {
        let bytes = 64 << 20;
        let total = |end| {
            let phases = life(bytes, Build::PreFault, end).expect("a life");
            phases[3].total() + phases[4].total()
        };
        let (leaf, key) = (total(End::LeafByLeaf), total(End::KeyFirst));
        assert_eq!(leaf - key, 3 * bytes / PAGE);
    }
}
