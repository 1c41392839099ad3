//! What came of a fleet.

use std::collections::BTreeMap;
use std::time::Duration;

use kvm_ops::{FreeReport, PAGE_SIZE, Tech};
use kvm_ops_machine::{End, MachineError, RunReport};
use serde::Serialize;

use crate::confidential::{Account, Firmware, Leaks, Measurement};
use crate::exit_code::Code;

use super::expect::Expect;
use super::plan::{Ready, Skipped};
use super::resources::Resources;
use super::spec::{VmSpec, Work};

/// How a VM did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Status {
    /// As expected.
    Ok,
    /// Not as expected, or it crashed.
    Failed,
    /// Stopped by a signal.
    Stopped,
    /// Left out: optional, and no host can hold it.
    Skipped,
}

/// What a guest printed.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Console {
    /// How many bytes.
    bytes: u64,
    /// The last line that is not empty.
    pub(crate) last_line: String,
    /// The first 64 KiB.
    text: String,
}

/// What one vCPU did.
#[derive(Debug, Serialize)]
struct Vcpu {
    id: u32,
    exits: u64,
    end: String,
}

/// What came of one VM.
#[derive(Debug, Serialize)]
pub(crate) struct VmReport {
    /// Its name.
    pub(crate) name: String,
    /// How it did.
    pub(crate) status: Status,
    /// What was asked for.
    kind: String,
    /// The technology that held it.
    pub(crate) tech: Option<&'static str>,
    /// Its host.
    pub(crate) host: Option<&'static str>,
    /// The built-in payload or the image.
    runs: String,
    /// How many vCPUs it has.
    pub(crate) vcpus: u32,
    /// Bytes of its memory.
    pub(crate) memory: u64,
    /// The same in pages of 4 KiB.
    pages: u64,
    /// How it ended, in a word or two.
    pub(crate) outcome: &'static str,
    /// How it ended, with numbers.
    pub(crate) end: String,
    /// What was not as expected, or why it was left out.
    pub(crate) problems: Vec<String>,
    /// What the guest reported through the result port.
    result: Option<u32>,
    /// What it printed.
    pub(crate) console: Console,
    /// All its exits.
    pub(crate) exits: u64,
    /// Its exits by kind.
    exits_by_kind: BTreeMap<&'static str, u64>,
    /// Its vCPUs.
    vcpu_reports: Vec<Vcpu>,
    /// What its firmware measured at its start, of a VM that measures.
    measurement: Option<Measurement>,
    /// Pages of the host that it freed in its life, of a VM with private memory.
    pages_freed: u64,
    /// KeyIDs or ASIDs that its teardown freed.
    keys_freed: u32,
    /// What its teardown left behind.
    pub(crate) leaks: Vec<String>,
    /// The same as numbers.
    #[serde(skip)]
    account: Option<Leaks>,
    /// How long it ran, in seconds.
    seconds: f64,
    #[serde(skip)]
    pub(crate) elapsed: Duration,
}

impl VmReport {
    /// Before the run.
    pub(crate) fn new(ready: &Ready<'_>) -> Self {
        Self {
            tech: Some(ready.tech.name()),
            host: Some(ready.host),
            measurement: ready.measurement.clone(),
            ..Self::of(ready.spec, ready.name.clone())
        }
    }

    fn of(spec: &VmSpec, name: String) -> Self {
        Self {
            name,
            status: Status::Failed,
            kind: spec.kind.value.to_string(),
            tech: None,
            host: None,
            runs: match &spec.work {
                Work::BuiltIn(guest) => guest.name.to_owned(),
                Work::Image { path, .. } => path.value.display().to_string(),
            },
            vcpus: spec.vcpus,
            memory: spec.memory,
            pages: spec.memory / PAGE_SIZE,
            outcome: "not started",
            end: "not started".into(),
            problems: Vec::new(),
            result: None,
            console: Console::default(),
            exits: 0,
            exits_by_kind: BTreeMap::new(),
            vcpu_reports: Vec::new(),
            measurement: None,
            pages_freed: 0,
            keys_freed: 0,
            leaks: Vec::new(),
            account: None,
            seconds: 0.0,
            elapsed: Duration::ZERO,
        }
    }

    /// Of a VM that was left out.
    pub(crate) fn skipped(skipped: Skipped<'_>) -> Self {
        Self {
            status: Status::Skipped,
            outcome: "left out",
            end: "left out".into(),
            problems: vec![skipped.why],
            ..Self::of(skipped.spec, skipped.name)
        }
    }

    /// It could not run.
    pub(crate) fn broken(mut self, why: &str) -> Self {
        self.problems.push(why.to_owned());
        self
    }

    /// How long it ran.
    pub(crate) fn time(&mut self, elapsed: Duration) {
        self.elapsed = elapsed;
        self.seconds = elapsed.as_secs_f64();
    }

    /// What it printed.
    pub(crate) fn console(&mut self, bytes: u64, text: String) {
        let last_line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
        self.console = Console {
            bytes,
            last_line: last_line.map(printable).unwrap_or_default(),
            text,
        };
    }

