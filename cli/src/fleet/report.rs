//! The report of a fleet.

use std::collections::BTreeMap;
use std::time::Duration;

use kvm_ops::{FreeReport, PAGE_SIZE, Tech};
use kvm_ops_machine::{End, MachineError, RunReport};
use serde::Serialize;

use crate::confidential::{Account, Firmware, Leaks, Measurement};
use crate::exit_code::Code;
use crate::vm_report::{self, Console};

use super::expect::Expect;
use super::plan::{Ready, Skipped};
use super::resources::Resources;
use super::spec::{VmSpec, Work};

/// The result of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Status {
    /// It did as expected.
    Ok,
    /// It crashed or did not do as expected.
    Failed,
    /// A signal stopped it.
    Stopped,
    /// It is optional, and no host can hold it.
    Skipped,
}

/// The report of one VM.
#[derive(Debug, Serialize)]
pub(crate) struct VmReport {
    pub(crate) name: String,
    pub(crate) status: Status,
    /// The kind that the file asks for.
    kind: String,
    /// The technology that held it.
    pub(crate) tech: Option<&'static str>,
    pub(crate) host: Option<&'static str>,
    /// The built-in payload or the image.
    runs: String,
    pub(crate) vcpus: u32,
    /// Its memory in bytes.
    pub(crate) memory: u64,
    /// Its memory in pages of 4 KiB.
    pages: u64,
    /// The end of the run, in a word or two.
    pub(crate) outcome: &'static str,
    /// The end of the run, with numbers.
    pub(crate) end: String,
    /// The failed expectations, or the reason why it was left out.
    pub(crate) problems: Vec<String>,
    /// The value that the guest reported through the result port.
    result: Option<u32>,
    pub(crate) console: Console,
    /// Instructions of machine code; `None` where the host counts none.
    instructions: Option<u64>,
    /// The number of its exits.
    pub(crate) exits: u64,
    /// Its exits by kind.
    exits_by_kind: BTreeMap<&'static str, u64>,
    vcpu_reports: Vec<vm_report::Vcpu>,
    /// The firmware's launch measurement, if the VM has one.
    measurement: Option<Measurement>,
    /// Host pages freed during its life, if it has private memory.
    pages_freed: u64,
    /// KeyIDs or ASIDs that its teardown freed.
    keys_freed: u32,
    /// Resources that its teardown leaked.
    pub(crate) leaks: Vec<String>,
    /// The same leaks as numbers.
    #[serde(skip)]
    account: Option<Leaks>,
    /// The duration of the run, in seconds.
    seconds: f64,
    #[serde(skip)]
    pub(crate) elapsed: Duration,
}

impl VmReport {
    /// The report before the run.
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
            instructions: None,
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

    /// The report of a VM that was left out.
    pub(crate) fn skipped(skipped: Skipped<'_>) -> Self {
        Self {
            status: Status::Skipped,
            outcome: "left out",
            end: "left out".into(),
            problems: vec![skipped.why],
            ..Self::of(skipped.spec, skipped.name)
        }
    }

    /// Marks a VM that could not run.
    pub(crate) fn broken(mut self, why: &str) -> Self {
        self.problems.push(why.to_owned());
        self
    }

    /// Sets the duration of the run.
    pub(crate) fn time(&mut self, elapsed: Duration) {
        self.elapsed = elapsed;
        self.seconds = elapsed.as_secs_f64();
    }

    /// Sets the console output.
    pub(crate) fn console(&mut self, bytes: u64, text: String) {
        self.console = Console::new(bytes, text);
    }

    /// Records the result of the run, and compares it with the expected one.
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
        self.instructions = run.instructions();
        self.exits = run.exits().total();
        self.exits_by_kind = vm_report::exits_by_kind(&run);
        self.vcpu_reports = vm_report::Vcpu::of(&run);
        self.outcome = vm_report::outcome(&run.end);
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
        } else {
            self.problems.extend(vm_report::positions(&run));
            let why = run.diagnosis().map(|why| why.to_string());
            self.problems.extend(why);
        }
    }

    /// Records the teardown.
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

/// Sums the teardown reports of the VMs that use a firmware.
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

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(&format!(": {error}"));
        next = error.source();
    }
    text
}

/// The sums of a fleet.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Totals {
    /// VMs in the file, copies included.
    pub(crate) vms: usize,
    /// VMs that did as expected.
    pub(crate) ok: usize,
    /// VMs that did not do as expected.
    pub(crate) failed: usize,
    /// VMs that a signal stopped.
    pub(crate) stopped: usize,
    /// VMs that were left out.
    pub(crate) skipped: usize,
    /// vCPUs of the VMs that were not left out.
    pub(crate) vcpus: u32,
    /// Exits of these vCPUs.
    pub(crate) exits: u64,
    /// Instructions of machine code, as far as they were counted.
    pub(crate) instructions: u64,
    /// Pages of 4 KiB lent to the VMs.
    pub(crate) pages: u64,
    /// Resources that teardowns leaked, as they report it.
    pub(crate) leaks: usize,
}

/// The report of a fleet.
#[derive(Debug, Serialize)]
pub(crate) struct FleetReport {
    /// The name of the fleet file.
    pub(crate) fleet: String,
    /// The VMs, in the order of the file.
    pub(crate) vms: Vec<VmReport>,
    pub(crate) totals: Totals,
    /// The accounts of the firmware that confidential VMs used.
    pub(crate) firmware: Vec<Account>,
    /// The resources of this process before the fleet, as the system counts them.
    pub(crate) before: Resources,
    /// The same after the fleet.
    pub(crate) after: Resources,
    /// The most memory in bytes that this process ever had in RAM; `None` if the system does not tell.
    pub(crate) peak_memory: Option<u64>,
    /// The duration in seconds, from the building of the first machine.
    pub(crate) seconds: f64,
}

impl FleetReport {
    /// Builds the report and its sums.
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
            totals.instructions += vm.instructions.unwrap_or(0);
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
            peak_memory: crate::memory::peak(),
            seconds: elapsed.as_secs_f64(),
        }
    }

    /// Resources that the process has gained since the start, one sentence each.
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
