//! Firmware: a ROM that ends at 4 GiB, with its last 256 KiB copied below 1 MiB.

use super::super::layout::{FOUR_GIB, ONE_MIB, ROM_MAX, SHADOW_MAX};
use super::{Gpa, GuestRam, Image, ImageFormat, MachineError, Start, bad};
use kvm_ops::PAGE_SIZE;

pub(crate) fn rom_bytes(image: &Image) -> Result<u64, MachineError> {
    let bytes = image.len() as u64;
    if bytes > ROM_MAX {
        return Err(MachineError::ImageTooLarge {
            name: image.name.clone(),
            bytes,
            at: Gpa::new(FOUR_GIB - ROM_MAX),
            room: ROM_MAX,
        });
    }
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(bad(
            ImageFormat::Firmware,
            image,
            "the size, which is no multiple of 4 KiB,",
            bytes,
        ));
    }
    Ok(bytes)
}

/// Copies the ROM to its two places.
///
/// The low copy is RAM, as on a PC once the chipset's PAM registers have "shadowed" the ROM, and on
/// QEMU's ISA-only PC: firmware keeps variables there, and finds no chipset here to unlock. So
/// SeaBIOS goes through its whole power-on self test.
pub(crate) fn load(image: &Image, ram: &GuestRam) -> Result<Start, MachineError> {
    if ram.size() < ONE_MIB {
        return Err(MachineError::MemorySize {
            bytes: ram.size(),
            problem: "less than the 1 MiB that firmware needs",
        });
    }
    let bytes = image.len() as u64;
    ram.write(Gpa::new(FOUR_GIB - bytes), &image.bytes)?;
    let shadow = bytes.min(SHADOW_MAX);
    let tail = &image.bytes[(bytes - shadow) as usize..];
    ram.write(Gpa::new(ONE_MIB - shadow), tail)?;
    Ok(Start::Reset)
}
