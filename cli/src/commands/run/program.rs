//! `kvm-ops run --tech tdx|sev|sev-es|sev-snp PROGRAM`: an ELF file as a confidential VM, which starts at its 64-bit entry
//! without firmware.

use std::fs::File;
use std::io::Read;

use kvm_ops::{Irqchip, Tech};
use kvm_ops_machine::Image;

use super::report::{Chipset, Ran, Told};
use super::steps::Steps;
use super::{Args, disks, refuse, sev};
use crate::confidential::{Firmware, Measured, td_params};
use crate::failure::{Failure, Outcome};
use crate::hosts::{AnyMachine, Hosts, Needs, Place};
use crate::interrupt::Interrupt;
use crate::units::plural;

const ELF: [u8; 4] = *b"\x7fELF";

/// True if the image begins as an ELF file. What else it may be, and a file that cannot be read, is for firmware to say.
pub(super) fn is_named(args: &Args) -> bool {
    let mut magic = [0; ELF.len()];
    // A pipe would hold the program until somebody writes.
    let regular = args.image.as_ref().filter(|path| path.is_file());
    let file = regular.and_then(|path| File::open(path).ok());
    file.is_some_and(|mut file| file.read_exact(&mut magic).is_ok()) && magic == ELF
}

pub(super) fn run(args: &Args, tech: Tech) -> Outcome {
    let image = wanted(args, tech)?;
    let disks = disks::open(&args.disks)?;
    let interrupt = Interrupt::install()?;
    let hosts = Hosts::open(args.host, args.threads);
    // HLT ends a vCPU, unless it is asked to wait.
    let irqchip = args.irqchip.unwrap_or(Irqchip::None);
    let place = args.place(&hosts, Needs::Processor, irqchip)?;
    let taken = args.tell_taken(&image);
    if tech == Tech::SevSnp {
        sev::give_certificates(place)?;
    }
    let firmware = match tech {
        Tech::Tdx => Firmware::TdxModule,
        _ => Firmware::AmdSp,
    };
    let mut steps = Steps::new(place, firmware);
    let bytes = image.len() as u64;
    let mut config = args.config().irqchip(irqchip).image(image);
    if tech == Tech::Tdx {
        config = config.enc(td_params(args.allow_rbp));
    }
    let mut machine = place
        .host
        .build(config)
        .map_err(|error| Failure::of_machine("the guest cannot be built", error))?;
    interrupt.stops(machine.stopper());
    let detail = format!("{} of an ELF file", plural(bytes, "byte"));
    steps.took("create, measure, finalise", detail);
    let ran = Ran::of(args, place, machine.as_mut(), Chipset::Q35(disks, None));
    let ran = ran.and_then(|ran| {
        steps.took("run", ran.end());
        tell_measurement(args, tech, place, machine.as_ref(), &mut steps)?;
        Ok(ran)
    });
    interrupt.clear();
    let told = Told {
        args,
        place,
        tech: machine.tech(),
        taken: Some(taken),
    };
    steps.tear_down(&told, machine, ran)
}

/// Tells what a report of the guest has. There is nothing off line to compare it with, and a SEV or SEV-ES guest has no reports.
fn tell_measurement(
    args: &Args,
    tech: Tech,
    place: &Place,
    machine: &dyn AnyMachine,
    steps: &mut Steps<'_>,
) -> Outcome<()> {
    let name = match tech {
        Tech::Tdx => "MRTD",
        Tech::SevSnp => "launch digest",
        _ => return Ok(()),
    };
    let measurement = machine
        .measurement()
        .map_err(|error| Failure::because("the firmware does not tell the measurement", error))?;
    steps.took(name, hex::encode(measurement.bytes()));
    if tech == Tech::Tdx
        && let Some(measured) = Measured::of(place, machine, args.memory)
    {
        steps.measured(measured);
    }
    Ok(())
}

fn wanted(args: &Args, tech: Tech) -> Result<Image, Failure> {
    let guest = args.guest();
    if tech != Tech::Tdx {
        args.refuse_those_of_tds(&guest)?;
    }
    let options = [
        (args.kernel.is_some(), "--kernel"),
        (args.cmdline.is_some(), "--cmdline"),
        (args.initrd.is_some(), "--initrd"),
        (args.order.is_some(), "--order"),
        (args.collateral.is_some(), "--collateral"),
    ];
    let hint = "an ELF file starts at its entry, with nothing beside it";
    refuse(&format!("{guest} of an ELF file"), hint, &options)?;
    let Some(path) = &args.image else {
        return Err(args.without_image());
    };
    super::image(args, path)
}
