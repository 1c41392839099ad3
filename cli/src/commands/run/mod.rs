//! `kvm-ops run`: runs one VM from an image.
mod td;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser;
use kvm_ops::{Irqchip, Kind, MAX_VCPUS, Tech};
use kvm_ops_machine::{
    ConsoleSink, End, Image, ImageFormat, MachineConfig, MachineError, RunLimits, RunReport,
    Stopper,
};

use crate::args::HostChoice;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::hosts::{AnyMachine, Hosts, NO_MACHINE_CODE, Needs, NoPlace, Place};
use crate::interrupt::Interrupt;
use crate::term;
use crate::units;

/// Runs one VM from an image. Its console goes to standard output; how it ended and its exits are
/// summed up on standard error.
///
/// The format is detected: ELF and bzImage by their magic numbers, firmware by its size and the jump
/// at its reset vector, all else is flat code that starts in real mode at 0x7c00. The console is
/// what the guest writes to the first serial port (0x3f8) and to the debug ports (0x402, 0xe9).
///
/// Firmware without a disk never ends, so the timeout is an orderly end. It is stated on standard
/// error, and the exit code is 0.
///
/// A TD (`--tech tdx`) starts with what the TDVF metadata of its firmware lists, or with a small
/// built-in start. Its MRTD, as the TDX module has it, must be the one that `kvm-ops measure tdx`
/// prints. On the software platform no machine code runs: a built-in guest reads the pages of the
/// launch, uses private memory, shares some of it and takes it back, and asks for a report. Each
/// step is listed with its SEAMCALLs, and what the TD took from the module must have come back.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes: 0 if the guest halted, shut down, asked for a reset, or ran until the timeout; 1 if it
could not be started; 3 if it crashed, or the platform could not go on with it; 4 if the teardown
left something behind, or the sums of a TD's account do not agree; 130 if a signal stopped it. A guest that ends itself through the debug-exit
port with a value other than 0 counts as crashed.

Examples:
  kvm-ops run /usr/share/seabios/bios.bin --timeout 2s
  kvm-ops run bzImage --initrd initrd.img --cmdline 'console=ttyS0' --memory 512M --timeout 1m
  kvm-ops run boot-sector.bin --format flat --memory 1M
  kvm-ops run --tech tdx
  kvm-ops run --tech tdx /usr/share/ovmf/OVMF.fd")]
pub(crate) struct Args {
    /// The image: firmware, bzImage, ELF or flat code; of a TD, firmware with TDVF metadata, or a
    /// small built-in one if none is named
    #[arg(value_name = "IMAGE")]
    image: Option<PathBuf>,

    /// Where it runs. An image needs a processor, so the software platform refuses it, except as
    /// the measured start of a TD
    #[arg(long, value_enum, default_value_t)]
    host: HostChoice,

    /// The technology that holds it: a normal VM, or a named one
    #[arg(long, default_value = "normal", value_parser = kinds())]
    tech: Kind,

    /// Memory, in whole pages
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = units::parse_memory)]
    memory: u64,

    /// vCPUs; the guest starts all but the first itself
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=MAX_VCPUS as i64))]
    vcpus: u32,

    /// What the image is, instead of what it looks like
    #[arg(long, value_parser = formats())]
    format: Option<ImageFormat>,

    /// Interrupt controllers in the host: none, so that HLT ends a vCPU; full, with which a guest
    /// starts further vCPUs; split, only the local APICs. Firmware and kernels get full
    #[arg(long, value_parser = irqchips())]
    irqchip: Option<Irqchip>,

    /// In which order a TD's pages are added and measured
    #[arg(long, value_enum)]
    order: Option<LaunchOrder>,

    /// The kernel's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// How long it may run
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::parse_time)]
    timeout: Duration,
}

/// The order of a TD's launch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum LaunchOrder {
    /// Page by page, as Linux launches a TD
    #[default]
    Single,
    /// Section by section: all pages are added, then all are measured
    TwoPass,
}

impl Args {
    /// The image's name in messages.
    fn name(&self) -> String {
        match &self.image {
            Some(path) => path.display().to_string(),
            None => "the built-in guest".into(),
        }
    }
}

fn kinds() -> impl TypedValueParser<Value = Kind> {
    let names = std::iter::once("normal").chain(Tech::ALL.iter().map(|tech| tech.name()));
    PossibleValuesParser::new(names).try_map(|name| Kind::from_name(&name).ok_or("unknown"))
}

fn formats() -> impl TypedValueParser<Value = ImageFormat> {
    PossibleValuesParser::new(ImageFormat::ALL.map(ImageFormat::name))
        .try_map(|name| ImageFormat::from_name(&name).ok_or("unknown"))
}

fn irqchips() -> impl TypedValueParser<Value = Irqchip> {
    PossibleValuesParser::new(units::IRQCHIPS.map(|(name, _)| name))
        .try_map(|name| units::irqchip(&name).ok_or("unknown"))
}

