//! Runs the machines of a plan side by side, each on its own threads, and tears them down.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use kvm_ops::Exit;
use kvm_ops_machine::{ConsoleSink, ExitContext, ExitHandler, Flow, RunLimits};

use crate::guests::{Mixer, RESULT_PORT};
use crate::interrupt::Interrupt;
use crate::until::{Seen, Until};
use crate::vm_report::CONSOLE_LIMIT;

use super::plan::{Ledger, Plan, Ready};
use super::progress::Progress;
use super::report::VmReport;
use super::spec::Work;

/// Runs every VM. Returns the reports in the order of the file, and the ledgers to close.
pub(crate) fn run<'a>(
    plan: Plan<'a>,
    interrupt: &Interrupt,
    progress: &Progress,
) -> (Vec<VmReport>, Vec<Ledger<'a>>) {
    for ready in &plan.ready {
        interrupt.stops(ready.machine.stopper());
    }
    let mut reports: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = plan
            .ready
            .into_iter()
            .map(|ready| {
                let spec = ready.spec;
                let unstarted = VmReport::new(&ready);
                let spawned = thread::Builder::new()
                    .name(ready.name.clone())
                    .spawn_scoped(scope, move || {
                        let report = live(ready);
                        progress.ended(&report);
                        report
                    });
                (spec, unstarted, spawned)
            })
            .collect();
        threads
            .into_iter()
            .map(|(spec, unstarted, spawned)| {
                let report = match spawned {
                    Ok(thread) => thread
                        .join()
                        .unwrap_or_else(|_| unstarted.broken("its thread panicked")),
                    // The machine was dropped with the closure, which released everything.
                    Err(error) => unstarted.broken(&format!("cannot start a thread: {error}")),
                };
                (spec.span.start, report)
            })
            .collect()
    });
    interrupt.clear();
    reports.extend(
        plan.skipped
            .into_iter()
            .map(|skipped| (skipped.spec.span.start, VmReport::skipped(skipped))),
    );
    // Stable, so that the VMs of one entry stay in order.
    reports.sort_by_key(|(at, _)| *at);
    let reports = reports.into_iter().map(|(_, report)| report).collect();
    (reports, plan.ledgers)
}

/// Runs one VM, from its first instruction to its teardown.
fn live(ready: Ready<'_>) -> VmReport {
    let mut report = VmReport::new(&ready);
    let Ready {
        spec,
        mut machine,
        is_q35,
        ..
    } = ready;
    let seen = Seen::default();
    let search = seen.looks_for(spec.expect.ends_at(), std::io::sink());
    let console = ConsoleSink::tee(search, CONSOLE_LIMIT);
    let devices: Box<dyn ExitHandler> = match is_q35 {
        true => Box::new(machine.q35(console.clone())),
        false => Box::new(machine.devices(console.clone())),
    };
    let answers = Answers {
        devices,
        mixer: Mixer::default(),
        has_mixer: matches!(spec.work, Work::BuiltIn(_)),
        takes_result: spec.expect.result.is_some(),
        result: Mutex::new(None),
    };
    let start = Instant::now();
    let until = Until {
        devices: &answers,
        seen,
    };
    let ran = machine.run(&until, RunLimits::none().deadline(spec.timeout));
    report.time(start.elapsed());
    report.console(console.printed(), console.text());
    report.ran(&spec.expect, ran, answers.result());
    report.torn_down(&machine.destroy());
    report
}

/// Answers the exits of one VM: from the result port, the device of the built-in guests, and a PC's
/// devices.
struct Answers {
    devices: Box<dyn ExitHandler>,
    mixer: Mixer,
    has_mixer: bool,
    takes_result: bool,
    result: Mutex<Option<u32>>,
}

impl Answers {
    fn result(&self) -> Option<u32> {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ExitHandler for Answers {
    fn handle(&self, context: &mut ExitContext<'_>) -> Flow {
        match context.exit() {
            Exit::IoOut {
                port: RESULT_PORT,
                size: 4,
                ..
            } if self.takes_result => {
                if let Ok(word) = (&*context.data()).try_into() {
                    *self.result.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some(u32::from_le_bytes(word));
                }
                Flow::Continue
            }
            Exit::MmioWrite { gpa, .. }
                if self.has_mixer && self.mixer.write(gpa, context.data()) =>
            {
                Flow::Continue
            }
            Exit::MmioRead { gpa, .. }
                if self.has_mixer && self.mixer.read(gpa, context.data()) =>
            {
                Flow::Continue
            }
            _ => self.devices.handle(context),
        }
    }
}
