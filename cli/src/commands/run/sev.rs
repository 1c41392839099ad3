//! `kvm-ops run --tech sev|sev-es|sev-snp`: runs a SEV, SEV-ES or SNP guest from an OVMF image, on a host with an AMD SP.

use kvm_ops::{Irqchip, Tech};
use kvm_ops_machine::{Disk, Image, ImageFormat};
use soft_amd_sp::measure::{Launch, MeasureError, Ovmf, SectionKind};

use super::report::{Chipset, Ran, Told};
use super::steps::Steps;
use super::{Args, disks, with_kernel, with_options};
use crate::confidential::{Firmware, Start, certificates};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::hosts::{AnyMachine, Hosts, Needs, Place};
use crate::interrupt::Interrupt;

pub(super) fn run(args: &Args, tech: Tech) -> Outcome {
    let (image, bytes) = wanted(args)?;
    let disks = disks::open(&args.disks)?;
    let interrupt = Interrupt::install()?;
    let hosts = Hosts::open(args.host, args.threads);
    let irqchip = args.irqchip.unwrap_or(Irqchip::Full);
    let place = args.place(&hosts, Needs::Processor, irqchip)?;
    let taken = args.tell_taken(&image);
    let start = expected(args, tech, &image, &bytes, place)?;
    if tech == Tech::SevSnp {
        give_certificates(place)?;
    }
    let mut steps = Steps::new(place, Firmware::AmdSp);
    let mut config = args.config().irqchip(irqchip).image(image);
    if let Some(params) = start.params() {
        config = config.enc(params);
    }
    let mut machine = place
        .host
        .build(config)
        .map_err(|error| Failure::of_machine("the guest cannot be built", error))?;
    interrupt.stops(machine.stopper());
    steps.took(
        "create, measure, finalise",
        format!("{} bytes of firmware", bytes.len()),
    );
    let told = Told {
        args,
        place,
        tech: machine.tech(),
        taken: Some(taken),
    };
    let ran = compare_and_run(args, place, &start, machine.as_mut(), disks, &mut steps);
    interrupt.clear();
    steps.tear_down(&told, machine, ran)
}

/// Gives a software platform the certificates that its guests ask for with their reports.
pub(super) fn give_certificates(place: &Place) -> Outcome<()> {
    if let Some(host) = &place.platform
        && let Some(platform) = host.sev_platform()
    {
        host.set_snp_certificates(certificates(platform)?);
    }
    Ok(())
}

/// Holds the launch digest against the image, and runs the guest.
fn compare_and_run(
    args: &Args,
    place: &Place,
    start: &Start,
    machine: &mut dyn AnyMachine,
    disks: Vec<Disk>,
    steps: &mut Steps<'_>,
) -> Outcome<Ran> {
    steps.compare("compare the digest", "the launch digest", start, machine)?;
    let ran = Ran::of(args, place, machine, Chipset::Q35(disks, None))?;
    steps.took("run", ran.end());
    Ok(ran)
}

/// The firmware, with the kernel that it starts, and its bytes.
fn wanted(args: &Args) -> Result<(Image, Vec<u8>), Failure> {
    let guest = args.guest();
    args.refuse_those_of_tds(&guest)?;
    let hint = "it starts with firmware, and that starts a --kernel";
    args.refuse_those_beside_firmware(&guest, hint)?;
    let Some(path) = &args.image else {
        return Err(args.without_image());
    };
    let bytes = files::read("the image", path, files::FIRMWARE)?;
    let image = Image::from_bytes(args.name(), bytes.clone());
    let format = image
        .runs_as()
        .map_err(|error| Failure::of_machine("the image cannot be run", error))?;
    if format != ImageFormat::Firmware {
        let text = format!(
            "{} is no firmware, but {}",
            args.name(),
            image.recognition().kind()
        );
        return Err(Failure::new(text)
            .hint("a SEV guest starts with an OVMF image, which starts a --kernel, or with an ELF file of 64-bit code")
            .code(Code::Input));
    }
    let image = with_kernel(args, image)?;
    Ok((with_options(args, image)?, bytes))
}

/// The start, with the digest that a launch of the image must have.
fn expected(
    args: &Args,
    tech: Tech,
    image: &Image,
    bytes: &[u8],
    place: &Place,
) -> Result<Start, Failure> {
    let unfit = |error: MeasureError| {
        let what = format!("{} cannot start a {} VM", args.name(), args.tech);
        Failure::because(what, error).code(Code::Input)
    };
    let missing = || Failure::new(format!("the host `{}` has no AMD SP", place.host.name()));
    let platform = place.platform.as_ref().and_then(|host| host.sev_platform());
    let platform = platform.ok_or_else(missing)?;
    let signature = platform.cpuid_signature();
    let mut launch = Launch::new(bytes).vcpus(args.vcpus).vcpu_sig(signature);
    let digest = match tech {
        Tech::SevSnp => {
            let tables = Ovmf::parse(bytes).map_err(|error| unfit(error.into()))?;
            let sections = tables.snp_sections().map_err(|error| unfit(error.into()))?;
            let has_place = sections
                .iter()
                .any(|section| section.kind == SectionKind::KernelHashes);
            if let Some(hashes) = has_place.then(|| image.kernel_hashes()).flatten() {
                launch = launch.kernel_hashes(hashes);
            }
            launch.snp().map(Vec::from)
        }
        Tech::SevEs => launch.sev_es().map(Vec::from),
        _ => launch.sev().map(Vec::from),
    };
    Start::of_sev_firmware(tech, digest.map_err(unfit)?, platform).ok_or_else(missing)
}
