//! Fleets of growing size, run by the program `kvm-ops` and watched from outside.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{figures, system};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The largest fleet: how many VMs of each kind. One software platform has 31 KeyIDs.
const FULL: [(&str, u64); 5] = [
    ("normal", 1000),
    ("tdx", 30),
    ("sev", 110),
    ("sev-es", 30),
    ("sev-snp", 30),
];

/// The sizes, as parts of the largest.
const PARTS: [u64; 3] = [10, 3, 1];

/// How often the process is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// The clock ticks in a second in which Linux counts processor time for user space.
const TICKS: f64 = 100.0;

/// One run of `fleet`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Fleets {
    /// The processor's name.
    pub cpu: String,
    /// The processors that the run could use.
    pub processors: usize,
    /// The kernel's release.
    pub kernel: String,
    /// The compiler.
    pub rustc: String,
    /// How often each fleet ran.
    pub rounds: usize,
    /// The guest that every VM runs.
    pub payload: String,
    /// Each fleet.
    pub runs: Vec<Run>,
}

/// A fleet of one size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The host of the normal VMs; the others are on the software platforms.
    pub host: String,
    /// Normal VMs.
    pub normal: u64,
    /// Confidential VMs.
    pub confidential: u64,
    /// Seconds by the clock, in the fastest round.
    pub seconds: f64,
    /// Seconds of processor time, in the round that took the least.
    pub processor: f64,
    /// Bytes of memory at their peak, the least of the rounds.
    pub bytes: u64,
    /// Threads at their peak, the most of the rounds.
    pub threads: u64,
    /// Open file descriptors at their peak.
    pub descriptors: u64,
    /// Mappings at their peak.
    pub mappings: u64,
    /// Pages that the firmware was given.
    pub pages: u64,
}

impl Run {
    /// All VMs.
    pub fn vms(&self) -> u64 {
        self.normal + self.confidential
    }
}

/// Measures the fleets in interleaved rounds and writes the figures.
pub fn write(out: &Path, program: &Path, rounds: usize, payload: &str) -> Result<()> {
    let mut hosts = vec!["sim"];
    if Path::new("/dev/kvm").exists() {
        hosts.push("kvm");
    } else {
        eprintln!("without /dev/kvm, so all VMs on the software platforms");
    }
    let fleets = hosts
        .iter()
        .flat_map(|host| PARTS.map(|part| (*host, part)));
    let fleets: Vec<(&str, u64)> = fleets.collect();
    let mut runs: Vec<Option<Run>> = vec![None; fleets.len()];
    for round in 0..rounds.max(1) {
        for ((host, part), best) in fleets.iter().zip(&mut runs) {
            let run = run(program, host, *part, payload)?;
            println!(
                "round {round}, {host}: {} VMs, {:.2} s, {:.2} s of processors, {} KiB",
                run.vms(),
                run.seconds,
                run.processor,
                run.bytes >> 10
            );
            *best = Some(match best.take() {
                Some(old) => least(&old, &run),
                None => run,
            });
        }
    }
    let fleets = Fleets {
        cpu: system::cpu(),
        processors: thread::available_parallelism().map_or(1, usize::from),
        kernel: system::kernel()?,
        rustc: env!("KVM_OPS_BENCH_RUSTC").to_owned(),
        rounds: rounds.max(1),
        payload: payload.to_owned(),
        runs: runs.into_iter().flatten().collect(),
    };
    figures::write(out, &fleets)
}

fn least(a: &Run, b: &Run) -> Run {
    Run {
        seconds: a.seconds.min(b.seconds),
        processor: a.processor.min(b.processor),
        bytes: a.bytes.min(b.bytes),
        threads: a.threads.max(b.threads),
        descriptors: a.descriptors.max(b.descriptors),
        mappings: a.mappings.max(b.mappings),
        ..b.clone()
    }
}

fn file(host: &str, part: u64, payload: &str) -> Result<String> {
    let mut text = "[defaults]\nmemory = \"4M\"\ntimeout = \"300s\"\n".to_owned();
    for (kind, count) in FULL {
        let host = if kind == "normal" { host } else { "sim" };
        write!(
            text,
            "[[vm]]\nname = \"{kind}\"\nkind = \"{kind}\"\nhost = \"{host}\"\n\
             payload = \"{payload}\"\ncount = {}\n",
            count / part
        )?;
    }
    Ok(text)
}

fn run(program: &Path, host: &str, part: u64, payload: &str) -> Result<Run> {
    let start = Instant::now();
    let mut child = Command::new(program)
        .args(["fleet", "--json", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(file(host, part, payload)?.as_bytes())?;
    }
    let mut output = child.stdout.take().ok_or("no output")?;
    let reader = thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).map(|_| text)
    });
    let peak = watch(&mut child)?;
    let seconds = start.elapsed().as_secs_f64();
    let text = reader.join().map_err(|_| "the reader ended badly")??;
    let report: Value = serde_json::from_str(&text)
        .map_err(|error| format!("`{} fleet` said no JSON: {error}", program.display()))?;
    let total = |name: &str| report["totals"][name].as_u64().unwrap_or(0);
    if total("ok") == 0 || total("ok") != total("vms") {
        return Err(format!("{} of {} VMs did well", total("ok"), total("vms")).into());
    }
    let normal = FULL
        .iter()
        .find(|(kind, _)| *kind == "normal")
        .map_or(0, |(_, n)| n / part);
    let firmware = report["firmware"].as_array().map_or(&[][..], Vec::as_slice);
    let taken = firmware
        .iter()
        .filter_map(|one| one["pages"]["taken"].as_u64());
    Ok(Run {
        host: host.to_owned(),
        normal,
        confidential: total("vms") - normal,
        seconds,
        processor: peak.ticks as f64 / TICKS,
        bytes: peak.bytes,
        threads: peak.threads,
        descriptors: peak.descriptors,
        mappings: peak.mappings,
        pages: taken.sum(),
    })
}

/// The most that was seen of a process.
#[derive(Default)]
struct Peak {
    ticks: u64,
    bytes: u64,
    threads: u64,
    descriptors: u64,
    mappings: u64,
}

/// Looks at a process until it ends.
fn watch(child: &mut Child) -> Result<Peak> {
    let process = PathBuf::from(format!("/proc/{}", child.id()));
    let mut peak = Peak::default();
    while child.try_wait()?.is_none() {
        peak.look(&process);
        thread::sleep(LOOK);
    }
    Ok(peak)
}

impl Peak {
    /// What cannot be read, because the process has just ended, leaves the peak as it is.
    fn look(&mut self, process: &Path) {
        let status = fs::read_to_string(process.join("status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        self.bytes = self.bytes.max(field("VmHWM:").unwrap_or(0) << 10);
        self.threads = self.threads.max(field("Threads:").unwrap_or(0));
        let open = fs::read_dir(process.join("fd")).map_or(0, |entries| entries.count() as u64);
        self.descriptors = self.descriptors.max(open);
        let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
        self.mappings = self.mappings.max(maps.lines().count() as u64);
        let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
        // User and system time are fields 14 and 15; the name, in brackets, may hold spaces.
        let fields = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let ticks = fields
            .skip(11)
            .take(2)
            .filter_map(|ticks| ticks.parse::<u64>().ok());
        self.ticks = self.ticks.max(ticks.sum());
    }
}
