//! Finds a host for each VM of a fleet, and builds all machines before any starts.

use std::io;
use std::path::PathBuf;

use kvm_ops::{Error, Irqchip, Kind, Tech};
use kvm_ops_machine::{Image, MachineConfig, MachineError, Payload, read_file};
use kvm_ops_tdvf::Order;

use crate::chipset;
use crate::confidential::{
    Account, Books, Firmware, Leaks, Measurement, Start, TdImage, td_params,
};
use crate::exit_code::Code;
use crate::failure::{Failure, code_of};
use crate::files;
use crate::hosts::{AnyMachine, Hosts, Needs, NoPlace, Place, Wanted};
use crate::memory;

use super::problem::{At, Problem, Problems};
use super::source::Source;
use super::spec::{VmSpec, Work};

/// The errno of too many open files, on Linux.
const EMFILE: i32 = 24;

/// A VM that is ready to run.
pub(crate) struct Ready<'a> {
    pub(crate) name: String,
    /// Its entry in the file.
    pub(crate) spec: &'a VmSpec,
    pub(crate) host: &'static str,
    /// Its technology.
    pub(crate) tech: Tech,
    pub(crate) machine: Box<dyn AnyMachine>,
    /// True if the machine is run with the devices of a Q35.
    pub(crate) is_q35: bool,
    /// The firmware's measurement, if the VM has one.
    pub(crate) measurement: Option<Measurement>,
}

/// An optional VM that no host can hold.
pub(crate) struct Skipped<'a> {
    pub(crate) name: String,
    /// Its entry in the file.
    pub(crate) spec: &'a VmSpec,
    /// The reason.
    pub(crate) why: String,
}

/// A fleet that is ready to run.
pub(crate) struct Plan<'a> {
    /// The VMs that run.
    pub(crate) ready: Vec<Ready<'a>>,
    /// The VMs that are left out.
    pub(crate) skipped: Vec<Skipped<'a>>,
    /// The firmware that VMs of the fleet use.
    pub(crate) ledgers: Vec<Ledger<'a>>,
}

/// The counts of one firmware before the first VM was built.
pub(crate) struct Ledger<'a> {
    place: &'a Place,
    firmware: Firmware,
    before: Books,
}

impl Ledger<'_> {
    /// Computes the account of the fleet, after every teardown.
    pub(crate) fn close(&self, leaks: Leaks) -> Option<Account> {
        let after = self.place.books(self.firmware)?;
        Some(Account::draw(self.firmware, &self.before, &after, leaks))
    }

    /// The firmware that the ledger is about.
    pub(crate) const fn firmware(&self) -> Firmware {
        self.firmware
    }
}

/// Builds every machine of a fleet, or returns every problem.
pub(crate) fn build<'a>(
    source: &Source,
    vms: &'a [VmSpec],
    hosts: &'a Hosts,
) -> Result<Plan<'a>, Failure> {
    let problems = Problems::default();
    let mut plan = Plan {
        ready: Vec::new(),
        skipped: Vec::new(),
        ledgers: Vec::new(),
    };
    let mut placed = Vec::new();
    for spec in vms {
        match place(spec, hosts) {
            Ok(place) => placed.push((spec, place)),
            Err(no_place) if spec.optional => {
                let why = no_place.reasons.join("; ");
                plan.skipped.extend(spec.names().map(|name| Skipped {
                    name,
                    spec,
                    why: why.clone(),
                }));
            }
            Err(no_place) => problems.add(homeless(spec, no_place)),
        }
    }
    let all: u64 = vms.iter().fold(0, |sum, vm| {
        sum.saturating_add(vm.memory.saturating_mul(vm.count.into()))
    });
    if let Err(why) = memory::Limits::of_system().maps(all) {
        let problem = Problem::new("the fleet has more memory than this system gives");
        problems.add(
            problem
                .note(why)
                .code(Code::Host)
                .hint("take fewer VMs, or smaller ones"),
        );
    }
    problems.check(source)?;
    // VMs were created and destroyed to find their places; snapshots are taken after that.
    for (spec, place) in &placed {
        plan.open_ledger(spec, place);
    }
    for (spec, place) in placed {
        if let Err(problem) = plan.build(spec, place) {
            problems.add(*problem);
        }
    }
    problems.check(source)?;
    Ok(plan)
}

fn place<'a>(spec: &VmSpec, hosts: &'a Hosts) -> Result<&'a Place, NoPlace> {
    let (needs, irqchip) = match &spec.work {
        Work::BuiltIn(guest) => (Needs::Anything, guest.irqchip),
        Work::Image { irqchip, .. } => {
            let default = match spec.kind.value {
                Kind::Of(Tech::Tdx) => Irqchip::Split,
                _ => Irqchip::default(),
            };
            (Needs::Processor, irqchip.unwrap_or(default))
        }
    };
    let wanted = Wanted {
        choice: spec.host,
        needs,
        kind: spec.kind.value,
        vcpus: spec.vcpus,
        memory: spec.memory,
        irqchip,
    };
    hosts.place(&wanted)
}

fn homeless(spec: &VmSpec, no_place: NoPlace) -> Problem {
    let title = format!(
        "no host can hold the {} VM `{}`",
        spec.kind.value, spec.name.value
    );
    let mut problem = Problem::new(title)
        .at(&spec.kind.span, "asked for here")
        .code(Code::Host);
    for reason in no_place.reasons {
        problem = problem.note(reason);
    }
    problem.hint(
        no_place.hint.unwrap_or_else(|| {
            "`optional = true` leaves a VM out where no host can hold it".into()
        }),
    )
}

