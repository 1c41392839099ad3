//! `kvm-ops run`: runs one VM from an image.

mod attend;
mod console;
mod disks;
mod keys;
mod program;
mod report;
mod sev;
mod steps;
mod td;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser;
use kvm_ops::{Irqchip, Kind, MAX_VCPUS, Tech};
use kvm_ops_machine::{Image, ImageFormat, MachineConfig};

use crate::args::HostChoice;
use crate::chipset;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::hosts::{Hosts, Needs, NoPlace, Place, Wanted};
use crate::interrupt::Interrupt;
use crate::term;
use crate::units;

use report::{Chipset, Ran, Taken, Told};

/// Runs one VM from an image. Its console goes to standard output; how it ended and its exits are
/// summed up on standard error.
///
/// What the image is taken for, and why, is said first. Firmware is known by the code at its reset
/// vector or by OVMF's table of GUIDed entries, ELF and bzImage by their magic numbers, a boot sector
/// by its size and its last two bytes. A file of another kind is refused with its kind and what to do;
/// flat code, which starts in real mode at 0x7c00, has no marks and is asked for (--format flat).
///
/// The console is what the guest writes to the first serial port (0x3f8) and to the debug ports (0x402,
/// 0xe9). Where the guest fails, or the timeout passes, each vCPU's address, mode and instruction are
/// shown. An image that starts without firmware finds an interrupt table that reports: exceptions that
/// it does not handle are failures, and so are calls of a BIOS.
///
/// Where standard input is a terminal, keys go to the guest's serial line, or with --console virtio to that console, Ctrl-C too.
/// Ctrl-A x ends the run, Ctrl-A s tells time, instructions and their rate, Ctrl-A a is Ctrl-A itself. Where standard error
/// is a terminal and standard output is not, time, instructions and rate are shown there all the time.
///
/// On the software platform time is counted in instructions, 1 ns each, and a guest that sleeps does
/// not wait. A VM with one vCPU executes the same instructions in each run, if --clock stops its clock.
/// Their number is told.
///
/// A kernel (bzImage, or ELF with a command line or an initial RAM disk) finds a small Q35 and ACPI tables, by which it finds
/// vCPUs and PCI devices and switches off. OVMF finds such a Q35, too, and starts the kernel that is named (--kernel, --initrd,
/// --append), or goes to its boot manager.
///
/// Firmware without a disk never ends, so the timeout is an orderly end. It is stated on standard
/// error, and the exit code is 0.
///
/// A TD (`--tech tdx`) starts with what the TDVF metadata of its firmware lists. Its MRTD, as the TDX module
/// has it, must be the one that `kvm-ops measure tdx` prints. Without an image
/// a built-in guest reads the pages of a small launch, uses private memory, shares some of it and takes it
/// back, and asks for a report. Each step is listed with its SEAMCALLs, and what the TD took from the
/// module must have come back.
///
/// A SEV, SEV-ES or SNP guest (`--tech sev|sev-es|sev-snp`) starts with an OVMF image, the same way. Its launch digest, as
/// the AMD SP has it, must be the one that `kvm-ops measure` prints, with the kernel's hashes where the firmware of an SNP
/// guest has a place for them.
///
/// An ELF file of 64-bit code starts as a TD or a SEV guest without firmware, at its entry: a kernel of one's own, under test.
/// Its measurement is told. It finds the devices of a small Q35, and a write of 0x2000 to port 0x604 ends it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A guest that ends itself through the debug-exit port (0xf4, 0x501) with a value other than 0 counts as
crashed, and so does a triple fault. `kvm-ops --help` lists the exit codes.

Examples:
  kvm-ops run /usr/share/seabios/bios.bin --timeout 2s
  kvm-ops run bzImage --initrd initrd.img --cmdline 'console=ttyS0' --memory 512M --timeout 1m
  kvm-ops run bios.bin --disk disk.img --timeout 1m
  kvm-ops run code.bin --format flat --memory 1M --host sim
  kvm-ops run /usr/share/ovmf/OVMF.fd --timeout 5s --json
  kvm-ops run --tech tdx
  kvm-ops run --tech tdx /usr/share/ovmf/OVMF.fd --allow-rbp --memory 256M --timeout 1m
  kvm-ops run --tech tdx /usr/share/ovmf/OVMF.fd --allow-rbp --memory 512M --timeout 20m \\
    --kernel vmlinuz --initrd initrd.img --append console=ttyS0
  kvm-ops run --tech sev-snp OVMF.amdsev.fd --memory 256M --timeout 1m
  kvm-ops run --tech tdx target/x86_64-unknown-none/debug/kernel")]
