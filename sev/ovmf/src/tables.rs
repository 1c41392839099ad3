//! The tables of an OVMF image.
//!
//! A table of GUIDed entries ends 32 bytes before the end of the image and is read backwards: each
//! entry is its data, a 16-bit length that counts the 18 bytes of length and GUID, and the GUID.
//! The last entry is the footer, whose length spans the table.

use crate::hashes::guid;
use thiserror::Error;

pub(crate) const FOOTER: [u8; 16] = guid("96b582de-1fb2-45f7-baea-a366c55a082d");
pub(crate) const SEV_METADATA: [u8; 16] = guid("dc886566-984a-4798-a75e-5585a7bf67cc");
pub(crate) const RESET_BLOCK: [u8; 16] = guid("00f771de-1a7e-4fcb-890e-68c77e2fb44e");
pub(crate) const HASH_TABLE: [u8; 16] = guid("7255371f-3a3b-4b04-927b-1da6efa8d454");

/// Bytes between the end of the table and the end of the image (the reset vector).
pub(crate) const TAIL: usize = 32;
/// Length field and GUID of an entry.
pub(crate) const ENTRY_TAIL: usize = 18;
/// Signature and version of the SEV metadata.
pub(crate) const METADATA_MAGIC: [u8; 4] = *b"ASEV";
pub(crate) const METADATA_VERSION: u32 = 1;
/// Header of the SEV metadata and each of its descriptors.
pub(crate) const METADATA_HEADER: usize = 16;
pub(crate) const DESCRIPTOR: usize = 12;

/// Errors of reading an image's tables.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OvmfError {
    /// There is no footer GUID 32 bytes before the end.
    #[error("the image has no table of GUIDed entries")]
    NoFooter,
    /// A length runs out of the table or the image.
    #[error("a table entry at offset {offset:#x} has the impossible length {length:#x}")]
    BadLength {
        /// Offset in the image.
        offset: usize,
        /// Length that the entry claims.
        length: usize,
    },
    /// The entry that should point at the SEV metadata points elsewhere.
    #[error("no SEV metadata at offset {0:#x} from the end of the image")]
    NoMetadata(usize),
    /// The SEV metadata has a version this library does not know.
    #[error("SEV metadata has version {0}, known is 1")]
    Version(u32),
    /// An SNP guest cannot start without sections: its firmware could use no memory.
    #[error("the image has no SEV metadata, which the firmware of an SNP guest needs")]
    NoSections,
    /// A section of unknown type.
    #[error("SEV metadata section of unknown type {0:#x}")]
    SectionType(u32),
}

/// Purpose of a section of the SEV metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SectionKind {
    /// Memory the firmware uses before it can validate pages itself.
    SecMem = 1,
    /// The secrets page.
    Secrets = 2,
    /// The CPUID page.
    Cpuid = 3,
    /// Calling area of an SVSM.
    SvsmCaa = 4,
    /// The page that holds the table of kernel hashes.
    KernelHashes = 0x10,
}

impl SectionKind {
    fn from_number(n: u32) -> Option<Self> {
        use SectionKind::*;
        [SecMem, Secrets, Cpuid, SvsmCaa, KernelHashes]
            .into_iter()
            .find(|k| *k as u32 == n)
    }
}

/// One section of the SEV metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Guest physical address.
    pub gpa: u32,
    /// Length in bytes.
    pub size: u32,
    /// Purpose of the section.
    pub kind: SectionKind,
}

/// A place in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub gpa: u32,
    /// Length in bytes.
    pub size: u32,
}

/// The tables of an OVMF image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ovmf {
    sections: Vec<Section>,
    reset_eip: Option<u32>,
    hash_table: Option<Region>,
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let slice = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(slice.try_into().ok()?))
}

impl Ovmf {
    /// Reads the tables. An image without SEV metadata gives no sections; that is not an error.
    pub fn parse(image: &[u8]) -> Result<Self, OvmfError> {
        let table = footer_table(image)?;
        let mut out = Self::default();
        let mut end = table.len();
        // Stops at the first remainder too short for an entry, so every pass consumes bytes.
        while end >= ENTRY_TAIL {
            let length = usize::from(u16::from_le_bytes([table[end - 18], table[end - 17]]));
            if length < ENTRY_TAIL || length > end {
                let offset = image.len() - TAIL - table.len() + end - ENTRY_TAIL;
                return Err(OvmfError::BadLength { offset, length });
            }
            let data = &table[end - length..end - ENTRY_TAIL];
            let id = &table[end - 16..end];
            if id == RESET_BLOCK {
                out.reset_eip = u32_at(data, 0);
            } else if id == HASH_TABLE {
                // Builds without measured direct boot keep the entry with address 0.
                out.hash_table = u32_at(data, 0).filter(|gpa| *gpa != 0).map(|gpa| Region {
                    gpa,
                    size: u32_at(data, 4).unwrap_or(0),
                });
            } else if id == SEV_METADATA {
                let from_end = u32_at(data, 0).unwrap_or(0) as usize;
                out.sections = metadata(image, from_end)?;
            }
            end -= length;
        }
        Ok(out)
    }

    /// Sections of the SEV metadata, in table order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The sections, of which an SNP guest needs some.
    ///
    /// # Errors
    /// [`OvmfError::NoSections`] for an image without SEV metadata.
    pub fn snp_sections(&self) -> Result<&[Section], OvmfError> {
        match &self.sections[..] {
            [] => Err(OvmfError::NoSections),
            sections => Ok(sections),
        }
    }

    /// Start address of the application processors of an SEV-ES or SNP guest.
    pub fn reset_eip(&self) -> Option<u32> {
        self.reset_eip
    }

    /// Place of the table of kernel hashes.
    pub fn hash_table(&self) -> Option<Region> {
        self.hash_table
    }
}

/// The entries before the footer entry.
fn footer_table(image: &[u8]) -> Result<&[u8], OvmfError> {
    let end = image.len().checked_sub(TAIL).ok_or(OvmfError::NoFooter)?;
    let start = end.checked_sub(ENTRY_TAIL).ok_or(OvmfError::NoFooter)?;
    if image[start + 2..end] != FOOTER {
        return Err(OvmfError::NoFooter);
    }
    let length = usize::from(u16::from_le_bytes([image[start], image[start + 1]]));
    if length < ENTRY_TAIL || length > end {
        return Err(OvmfError::BadLength {
            offset: start,
            length,
        });
    }
    Ok(&image[end - length..start])
}

fn metadata(image: &[u8], from_end: usize) -> Result<Vec<Section>, OvmfError> {
    let missing = OvmfError::NoMetadata(from_end);
    let start = image.len().checked_sub(from_end).ok_or(missing.clone())?;
    let bytes = &image[start..];
    if bytes.get(..4) != Some(&METADATA_MAGIC) {
        return Err(missing);
    }
    let field = |offset| u32_at(bytes, offset).ok_or(missing.clone());
    let (version, count) = (field(8)?, field(12)? as usize);
    if version != METADATA_VERSION {
        return Err(OvmfError::Version(version));
    }
    let descriptors = bytes.get(METADATA_HEADER..).unwrap_or_default();
    if count > descriptors.len() / DESCRIPTOR {
        return Err(OvmfError::BadLength {
            offset: start + 12,
            length: count,
        });
    }
    (0..count)
        .map(|i| {
            let at = METADATA_HEADER + i * DESCRIPTOR;
            let number = field(at + 8)?;
            Ok(Section {
                gpa: field(at)?,
                size: field(at + 4)?,
                kind: SectionKind::from_number(number).ok_or(OvmfError::SectionType(number))?,
            })
        })
        .collect()
}
