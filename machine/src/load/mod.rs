//! Loading images into guest memory.
//!
//! Every number that comes from a file or an option is checked before it is used; an error names
//! it.

mod boot;
mod bzimage;
#[cfg(feature = "sev")]
pub(crate) mod cpuid;
mod elf;
mod firmware;
mod flat;
#[cfg(feature = "tdx")]
mod hob;
pub(crate) mod measured;
mod mptable;
#[cfg(feature = "sev")]
mod ovmf;
pub(crate) mod sev;
pub(crate) mod td;
#[cfg(feature = "tdx")]
mod tdvf;
#[cfg(test)]
mod tests;
mod zero_page;

use kvm_ops::{Gpa, Irqchip};

use super::layout::{ACPI_TABLES, BOOT_END, BOOT_START, ONE_MIB};
use super::start::{BOOT_CS, STUB_CS, Start};
use super::traps::{self, Traps};
use super::{GuestRam, Image, ImageFormat, MachineError, devices};

/// The bytes of ROM that the machine needs for the image.
pub(crate) fn rom_bytes(image: &Image) -> Result<u64, MachineError> {
    match image.runs_as()? {
        ImageFormat::Firmware => firmware::rom_bytes(image),
        ImageFormat::Flat | ImageFormat::Elf | ImageFormat::BzImage => Ok(0),
    }
}

/// Tells a kernel of the other vCPUs and the interrupt lines, which firmware finds out itself.
/// Before the image is loaded, which may lie there.
pub(crate) fn describe(
    image: &Image,
    ram: &GuestRam,
    vcpus: u32,
    irqchip: Irqchip,
) -> Result<(), MachineError> {
    let kernel = matches!(image.runs_as()?, ImageFormat::Elf | ImageFormat::BzImage);
    if kernel && irqchip == Irqchip::Full {
        mptable::write(ram, vcpus)?;
    }
    if kernel && image.acpi {
        devices::describe(ram, vcpus, irqchip)?;
    }
    Ok(())
}

/// Loads the image and says how the first vCPU starts it.
pub(crate) fn load(image: &Image, ram: &GuestRam) -> Result<Start, MachineError> {
    let format = image.runs_as()?;
    refuse_unused(image, format)?;
    match format {
        ImageFormat::Flat => flat::load(image, ram),
        ImageFormat::Elf => elf::load(image, ram),
        ImageFormat::BzImage => bzimage::load(image, ram),
        ImageFormat::Firmware => firmware::load(image, ram),
    }
}

/// Writes an interrupt table that reports, for a guest that starts without firmware.
pub(crate) fn catch(
    image: &Image,
    ram: &GuestRam,
    start: &Start,
) -> Result<Option<Traps>, MachineError> {
    match *start {
        Start::Reset => Ok(None),
        Start::Real(_) => {
            let at = image.load_at.unwrap_or(Image::DEFAULT_LOAD);
            traps::real(ram, at)
        }
        Start::Flat32 { code, .. } => {
            let long = code == STUB_CS;
            traps::protected(ram, long, BOOT_CS).map(Some)
        }
    }
}

/// An option that would be ignored is a mistake of whoever gave it.
fn refuse_unused(image: &Image, format: ImageFormat) -> Result<(), MachineError> {
    let kernel = matches!(format, ImageFormat::Elf | ImageFormat::BzImage);
    let firmware = format == ImageFormat::Firmware;
    let unused = [
        (
            "load address",
            image.load_at.is_some() && format != ImageFormat::Flat,
        ),
        (
            "entry",
            image.entry.is_some() && !matches!(format, ImageFormat::Flat | ImageFormat::Elf),
        ),
        ("ACPI tables", image.acpi && !kernel),
        ("kernel", image.kernel.is_some() && !firmware),
        (
            "command line",
            image.cmdline.is_some() && !kernel && image.kernel.is_none(),
        ),
        (
            "initrd",
            image.initrd.is_some() && !kernel && image.kernel.is_none(),
        ),
    ];
    match unused.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(MachineError::OptionNotUsed { option, format }),
        None => Ok(()),
    }
}

/// Checks that a range lies in the RAM below 4 GiB, and returns its end.
fn low_range(image: &Image, ram: &GuestRam, at: Gpa, bytes: u64) -> Result<Gpa, MachineError> {
    let too_large = || MachineError::ImageTooLarge {
        name: image.name.clone(),
        bytes,
        at,
        room: ram.low_end().get().saturating_sub(at.get()),
    };
    let end = at.checked_add(bytes).ok_or_else(too_large)?;
    if end > ram.low_end() {
        return Err(too_large());
    }
    Ok(end)
}

/// Checks that a range leaves alone what is needed to start it, and what a kernel reads then.
fn clear_of_boot_area(
    image: &Image,
    what: &'static str,
    start: Gpa,
    end: Gpa,
) -> Result<(), MachineError> {
    let overlaps = |from: u64, to: u64| start.get() < to && end.get() > from;
    let with = if overlaps(BOOT_START, BOOT_END) {
        "the boot parameters at 0x1000..0x20000"
    } else if image.acpi && overlaps(ACPI_TABLES.get(), ONE_MIB) {
        "the ACPI tables at 0xc0000..0x100000"
    } else {
        return Ok(());
    };
    Err(MachineError::Overlap {
        what,
        start,
        end,
        with,
    })
}

fn bad(
    format: ImageFormat,
    image: &Image,
    what: &'static str,
    value: impl Into<u64>,
) -> MachineError {
    MachineError::BadHeader {
        name: image.name.clone(),
        format,
        what,
        value: value.into(),
    }
}

fn parse(
    format: ImageFormat,
    image: &Image,
    source: impl std::error::Error + Send + Sync + 'static,
) -> MachineError {
    MachineError::BadImage {
        name: image.name.clone(),
        format,
        source: Box::new(source),
    }
}
