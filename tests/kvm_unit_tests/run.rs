//! One run of an image: a normal VM of the software platform, and what its console says.

use std::fmt;

use kvm_ops::sim::SimHost;
use kvm_ops::{Irqchip, VcpuId};
use kvm_ops_machine::{ConsoleSink, End, Machine, MachineConfig, RunLimits};

use crate::devices::TestDevices;
use crate::list::Entry;
use crate::model::Model;
use crate::multiboot;

/// Values that the images write to the exit port.
const PASS: u32 = 0;
const SKIP: u32 = 38;
const ABORT: u32 = 63;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Fail,
    /// Nothing was tested.
    Skip,
    /// An exception that the image did not expect.
    Abort,
    TripleFault,
    Timeout,
    /// The platform gave up.
    Stuck,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pass => "pass",
            Self::Fail => "**fail**",
            Self::Skip => "skip",
            Self::Abort => "**abort**",
            Self::TripleFault => "**triple fault**",
            Self::Timeout => "**timeout**",
            Self::Stuck => "**stuck**",
        })
    }
}

/// The result of a run.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    /// Subtests.
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
    pub(crate) instructions: u64,
    pub(crate) seconds: f64,
    pub(crate) console: String,
    /// The end in full, with the place of vCPU 0.
    pub(crate) end: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}P", self.verdict, self.passed)?;
        for (count, letter) in [(self.failed, 'F'), (self.skipped, 'S')] {
            if count != 0 {
                write!(f, "/{count}{letter}")?;
            }
        }
        Ok(())
    }
}

fn verdict(end: &End) -> Verdict {
    match end {
        End::DebugExit(PASS) => Verdict::Pass,
        End::DebugExit(SKIP) => Verdict::Skip,
        End::DebugExit(ABORT) => Verdict::Abort,
        End::DebugExit(_) => Verdict::Fail,
        End::TripleFault => Verdict::TripleFault,
        End::Deadline => Verdict::Timeout,
        _ => Verdict::Stuck,
    }
}

/// Runs an image to its end or its time limit.
pub(crate) fn run(entry: &Entry) -> Result<Outcome, String> {
    let file = std::fs::read(&entry.image);
    let file = file.map_err(|error| format!("{}: {error}", entry.image.display()))?;
    run_file(entry, &file)
}

pub(crate) fn run_file(entry: &Entry, file: &[u8]) -> Result<Outcome, String> {
    let model = Model::parse(&entry.cpu)?;
    let config = MachineConfig::new()
        .vcpus(entry.vcpus)
        .memory(entry.memory)
        .irqchip(Irqchip::Full);
    let host = SimHost::new(model.vendor);
    let mut machine = Machine::build(&host, config).map_err(|error| error.to_string())?;
    let cpuid = model.entries();
    for id in (0..entry.vcpus).map(VcpuId) {
        let vcpu = machine.vcpu_mut(id).ok_or("no such vCPU")?;
        vcpu.set_cpuid(&cpuid).map_err(|error| error.to_string())?;
        // Those that vCPU 0 starts.
        machine.enable_vcpu(id);
    }
    multiboot::boot(&mut machine, file, entry)?;
    let console = ConsoleSink::capture();
    let base = machine.devices(console.clone());
    let devices = TestDevices::new(base, entry.memory, entry.vcpus);
    let limits = RunLimits::none().deadline(entry.timeout);
    let report = machine.run(&devices, limits);
    let report = report.map_err(|error| error.to_string())?;
    let text = console.text();
    let count = |word: &str| text.lines().filter(|line| line.starts_with(word)).count();
    let position = report.vcpus.first().and_then(|vcpu| vcpu.position.clone());
    Ok(Outcome {
        verdict: verdict(&report.end),
        passed: count("PASS: "),
        failed: count("FAIL: "),
        skipped: count("SKIP: "),
        instructions: report.vcpus.iter().filter_map(|v| v.instructions).sum(),
        seconds: report.elapsed.as_secs_f64(),
        end: match position {
            Some(Ok(position)) => format!("{} at {position}", report.end),
            _ => report.end.to_string(),
        },
        console: text,
    })
}
