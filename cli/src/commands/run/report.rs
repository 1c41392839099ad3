//! The report of a run, as lines or as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::thread;

use kvm_ops::{FreeReport, Tech};
use kvm_ops_machine::{
    ConsoleSink, Devices, Disk, End, ExitContext, ExitHandler, FileKind, Flow, Image, ImageFormat,
    Inside, Quoting, RunLimits, RunReport,
};
use serde::Serialize;

use super::attend::{Attendant, TypeIn};
use super::console::Terminal;
use super::{Args, ConsoleKind, disks};
use crate::confidential::Quotes;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::hosts::{AnyMachine, Place};
use crate::term;
use crate::units;
use crate::until::{Seen, Until};
use crate::vm_report::{self, CONSOLE_LIMIT, Console};

/// The kind that an image is taken for, and the reason.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Taken {
    /// The format in which it is loaded.
    format: &'static str,
    /// True if the command line states the format.
    stated: bool,
    /// What it looks like.
    kind: &'static str,
    why: String,
}

impl Taken {
    pub(super) fn of(image: &Image, stated: Option<ImageFormat>) -> Self {
        let recognition = image.recognition();
        Self {
            format: image.format().map_or("none", ImageFormat::name),
            stated: stated.is_some(),
            kind: recognition.kind().name(),
            why: recognition.why().to_owned(),
        }
    }

    fn is_unknown(&self) -> bool {
        self.kind == FileKind::Unknown.name()
    }
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.stated, self.is_unknown()) {
            (false, _) => write!(f, "taken for {}: {}", self.kind, self.why),
            (true, true) => write!(f, "run as {}, as --format says", self.format),
            (true, false) => write!(
                f,
                "run as {}, as --format says; it looks like {}: {}",
                self.format, self.kind, self.why
            ),
        }
    }
}

/// The devices around a VM.
pub(super) enum Chipset {
    /// Those of every PC.
    Pc,
    /// A Q35, with what firmware asks for, with disks, and with quotes for a TD.
    Q35(Vec<Disk>, Option<Box<Quoting<Quotes>>>),
}

/// A run that is over.
pub(super) struct Ran {
    run: RunReport,
    disks: Vec<disks::Used>,
    /// The console, if it is a part of the report.
    console: Option<Console>,
    /// True if standard output took no more of the console.
    unheard: bool,
    /// True if a key ended the run.
    asked: bool,
    broken: Option<io::Error>,
}

impl Ran {
    /// Runs a machine, with its console on standard output or, for JSON, in the report.
    pub(super) fn of(
        args: &Args,
        place: &Place,
        machine: &mut dyn AnyMachine,
        chipset: Chipset,
    ) -> Outcome<Self> {
        let terminal = Terminal::new(machine.stopper());
        let seen = Seen::default();
        let until = args.until.as_deref().unwrap_or_default();
        let console = if args.json {
            ConsoleSink::tee(seen.looks_for(until, io::sink()), CONSOLE_LIMIT)
        } else {
            ConsoleSink::writer(seen.looks_for(until, terminal.clone()))
        };
        let stop_clock = |devices: Devices| match args.clock {
            Some(at) => devices.stop_clock(at),
            None => devices,
        };
        let mut attendant = Attendant::new(place.platform.as_ref(), machine.stopper(), args.json);
        let limits = RunLimits::none().deadline(args.timeout);
        let (disks, quoting) = match chipset {
            Chipset::Pc => (None, None),
            Chipset::Q35(disks, quoting) => (Some(disks), quoting),
        };
        let mut run =
            |machine: &mut dyn AnyMachine, devices: &dyn ExitHandler, type_in: &TypeIn<'_>| {
                let quoting = quoting.as_deref();
                let devices = |exit: &mut ExitContext<'_>| match quoting
                    .is_some_and(|quoting| quoting.answer(exit))
                {
                    true => Flow::Continue,
                    false => devices.handle(exit),
                };
                let seen = seen.clone();
                let handler = Until {
                    devices: &devices,
                    seen,
                };
                let mut work = |inside: &dyn Inside| {
                    thread::scope(|scope| {
                        if let Some(quoting) = quoting {
                            scope.spawn(move || quoting.serve(inside));
                        }
                        if attendant.is_needed() {
                            attendant.attend(inside, type_in);
                        }
                    });
                };
                machine.run_while(&handler, limits, &mut work)
            };
        let mut used = Vec::new();
        let ran = match disks {
            None => {
                let devices = stop_clock(machine.devices(console.clone()));
                run(machine, &devices, &|keys, _| devices.type_serial(keys))
            }
            Some(disks) => {
                used = disks::Used::before(&disks);
                let q35 = machine.q35(console.clone()).map_devices(stop_clock);
                let mut q35 = disks::plug(q35, disks)?;
                if args.console == ConsoleKind::Virtio {
                    q35 = q35.with_console(console.clone()).map_err(|error| {
                        Failure::of_machine("the console cannot be added", error)
                    })?;
                }
                let ran = run(machine, &q35, &|keys, inside| match args.console {
                    ConsoleKind::Serial => q35.type_serial(keys, inside),
                    ConsoleKind::Virtio => q35.type_console(keys, inside),
                });
                let counts = used.into_iter().zip(q35.disk_counts());
                used = counts.map(|(disk, counts)| disk.with(counts)).collect();
                ran
            }
        };
        let asked = attendant.was_asked_to_end();
        drop(attendant);
        terminal.finish();
        Ok(Self {
            run: ran.map_err(|error| Failure::of_machine("the machine cannot be run", error))?,
            disks: used,
            console: args
                .json
                .then(|| Console::new(console.printed(), console.text())),
            unheard: terminal.closed(),
            asked,
            broken: console.take_error(),
        })
    }

    /// The end of the run, in a sentence's part.
    pub(super) fn end(&self) -> String {
        self.run.end.to_string()
    }

    /// The exit code that the guest's end has.
    pub(super) fn code(&self) -> Code {
        match self.run.end {
            End::Stopped if self.unheard || self.asked => Code::Fine,
            End::Stopped => Code::Interrupted,
            End::DebugExit(value) if value != 0 => Code::Guest,
            _ if self.run.is_failure() => Code::Guest,
            _ => Code::Fine,
        }
    }
}

