//! `kvm-ops run --tech tdx`: runs a TD from a firmware image, or a built-in guest, on a host with a TDX module.

use std::ops::Range;

use kvm_ops::guest::GuestProgram;
use kvm_ops::{Gpa, Irqchip};
use kvm_ops_machine::{Disk, Image, Quoting};
use kvm_ops_tdvf::Order;

use super::report::{Chipset, Ran, Told};
use super::steps::Steps;
use super::{Args, ConsoleKind, LaunchOrder, disks, refuse, with_kernel, with_options};
use crate::commands::measure::not_tdvf;
use crate::confidential::{Firmware, MESSAGE, Measured, Quotes, Start, TdImage, Tour, td_params};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::hosts::{AnyMachine, Hosts, Needs, Place};
use crate::interrupt::Interrupt;

/// The guest of a TD.
enum Guest {
    /// Firmware, and what it starts.
    Code(Box<Image>),
    /// The built-in one, and the memory that it converts.
    Tour(Box<Tour>, Range<u64>),
}

/// The part of a guest that its run needs.
enum Started {
    /// The disks of firmware.
    Code(Vec<Disk>),
    /// The memory that the built-in guest converts.
    Tour(Range<u64>),
}

/// A TD to be run.
struct Wanted {
    image: TdImage,
    guest: Guest,
}

pub(super) fn run(args: &Args) -> Outcome {
    let order = match args.order.unwrap_or_default() {
        LaunchOrder::Single => Order::SinglePass,
        LaunchOrder::TwoPass => Order::TwoPass,
    };
    let Wanted { image, guest } = wanted(args, order)?;
    let disks = disks::open(&args.disks)?;
    if image.low_end() > args.memory {
        return Err(Failure::new(format!(
            "{} has sections up to {:#x}, beyond the memory of {:#x} bytes",
            args.name(),
            image.low_end(),
            args.memory
        ))
        .hint("give the TD more with --memory")
        .code(Code::Usage));
    }
    let interrupt = Interrupt::install()?;
    let hosts = Hosts::open(args.host, args.threads);
    let (needs, default) = match guest {
        Guest::Code(_) => (Needs::Processor, Irqchip::Split),
        Guest::Tour(..) => (Needs::Anything, Irqchip::None),
    };
    let irqchip = args.irqchip.unwrap_or(default);
    let place = args.place(&hosts, needs, irqchip)?;
    let taken = match &guest {
        Guest::Code(image) => Some(args.tell_taken(image)),
        Guest::Tour(..) => None,
    };

    let mut steps = Steps::new(place, Firmware::TdxModule);
    let config = args.config().irqchip(irqchip);
    let (pages, extended) = (image.pages().len(), image.measured_pages());
    let start = Start::of_td(&image);
    let (config, guest) = match guest {
        Guest::Code(image) => {
            let enc = td_params(args.allow_rbp);
            let config = config.image(*image).launch_order(order).enc(enc);
            (config, Started::Code(disks))
        }
        Guest::Tour(tour, converted) => {
            let config = start.configure(config, args.memory, vec![tour as Box<dyn GuestProgram>]);
            (config, Started::Tour(converted))
        }
    };
    let mut machine = place
        .host
        .build(config)
        .map_err(|error| Failure::of_machine("the TD cannot be built", error))?;
    interrupt.stops(machine.stopper());
    steps.took(
        "create, measure, finalise",
        format!("{pages} pages added, {extended} of them measured"),
    );
    let told = Told {
        args,
        place,
        tech: machine.tech(),
        taken,
    };
    let ran = compare_and_run(args, place, &start, machine.as_mut(), guest, &mut steps);
    interrupt.clear();
    steps.tear_down(&told, machine, ran)
}

/// Holds MRTD against the image, runs the guest, and looks at what it measured or shared.
fn compare_and_run(
    args: &Args,
    place: &Place,
    start: &Start,
    machine: &mut dyn AnyMachine,
    guest: Started,
    steps: &mut Steps,
) -> Outcome<Ran> {
    steps.compare("compare MRTD", "MRTD", start, machine)?;
    let converted = match guest {
        Started::Code(disks) => {
            let chipset = Chipset::Q35(disks, quoting(args, place)?);
            let ran = Ran::of(args, place, machine, chipset)?;
            steps.took("run", ran.end());
            if let Some(measured) = Measured::of(place, machine, args.memory) {
                steps.measured(measured);
            }
            return Ok(ran);
        }
        Started::Tour(converted) => converted,
    };
    let ran = Ran::of(args, place, machine, Chipset::Pc)?;
    let ended = ran.code() == Code::Fine;
    let seen = !ended || seen_by_host(machine, converted);
    let detail = match (ended, seen) {
        (true, true) => "the host saw what the guest shared",
        _ => "the guest did not come to its end",
    };
    steps.took("run", detail.into());
    if !seen {
        let what = "the host does not see what the guest wrote into shared memory";
        return Err(Failure::new(what).code(Code::Guest));
    }
    Ok(ran)
}

/// The seed of the platform's quoting enclave.
const QUOTING: [u8; 32] = *b"kvm-ops run --tech tdx: quotes\0\0";

/// Who makes quotes for the TD. The collateral goes to the file that is asked for.
fn quoting(args: &Args, place: &Place) -> Outcome<Option<Box<Quoting<Quotes>>>> {
    let Some(host) = &place.platform else {
        return Ok(None);
    };
    let quotes = Quotes::new(host, QUOTING)?;
    if let Some(path) = &args.collateral {
        std::fs::write(path, quotes.collateral()?)
            .map_err(|error| Failure::because(format!("cannot write {}", path.display()), error))?;
    }
    Ok(Some(Box::new(Quoting::new(quotes))))
}

/// The image that is named, or the built-in start with its guest.
fn wanted(args: &Args, order: Order) -> Result<Wanted, Failure> {
    let hint =
        "a TD starts with what the metadata of its firmware lists, and that starts a --kernel";
    args.refuse_those_beside_firmware("a TD", hint)?;
    let Some(path) = &args.image else {
        let of_firmware = [
            (args.kernel.is_some(), "--kernel"),
            (args.allow_rbp, "--allow-rbp"),
            (!args.disks.is_empty(), "--disk"),
            (args.console != ConsoleKind::Serial, "--console"),
            (args.collateral.is_some(), "--collateral"),
        ];
        let hint = "name the firmware of the TD";
        refuse("the built-in guest", hint, &of_firmware)?;
        let image = TdImage::built_in(order);
        let (tour, converted) = Tour::new(&image, args.memory).ok_or_else(|| {
            Failure::new(format!("{} leaves no memory for the guest", args.name()))
                .hint("give the TD more with --memory")
                .code(Code::Usage)
        })?;
        let guest = Guest::Tour(Box::new(tour), converted);
        return Ok(Wanted { image, guest });
    };
    let bytes = files::read("the image", path, files::FIRMWARE)?;
    let image = TdImage::parse(&bytes, order).map_err(|error| not_tdvf(path, &bytes, error))?;
    let firmware = with_kernel(args, Image::from_bytes(args.name(), bytes))?;
    let guest = Guest::Code(Box::new(with_options(args, firmware)?));
    Ok(Wanted { image, guest })
}

/// Returns true if the host can read the guest's message in the memory that it shared.
fn seen_by_host(machine: &dyn AnyMachine, converted: Range<u64>) -> bool {
    let mut seen = [0; MESSAGE.len()];
    machine.read(Gpa::new(converted.start), &mut seen).is_ok() && seen == *MESSAGE
}