pub(crate) struct Args {
    /// The image: firmware, bzImage, ELF or flat code; of a TD, firmware with TDVF metadata or ELF, or a
    /// small built-in one if none is named; of a SEV guest, OVMF or ELF
    #[arg(value_name = "IMAGE")]
    image: Option<PathBuf>,

    /// Where it runs. The software platform runs images as normal VMs, and as the measured start of
    /// TDs and SEV guests
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

    /// Run the vCPUs at the same time on the software platform, as /dev/kvm does, and not in turns: faster with
    /// several that all have work, in the host's time, and no run is like another one
    #[arg(long)]
    threads: bool,

    /// The format of the image, instead of what it looks like
    #[arg(long, value_parser = formats())]
    format: Option<ImageFormat>,

    /// Interrupt controllers in the host: none, so that HLT ends a vCPU; full, with which a guest
    /// starts further vCPUs; split, only the local APICs. Firmware and kernels get full
    #[arg(long, value_parser = irqchips())]
    irqchip: Option<Irqchip>,

    /// In which order a TD's pages are added and measured
    #[arg(long, value_enum)]
    order: Option<LaunchOrder>,

    /// The kernel that OVMF starts, in a VM of any kind
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// The kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        visible_alias = "append"
    )]
    cmdline: Option<String>,

    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// A disk image (raw), as a virtio block device; `FILE,ro` cannot be written. May be given up to eight times. A
    /// normal VM gets a Q35 with it, as kernels, OVMF and confidential VMs have
    #[arg(long = "disk", value_name = "FILE[,ro]")]
    disks: Vec<disks::Wanted>,

    /// The console beside the serial line: with virtio a Q35 has a virtio console, which Linux knows as /dev/hvc0 (`--append
    /// console=hvc0`); keys go there. Both are printed
    #[arg(long, value_enum, default_value_t)]
    console: ConsoleKind,

    /// Stop the guest's clock (CMOS) at this time, in seconds since 1970-01-01 UTC, so that each run
    /// is the same on the software platform
    #[arg(long, value_name = "SECONDS")]
    clock: Option<u64>,

    /// Let a TD pass RBP in TDG.VP.VMCALL, as Debian 12's OVMF.fd does: without NO_RBP_MOD in its CONFIG_FLAGS,
    /// which Linux sets for each TD
    #[arg(long)]
    allow_rbp: bool,

    /// Write the collateral by which the quotes that a TD gets on the software platform are verified
    /// (`kvm-ops attest verify --root software`) to a file
    #[arg(long, value_name = "FILE")]
    collateral: Option<PathBuf>,

    /// How long it may run
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::parse_time)]
    timeout: Duration,

    /// End the run once the console shows this text
    #[arg(long, value_name = "TEXT")]
    until: Option<String>,

    /// Report as JSON on standard output, with the console in it
    #[arg(long)]
    json: bool,
}

/// The console that keys go to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum ConsoleKind {
    /// The serial line
    #[default]
    Serial,
    /// A virtio console on PCI
    Virtio,
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
    if let Kind::Of(tech) = args.tech
        && tech.is_confidential()
        && program::is_named(args)
    {
        return program::run(args, tech);
    }
    if args.tech == Kind::Of(Tech::Tdx) {
        return td::run(args);
    }
    if let Kind::Of(tech @ (Tech::Sev | Tech::SevEs | Tech::SevSnp)) = args.tech {
        return sev::run(args, tech);
    }
    let guest = args.guest();
    args.refuse_those_of_tds(&guest)?;
    let path = args.image.as_deref().ok_or_else(|| args.without_image())?;
    let mut image = image(args, path)?;
    if chipset::is_ovmf(&image) {
        image = with_kernel(args, image)?;
    } else {
        let hint =
            "OVMF starts it, which this image is not; without firmware the kernel is the image";
        refuse(&guest, hint, &[(args.kernel.is_some(), "--kernel")])?;
    }
    let has_kernel_options = args.cmdline.is_some() || args.initrd.is_some();
    let (image, is_q35) = chipset::of(image, args.tech, args.irqchip, has_kernel_options);
    let disks = disks::open(&args.disks)?;
    let interrupt = Interrupt::install()?;
    let mut hosts = Hosts::open(args.host, args.threads);
    if args.host == HostChoice::Kvm
        && let Some(failure) = hosts.take_no_kvm()
    {
        return Err(failure.hint("`--host auto` falls back to the software platform"));
    }
    let irqchip = args.irqchip.unwrap_or_default();
    let place = args.place(&hosts, Needs::Processor, irqchip)?;
    if let Some(failure) = hosts.no_kvm().filter(|_| !args.json) {
        let why = failure.in_a_line();
        term::complain(format!("note: {why}; it runs on the software platform"));
    }
    let taken = args.tell_taken(&image);
    let mut config = args.config().image(image);
    if let Some(irqchip) = args.irqchip {
        config = config.irqchip(irqchip);
    }
    let mut machine = place
        .host
        .build(config)
        .map_err(|error| Failure::of_machine("the machine cannot be built", error))?;
    interrupt.stops(machine.stopper());
    let is_plain = disks.is_empty() && args.console == ConsoleKind::Serial;
    let chipset = match is_plain && !is_q35 {
        true => Chipset::Pc,
        false => Chipset::Q35(disks, None),
    };
    let ran = Ran::of(args, place, machine.as_mut(), chipset);
    interrupt.clear();
    let told = Told {
        args,
        place,
        tech: machine.tech(),
        taken: Some(taken),
    };
    let freed = machine.destroy();
    told.finish(ran?, &freed)
}