/// The things that a report tells beside the run.
pub(super) struct Told<'a> {
    pub(super) args: &'a Args,
    pub(super) place: &'a Place,
    pub(super) tech: Tech,
    /// The kind of the image, if there is one.
    pub(super) taken: Option<Taken>,
}

/// The report in JSON.
#[derive(Serialize)]
struct Report<'a> {
    image: Option<String>,
    taken_for: Option<&'a Taken>,
    host: &'static str,
    tech: &'static str,
    vcpus: u32,
    memory: u64,
    /// The end of the run, in a word or two.
    outcome: &'static str,
    /// The same with numbers.
    end: String,
    /// Instructions of machine code; `None` where the host counts none.
    instructions: Option<u64>,
    exits: u64,
    exits_by_kind: BTreeMap<&'static str, u64>,
    vcpu_reports: Vec<vm_report::Vcpu>,
    disks: &'a [disks::Used],
    console: Option<&'a Console>,
    leaks: Vec<String>,
    seconds: f64,
    exit_code: u8,
}

impl Told<'_> {
    /// Tells of a run and its teardown, and returns the exit code.
    pub(super) fn finish(&self, ran: Ran, freed: &FreeReport) -> Outcome {
        let code = match freed.is_clean() {
            true => ran.code(),
            false => Code::Leak,
        };
        if self.args.json {
            term::say_json(&self.json(&ran, freed, code))?;
        } else {
            self.lines(&ran);
            for leak in &freed.leaks {
                term::complain(leak);
            }
        }
        match ran.broken {
            Some(error) if code != Code::Leak => Err(error.into()),
            _ => Ok(code),
        }
    }

    /// The report in JSON, to be printed or to be a part of another.
    pub(super) fn json<'a>(
        &'a self,
        ran: &'a Ran,
        freed: &FreeReport,
        code: Code,
    ) -> impl Serialize + use<'a> {
        let image = self.args.image.as_ref();
        Report {
            image: image.map(|path| path.display().to_string()),
            taken_for: self.taken.as_ref(),
            host: self.place.host.name(),
            tech: self.tech.name(),
            vcpus: self.args.vcpus,
            memory: self.args.memory,
            outcome: vm_report::outcome(&ran.run.end),
            end: ran.run.end.to_string(),
            instructions: ran.run.instructions(),
            exits: ran.run.exits().total(),
            exits_by_kind: vm_report::exits_by_kind(&ran.run),
            vcpu_reports: vm_report::Vcpu::of(&ran.run),
            disks: &ran.disks,
            console: ran.console.as_ref(),
            leaks: freed.leaks.iter().map(ToString::to_string).collect(),
            seconds: ran.run.elapsed.as_secs_f64(),
            exit_code: code as u8,
        }
    }

    /// Sums the run up on standard error.
    pub(super) fn lines(&self, ran: &Ran) {
        let run = &ran.run;
        let exits = run.exits();
        let kinds: Vec<_> = exits
            .iter()
            .map(|(kind, n)| format!("{} {n}", kind.name()))
            .collect();
        term::complain(format!(
            "{}: {} after {} on {} ({})\n{} exits: {}",
            self.args.name(),
            run.end,
            units::time(run.elapsed),
            self.place.host.name(),
            self.tech,
            exits.total(),
            kinds.join(", "),
        ));
        if let Some(count) = run.instructions() {
            let rate = units::millions_in_a_second(count, run.elapsed);
            term::complain(format!("{count} instructions, {rate}"));
        }
        if run.vcpus.len() > 1 {
            for vcpu in &run.vcpus {
                let total = vcpu.exits.total();
                term::complain(format!("vCPU {}: {}, {total} exits", vcpu.id, vcpu.end));
            }
        }
        for disk in &ran.disks {
            term::complain(disk.line());
        }
        if let Some(why) = run.diagnosis() {
            term::complain(format!("why: {why}"));
        }
        for line in vm_report::positions(run) {
            term::complain(line);
        }
    }
}