    /// How its run went, held against what was expected.
    pub(crate) fn ran(
        &mut self,
        expect: &Expect,
        ran: Result<RunReport, MachineError>,
        result: Option<u32>,
    ) {
        self.result = result;
        let run = match ran {
            Ok(run) => run,
            Err(error) => {
                self.outcome = "failed";
                self.end = "could not run".into();
                self.problems.push(chain(&error));
                return;
            }
        };
        self.exits = run.exits().total();
        self.exits_by_kind = run
            .exits()
            .iter()
            .map(|(kind, n)| (kind.name(), n))
            .collect();
        self.vcpu_reports = run
            .vcpus
            .iter()
            .map(|vcpu| Vcpu {
                id: vcpu.id.0,
                exits: vcpu.exits.total(),
                end: vcpu.end.to_string(),
            })
            .collect();
        self.outcome = outcome(&run.end);
        self.end = run.end.to_string();
        if run.end == End::Stopped {
            self.status = Status::Stopped;
            return;
        }
        self.problems = expect.check(&run.end, &self.console.text, result);
        let measured = self.measurement.as_ref().map(Measurement::checked);
        self.problems.extend(measured.and_then(Result::err));
        for vcpu in run
            .vcpus
            .iter()
            .filter(|vcpu| vcpu.end.is_failure() && vcpu.end != run.end)
        {
            self.problems
                .push(format!("vCPU {}: {}", vcpu.id, vcpu.end));
        }
        if self.problems.is_empty() {
            self.status = Status::Ok;
        }
    }

    /// How its teardown went.
    pub(crate) fn torn_down(&mut self, report: &FreeReport) {
        self.pages_freed = report.pages_freed;
        self.keys_freed = report.keys_freed;
        let mut account = Leaks::default();
        account.add(report);
        self.account = Some(account);
        self.leaks
            .extend(report.leaks.iter().map(|leak| leak.to_string()));
    }
}

/// What the teardowns of the VMs above a firmware say, summed up.
pub(crate) fn torn_down(vms: &[VmReport], firmware: Firmware) -> Leaks {
    let mut sum = Leaks::default();
    let above = |vm: &&VmReport| {
        let tech = Tech::ALL.iter().find(|tech| vm.tech == Some(tech.name()));
        tech.and_then(|tech| Firmware::below(*tech)) == Some(firmware)
    };
    for vm in vms.iter().filter(above) {
        match &vm.account {
            Some(account) => sum.join(account),
            None => sum.unknown += 1,
        }
    }
    sum
}

fn outcome(end: &End) -> &'static str {
    match end {
        End::Halted => "halted",
        End::Shutdown => "shut down",
        End::Reset => "reset",
        End::DebugExit(_) => "debug exit",
        End::Deadline => "timed out",
        End::Stopped => "stopped",
        end if end.is_failure() => "crashed",
        _ => "ended",
    }
}

/// A guest decides what it prints; control characters must not reach the terminal.
fn printable(line: &str) -> String {
    line.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(&format!(": {error}"));
        next = error.source();
    }
    text
}

/// The sums over a fleet.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Totals {
    /// VMs in the file, copies counted.
    pub(crate) vms: usize,
    /// VMs that did as expected.
    pub(crate) ok: usize,
    /// VMs that did not.
    pub(crate) failed: usize,
    /// VMs that a signal stopped.
    pub(crate) stopped: usize,
    /// VMs that were left out.
    pub(crate) skipped: usize,
    /// vCPUs of the VMs that were not left out.
    pub(crate) vcpus: u32,
    /// Their exits.
    pub(crate) exits: u64,
    /// The pages lent to them, of 4 KiB.
    pub(crate) pages: u64,
    /// What teardowns left behind, by their own account.
    pub(crate) leaks: usize,
}

/// What came of a fleet.
#[derive(Debug, Serialize)]
pub(crate) struct FleetReport {
    /// The fleet file.
    pub(crate) fleet: String,
    /// The VMs, in the order of the file.
    pub(crate) vms: Vec<VmReport>,
    /// The sums.
    pub(crate) totals: Totals,
    /// What confidential VMs took from the firmware below them, by all counts.
    pub(crate) firmware: Vec<Account>,
    /// What this process held before the fleet, and after, by the system's account.
    pub(crate) before: Resources,
    /// See `before`.
    pub(crate) after: Resources,
    /// How long it took from building the first machine, in seconds.
    pub(crate) seconds: f64,
}

impl FleetReport {
    /// Adds up.
    pub(crate) fn new(
        fleet: String,
        vms: Vec<VmReport>,
        firmware: Vec<Account>,
        before: Resources,
        after: Resources,
        elapsed: Duration,
    ) -> Self {
        let mut totals = Totals {
            vms: vms.len(),
            ..Totals::default()
        };
        for vm in &vms {
            match vm.status {
                Status::Ok => totals.ok += 1,
                Status::Failed => totals.failed += 1,
                Status::Stopped => totals.stopped += 1,
                Status::Skipped => {
                    totals.skipped += 1;
                    continue;
                }
            }
            totals.vcpus += vm.vcpus;
            totals.exits += vm.exits;
            totals.pages += vm.pages;
            totals.leaks += vm.leaks.len();
        }
        Self {
            fleet,
            vms,
            totals,
            firmware,
            before,
            after,
            seconds: elapsed.as_secs_f64(),
        }
    }

    /// What the process holds that it did not hold before, each a sentence.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        self.after.more_than(&self.before)
    }

    /// The exit code.
    pub(crate) fn code(&self) -> Code {
        let unsound = |account: &Account| !account.disagreements.is_empty();
        if self.totals.leaks > 0
            || !self.left_behind().is_empty()
            || self.firmware.iter().any(unsound)
        {
            Code::Leak
        } else if self.totals.stopped > 0 {
            Code::Interrupted
        } else if self.totals.failed > 0 {
            Code::Guest
        } else {
            Code::Fine
        }
    }
}