impl Args {
    /// A host for the VM.
    fn place<'h>(
        &self,
        hosts: &'h Hosts,
        needs: Needs,
        irqchip: Irqchip,
    ) -> Result<&'h Place, Failure> {
        let wanted = Wanted {
            choice: self.host,
            needs,
            kind: self.tech,
            vcpus: self.vcpus,
            memory: self.memory,
            irqchip,
        };
        let place = hosts.place(&wanted);
        place.map_err(|no_place| homeless(self, no_place))
    }

    /// Recognises the image, and tells what it is taken for.
    fn tell_taken(&self, image: &Image) -> Taken {
        let taken = Taken::of(image, self.format);
        if !self.json {
            term::complain(format!("{}: {taken}", self.name()));
        }
        taken
    }

    /// What the options say of every machine.
    fn config(&self) -> MachineConfig {
        MachineConfig::new()
            .kind(self.tech)
            .vcpus(self.vcpus)
            .memory(self.memory)
    }
}

/// Refuses options that are given and have no meaning for a guest.
fn refuse(guest: &str, hint: &str, options: &[(bool, &str)]) -> Result<(), Failure> {
    match options.iter().find(|(given, _)| *given) {
        Some((_, option)) => Err(Failure::new(format!("{option} has no meaning for {guest}"))
            .hint(hint)
            .code(Code::Usage)),
        None => Ok(()),
    }
}

impl Args {
    /// The guest's kind in messages.
    fn guest(&self) -> String {
        format!("a {} VM", self.tech)
    }

    fn without_image(&self) -> Failure {
        Failure::new(format!("{} needs an image to run", self.guest()))
            .hint("`kvm-ops fleet` runs guests that need none")
            .code(Code::Usage)
    }

    /// Refuses options that only a TD has.
    fn refuse_those_of_tds(&self, guest: &str) -> Result<(), Failure> {
        let options = [
            (self.order.is_some(), "--order"),
            (self.allow_rbp, "--allow-rbp"),
            (self.collateral.is_some(), "--collateral"),
        ];
        refuse(guest, "only a TD has it: --tech tdx", &options)
    }

    /// Refuses options of images that are not firmware, and without a kernel those of kernels.
    fn refuse_those_beside_firmware(&self, guest: &str, hint: &str) -> Result<(), Failure> {
        let alone = self.kernel.is_none();
        let options = [
            (alone && self.cmdline.is_some(), "--cmdline"),
            (alone && self.initrd.is_some(), "--initrd"),
            (self.format.is_some(), "--format"),
        ];
        refuse(guest, hint, &options)
    }
}

fn image(args: &Args, path: &Path) -> Result<Image, Failure> {
    let bytes = files::read("the image", path, Image::MAX_BYTES)?;
    let mut image = Image::from_bytes(path.display().to_string(), bytes);
    if let Some(format) = args.format {
        image = image.with_format(format);
    }
    image
        .runs_as()
        .map_err(|error| Failure::of_machine("the image cannot be run", error))?;
    with_options(args, image)
}

/// The firmware with the kernel that it starts.
fn with_kernel(args: &Args, image: Image) -> Result<Image, Failure> {
    match &args.kernel {
        None => Ok(image),
        Some(kernel) => image
            .open_kernel(kernel)
            .map_err(|error| Failure::of_machine("the kernel cannot be used", error)),
    }
}

/// The image with the options of the kernel that it is, or that it starts.
fn with_options(args: &Args, mut image: Image) -> Result<Image, Failure> {
    if let Some(cmdline) = &args.cmdline {
        image = image.cmdline(cmdline);
    }
    if let Some(initrd) = &args.initrd {
        image = image
            .open_initrd(initrd)
            .map_err(|error| Failure::of_machine("the initial RAM disk cannot be used", error))?;
    }
    Ok(image)
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