pub(crate) fn run(args: &Args) -> Outcome {
    if args.tech == Kind::Of(Tech::Tdx) {
        return td::run(args);
    }
    if args.order.is_some() {
        return Err(
            Failure::new(format!("--order has no meaning for a {} VM", args.tech))
                .hint("only a TD's launch has one: --tech tdx")
                .code(Code::Usage),
        );
    }
    let path = args.image.as_deref().ok_or_else(|| {
        Failure::new(format!("a {} VM needs an image to run", args.tech))
            .hint("`kvm-ops fleet` runs guests that need none")
            .code(Code::Usage)
    })?;
    let image = image(args, path)?;
    if args.host == HostChoice::Sim {
        return Err(homeless(args, NoPlace::no_processor()));
    }
    let interrupt = Interrupt::install()?;
    let mut hosts = Hosts::open(args.host);
    if let Some(failure) = hosts.take_no_kvm() {
        return Err(failure.hint(format!("an image needs a processor: {NO_MACHINE_CODE}")));
    }
    let place = hosts
        .place(
            args.host,
            Needs::Processor,
            args.tech,
            args.vcpus,
            args.irqchip.unwrap_or_default(),
        )
        .map_err(|no_place| homeless(args, no_place))?;
    let mut config = MachineConfig::new()
        .kind(args.tech)
        .vcpus(args.vcpus)
        .memory(args.memory)
        .image(image);
    if let Some(irqchip) = args.irqchip {
        config = config.irqchip(irqchip);
    }
    let mut machine = place
        .host
        .build(config)
        .map_err(|error| refused("the machine cannot be built", error))?;
    interrupt.stops(machine.stopper());

    let terminal = Terminal::new(machine.stopper());
    let console = ConsoleSink::writer(terminal.clone());
    let devices = machine.devices(console.clone());
    let ran = machine.run(&devices, RunLimits::none().deadline(args.timeout));
    terminal.finish();
    let broken = console.take_error();
    let code = summary(args, place, machine.as_ref(), ran, terminal.closed());
    interrupt.clear();
    let freed = machine.destroy();
    for leak in &freed.leaks {
        term::complain(leak);
    }
    let code = code?;
    if !freed.is_clean() {
        return Ok(Code::Leak);
    }
    match broken {
        Some(error) => Err(error.into()),
        None => Ok(code),
    }
}

fn image(args: &Args, path: &Path) -> Result<Image, Failure> {
    let failed = |error| refused("the image cannot be loaded", error);
    let mut image = Image::open(path).map_err(failed)?;
    if let Some(format) = args.format {
        image = image.with_format(format);
    }
    if let Some(cmdline) = &args.cmdline {
        image = image.cmdline(cmdline);
    }
    if let Some(initrd) = &args.initrd {
        image = image.open_initrd(initrd).map_err(failed)?;
    }
    Ok(image)
}

fn refused(what: &str, error: MachineError) -> Failure {
    let hint = error.hint();
    let failure = Failure::because(what, error);
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

fn homeless(args: &Args, no_place: NoPlace) -> Failure {
    let failure = Failure::because(
        format!("no host can run {} as a {} VM", args.name(), args.tech),
        no_place.reasons.join("; "),
    );
    match no_place.hint {
        Some(hint) => failure.hint(hint),
        None => failure.hint("`kvm-ops doctor` shows what this host offers, and why not"),
    }
}

/// Prints a summary of the run to standard error.
fn summary(
    args: &Args,
    place: &Place,
    machine: &dyn AnyMachine,
    ran: Result<RunReport, MachineError>,
    unheard: bool,
) -> Outcome {
    let run = ran.map_err(|error| refused("the machine cannot be run", error))?;
    let exits = run.exits();
    let kinds: Vec<_> = exits
        .iter()
        .map(|(kind, n)| format!("{} {n}", kind.name()))
        .collect();
    term::complain(format!(
        "{}: {} after {} on {} ({})\n{} exits: {}",
        args.name(),
        run.end,
        units::time(run.elapsed),
        place.host.name(),
        machine.tech(),
        exits.total(),
        kinds.join(", "),
    ));
    if run.vcpus.len() > 1 {
        for vcpu in &run.vcpus {
            term::complain(format!(
                "vCPU {}: {}, {} exits",
                vcpu.id,
                vcpu.end,
                vcpu.exits.total()
            ));
        }
    }
    Ok(match run.end {
        End::Stopped if unheard => Code::Fine,
        End::Stopped => Code::Interrupted,
        End::DebugExit(value) if value != 0 => Code::Guest,
        _ if run.is_failure() => Code::Guest,
        _ => Code::Fine,
    })
}

/// Standard output as a guest's console. If it is closed, the guest is stopped.
#[derive(Clone)]
struct Terminal(Arc<State>);

struct State {
    stopper: Stopper,
    last: AtomicU8,
    closed: AtomicBool,
}

impl Terminal {
    fn new(stopper: Stopper) -> Self {
        Self(Arc::new(State {
            stopper,
            last: AtomicU8::new(b'\n'),
            closed: AtomicBool::new(false),
        }))
    }

    /// Returns true if standard output accepts no more data.
    fn closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    /// Ends a line that the guest has left open.
    fn finish(&self) {
        if self.0.last.load(Ordering::SeqCst) != b'\n' && !self.closed() {
            // An error here is ignored: it only loses the line's end.
            let _ = io::stdout()
                .write_all(b"\n")
                .and_then(|()| io::stdout().flush());
        }
    }
}

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = io::stdout().write(bytes);
        if let (Ok(1..), Some(last)) = (&written, bytes.last()) {
            self.0.last.store(*last, Ordering::SeqCst);
        }
        self.or_stop(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.or_stop(io::stdout().flush())
    }
}

impl Terminal {
    fn or_stop<T>(&self, result: io::Result<T>) -> io::Result<T> {
        match &result {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                self.0.closed.store(true, Ordering::SeqCst);
                self.0.stopper.stop();
            }
            _ => {}
        }
        result
    }
}
