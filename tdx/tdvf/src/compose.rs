//! Writing metadata: an image of one's own, for tests and small TDs.

use alloc::vec::Vec;

use thiserror::Error;

use crate::section::ENTRY;
use crate::table::{ENTRY_TAIL, FOOTER, METADATA, TAIL};
use crate::tdvf::{HEADER, SIGNATURE, VERSION};
use crate::{Section, Tdvf, TdvfError};

/// Errors of writing metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ComposeError {
    /// The image is too short for the metadata, its table and the reset vector.
    #[error("the image of {length:#x} bytes is too short for {needed:#x} bytes of metadata")]
    TooShort {
        /// Bytes of the image.
        length: usize,
        /// Bytes that are written at its end, the reset vector's included.
        needed: usize,
    },
    /// The composed image would be refused.
    #[error("the sections do not fit the image")]
    Rejected(#[from] TdvfError),
}

/// Writes metadata for these sections before the last 32 bytes of the image, over what is there.
/// [`Tdvf::parse`] reads them back.
///
/// # Errors
/// [`ComposeError`] if there is no room, or the sections break a rule; the image is not of use then.
pub fn compose(image: &mut [u8], sections: &[Section]) -> Result<(), ComposeError> {
    // Descriptor, pointer to it, footer.
    let length = HEADER + ENTRY * sections.len();
    let (pointer, footer) = (4 + ENTRY_TAIL, ENTRY_TAIL);
    let needed = length + pointer + footer + TAIL;
    let too_short = ComposeError::TooShort {
        length: image.len(),
        needed,
    };
    let number = |n: usize| u32::try_from(n).map_err(|_| too_short);
    let mut bytes = Vec::with_capacity(needed);
    for field in [SIGNATURE, number(length)?, VERSION, number(sections.len())?] {
        bytes.extend(field.to_le_bytes());
    }
    for section in sections {
        bytes.extend(section.to_bytes());
    }
    bytes.extend(number(needed)?.to_le_bytes());
    for (length, guid) in [(pointer, METADATA), (pointer + footer, FOOTER)] {
        bytes.extend((length as u16).to_le_bytes());
        bytes.extend(guid);
    }
    let start = image.len().checked_sub(needed).ok_or(too_short)?;
    image[start..start + bytes.len()].copy_from_slice(&bytes);
    Tdvf::parse(image)?;
    Ok(())
}
