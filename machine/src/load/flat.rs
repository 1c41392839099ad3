//! Flat code: bytes at an address, started in real mode.

use super::super::layout::ONE_MIB;
use super::{Gpa, GuestRam, Image, MachineError, Start, low_range};

pub(crate) fn load(image: &Image, ram: &GuestRam) -> Result<Start, MachineError> {
    let at = image.load_at.unwrap_or(Image::DEFAULT_LOAD);
    let end = low_range(image, ram, at, image.len() as u64)?;
    let entry = image.entry.unwrap_or(at);
    if entry < at || entry >= end {
        return Err(MachineError::EntryOutside {
            name: image.name.clone(),
            entry,
        });
    }
    if entry >= Gpa::new(ONE_MIB) {
        return Err(MachineError::EntryAboveRealMode { entry });
    }
    ram.write(at, &image.bytes)?;
    Ok(Start::Real(entry))
}
