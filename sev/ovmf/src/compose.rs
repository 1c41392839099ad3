//! Images with tables, for tests and for firmware that is made by hand.

use crate::tables::{
    DESCRIPTOR, ENTRY_TAIL, FOOTER, HASH_TABLE, METADATA_HEADER, METADATA_MAGIC, METADATA_VERSION,
    RESET_BLOCK, SEV_METADATA, TAIL,
};
use crate::{Region, Section};
use thiserror::Error;

/// Bytes from the start of the SEV metadata to the end of the image.
const METADATA: usize = 0x800;

/// The image has no room for the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("an image of {length:#x} bytes has no room for tables of {needed:#x} bytes at its end")]
pub struct ComposeError {
    /// Bytes of the image.
    pub length: usize,
    /// Bytes that the tables take, from their start to the end of the image.
    pub needed: usize,
}

/// Writes tables to the end of an image, over what is there: its last 2 KiB but for the reset vector.
///
/// ```
/// use kvm_ops_ovmf::{Ovmf, Section, SectionKind, compose};
///
/// let mut image = vec![0x90; 0x1000];
/// let cpuid = Section { gpa: 0x80_e000, size: 0x1000, kind: SectionKind::Cpuid };
/// compose(&mut image, &[cpuid], Some(0x80_b004), None)?;
/// let tables = Ovmf::parse(&image).unwrap();
/// assert_eq!((tables.sections(), tables.reset_eip()), (&[cpuid][..], Some(0x80_b004)));
/// # Ok::<(), kvm_ops_ovmf::ComposeError>(())
/// ```
///
/// # Errors
/// [`ComposeError`] if the image is too short, or there are too many sections for those 2 KiB.
pub fn compose(
    image: &mut [u8],
    sections: &[Section],
    reset_eip: Option<u32>,
    hash_table: Option<Region>,
) -> Result<(), ComposeError> {
    let metadata = metadata(sections);
    let mut table = entry(&(METADATA as u32).to_le_bytes(), SEV_METADATA);
    if let Some(at) = reset_eip {
        table.extend(entry(&at.to_le_bytes(), RESET_BLOCK));
    }
    if let Some(Region { gpa, size }) = hash_table {
        table.extend(entry(
            [gpa, size].map(u32::to_le_bytes).as_flattened(),
            HASH_TABLE,
        ));
    }
    // The footer's length is that of the whole table.
    let whole = table.len();
    table.extend(tail(whole, FOOTER));

    let needed = METADATA.max(metadata.len() + table.len() + TAIL);
    let length = image.len();
    if needed > METADATA || length < METADATA {
        return Err(ComposeError { length, needed });
    }
    let start = length - METADATA;
    image[start..start + metadata.len()].copy_from_slice(&metadata);
    let end = length - TAIL;
    image[end - table.len()..end].copy_from_slice(&table);
    Ok(())
}

fn metadata(sections: &[Section]) -> Vec<u8> {
    let count = sections.len();
    let length = METADATA_HEADER + DESCRIPTOR * count;
    let words = [length as u32, METADATA_VERSION, count as u32];
    let mut bytes = METADATA_MAGIC.to_vec();
    bytes.extend(words.map(u32::to_le_bytes).as_flattened());
    for section in sections {
        let words = [section.gpa, section.size, section.kind as u32];
        bytes.extend(words.map(u32::to_le_bytes).as_flattened());
    }
    bytes
}

/// An entry: its data and its tail.
fn entry(data: &[u8], guid: [u8; 16]) -> Vec<u8> {
    [data, &tail(data.len(), guid)].concat()
}

/// The length of so many bytes with this field and the GUID, and the GUID.
fn tail(bytes: usize, guid: [u8; 16]) -> Vec<u8> {
    let length = (bytes + ENTRY_TAIL) as u16;
    [&length.to_le_bytes()[..], &guid].concat()
}