impl<'a> Plan<'a> {
    fn open_ledger(&mut self, spec: &VmSpec, place: &'a Place) {
        let tech = spec.kind.value.tech(place.host.vendor());
        let Some(firmware) = Firmware::below(tech) else {
            return;
        };
        let opened = |ledger: &Ledger<'_>| ledger.firmware == firmware;
        if self.ledgers.iter().any(opened) {
            return;
        }
        self.ledgers
            .extend(place.books(firmware).map(|before| Ledger {
                place,
                firmware,
                before,
            }));
    }

    /// Builds the machines of one entry.
    fn build(&mut self, spec: &'a VmSpec, place: &Place) -> Result<(), Box<Problem>> {
        let (image, is_q35) = image(spec)?;
        let tech = spec.kind.value.tech(place.host.vendor());
        let start = match &spec.work {
            Work::BuiltIn(_) => Start::built_in(tech, spec.vcpus, place),
            Work::Image { path, .. } if tech == Tech::Tdx => Some(start_of(path)?),
            Work::Image { .. } => None,
        };
        for name in spec.names() {
            let config = MachineConfig::new()
                .kind(spec.kind.value)
                .vcpus(spec.vcpus)
                .memory(spec.memory);
            let config = match &spec.work {
                Work::BuiltIn(guest) if !place.is_platform() => {
                    config.image(image.clone()).irqchip(guest.irqchip)
                }
                Work::BuiltIn(guest) => {
                    let programs = (guest.programs)();
                    match &start {
                        None => config.payload(Payload::Programs(programs)),
                        Some(start) => start.configure(config, spec.memory, programs),
                    }
                }
                Work::Image {
                    irqchip, allow_rbp, ..
                } => {
                    let config = match irqchip {
                        Some(irqchip) => config.irqchip(*irqchip),
                        None => config,
                    };
                    let config = match tech {
                        Tech::Tdx => config.enc(td_params(*allow_rbp)),
                        _ => config,
                    };
                    config.image(image.clone())
                }
            };
            let machine = place.host.build(config).map_err(|error| {
                refused(format!("cannot build the machine `{name}`"), error)
                    .at(&spec.name.span, "this VM")
                    .note_if(self.ready.len() > 1, || {
                        format!(
                            "{} could be built before it, and are gone",
                            self.ready.len()
                        )
                    })
            })?;
            let measurement = start
                .as_ref()
                .map(|start| start.measurement(place, machine.as_ref()));
            self.ready.push(Ready {
                name,
                spec,
                host: place.host.name(),
                tech: machine.tech(),
                machine,
                is_q35,
                measurement,
            });
        }
        Ok(())
    }
}

/// The measured start of a TD from its firmware, to hold MRTD against it.
fn start_of(path: &At<PathBuf>) -> Result<Start, Box<Problem>> {
    let refused = |why: String| {
        let title = format!("no TD starts from {}", path.value.display());
        let problem = Problem::new(title).at(&path.span, why).code(Code::Input);
        Box::new(problem.hint("`kvm-ops measure tdx` tells what is wrong with an image"))
    };
    let bytes =
        read_file(&path.value, files::FIRMWARE).map_err(|error| refused(error.to_string()))?;
    let image =
        TdImage::parse(&bytes, Order::SinglePass).map_err(|error| refused(error.to_string()))?;
    Ok(Start::of_td(&image))
}

/// Returns the image of a VM, and whether it finds a Q35 around it. That of a built-in guest is its machine code.
fn image(spec: &VmSpec) -> Result<(Image, bool), Box<Problem>> {
    let (path, format, irqchip, kernel, cmdline, initrd) = match &spec.work {
        Work::BuiltIn(guest) => {
            return Ok((Image::flat(guest.name, guest.code), false));
        }
        Work::Image {
            path,
            format,
            kernel,
            cmdline,
            initrd,
            irqchip,
            allow_rbp: _,
        } => (path, format, irqchip, kernel, cmdline, initrd),
    };
    let failed = |error| {
        let title = format!("cannot load the image of `{}`", spec.name.value);
        refused(title, error).at(&path.span, "this image")
    };
    let mut image = Image::open(&path.value).map_err(failed)?;
    if let Some(format) = format {
        image = image.with_format(*format);
    }
    if let Some(kernel) = kernel {
        image = image.open_kernel(&kernel.value).map_err(failed)?;
    }
    if let Some(cmdline) = cmdline {
        image = image.cmdline(cmdline);
    }
    if let Some(initrd) = initrd {
        image = image.open_initrd(&initrd.value).map_err(failed)?;
    }
    let has_kernel_options = cmdline.is_some() || initrd.is_some();
    Ok(chipset::of(
        image,
        spec.kind.value,
        *irqchip,
        has_kernel_options,
    ))
}

fn refused(title: String, error: MachineError) -> Problem {
    let mut hint = error.hint();
    let mut problem = Problem::new(title).code(code_of(&error));
    let mut next: Option<&dyn std::error::Error> = Some(&error);
    let mut last = String::new();
    while let Some(error) = next {
        // An error that only wraps another has its text.
        let text = error.to_string();
        if text != last {
            problem = problem.note(text.as_str());
        }
        last = text;
        if let Some(Error::NoKeyId) = error.downcast_ref() {
            hint = Some("each confidential VM holds a KeyID or ASID: take fewer at once (`count`)");
        }
        if let Some(Error::Sys(_, errno)) = error.downcast_ref() {
            problem = problem.note(io::Error::from_raw_os_error(*errno).to_string());
            if *errno == EMFILE {
                hint = Some("raise the limit of open files (ulimit -n), or take fewer VMs");
            }
        }
        next = error.source();
    }
    match hint {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}
