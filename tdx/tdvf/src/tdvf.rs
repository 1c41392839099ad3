//! The metadata as a whole.

use alloc::vec::Vec;

use crate::section::ENTRY;
use crate::table::find_metadata;
use crate::wire::u32_at;
use crate::{Launch, Order, Section, SectionKind, TdvfError};

/// `TDVF`.
pub(crate) const SIGNATURE: u32 = u32::from_le_bytes(*b"TDVF");
pub(crate) const VERSION: u32 = 1;
/// Signature, length, version and number of sections.
pub(crate) const HEADER: usize = 16;

/// Private addresses are below this even in a TD of 48-bit addresses, whose bit 47 means shared.
pub const MAX_GPA: u64 = 1 << 47;

/// The most memory that the sections of an image may add before the launch. The design guide sets
/// no limit; this one keeps a lie in an image from costing hours.
pub const MAX_ADDED_BYTES: u64 = 4 << 30;

/// The start of a TD's vCPU.
const RESET_VECTOR: u64 = 0xffff_fff0;

/// An image with metadata that keeps every rule of [`TdvfError`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tdvf<'a> {
    image: &'a [u8],
    offset: usize,
    sections: Vec<Section>,
}

impl<'a> Tdvf<'a> {
    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// [`TdvfError`] names the fault and its place.
    pub fn parse(image: &'a [u8]) -> Result<Self, TdvfError> {
        let offset = find_metadata(image)?;
        let entries = entries(image, offset)?;
        let sections = entries
            .chunks_exact(ENTRY)
            .enumerate()
            .map(|(index, entry)| {
                Section::parse(entry, image).map_err(|fault| TdvfError::Section {
                    index,
                    offset: offset + HEADER + index * ENTRY,
                    fault,
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        check_together(&sections)?;
        Ok(Self {
            image,
            offset,
            sections,
        })
    }

    /// The image.
    pub const fn image(&self) -> &'a [u8] {
        self.image
    }

    /// The offset of the descriptor in the image.
    pub const fn metadata_offset(&self) -> usize {
        self.offset
    }

    /// The sections in the order of the descriptor, which is the order of a launch.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// A launch with what the image itself holds. Sections that a VMM fills (TD_HOB, Payload,
    /// PayloadParam) hold zeros until [`Launch::fill`].
    pub fn launch(&self) -> Launch<'_> {
        Launch::new(self)
    }

    /// The MRTD of [`launch`](Self::launch).
    pub fn mrtd(&self, order: Order) -> [u8; 48] {
        self.launch().mrtd(order)
    }
}

/// The entries of the sections, after the checks of the descriptor's header.
fn entries(image: &[u8], offset: usize) -> Result<&[u8], TdvfError> {
    let field = |at| u32_at(image, offset + at).unwrap_or(0);
    let (found, length, version, sections) = (field(0), field(4), field(8), field(12));
    if found != SIGNATURE {
        return Err(TdvfError::Signature { offset, found });
    }
    if version != VERSION {
        return Err(TdvfError::Version {
            offset: offset + 8,
            version,
        });
    }
    if sections == 0 {
        return Err(TdvfError::NoSections {
            offset: offset + 12,
        });
    }
    if u64::from(length) != HEADER as u64 + ENTRY as u64 * u64::from(sections) {
        return Err(TdvfError::Length {
            offset: offset + 4,
            length,
            sections,
        });
    }
    usize::try_from(length)
        .ok()
        .and_then(|length| image.get(offset + HEADER..offset.checked_add(length)?))
        .ok_or(TdvfError::Truncated { offset, length })
}

/// Checks the rules that concern several sections.
fn check_together(sections: &[Section]) -> Result<(), TdvfError> {
    let mut by_address: Vec<_> = sections.iter().enumerate().collect();
    by_address.sort_by_key(|(_, section)| section.memory_address);
    for pair in by_address.windows(2) {
        let [(one, below), (other, above)] = pair else {
            continue;
        };
        if below.memory().end > above.memory_address {
            return Err(TdvfError::Overlap {
                first: *one.min(other),
                second: *one.max(other),
                gpa: above.memory_address,
            });
        }
    }
    let mut hobs = (0..)
        .zip(sections)
        .filter(|(_, s)| s.kind == SectionKind::TdHob);
    if let (Some((first, _)), Some((second, _))) = (hobs.next(), hobs.next()) {
        return Err(TdvfError::SecondHob { first, second });
    }
    let starts = |section: &Section| {
        section.kind == SectionKind::Bfv && section.memory().contains(&RESET_VECTOR)
    };
    if !sections.iter().any(starts) {
        return Err(TdvfError::NoResetVector);
    }
    // No sum overflows: the sections do not overlap.
    let added = sections.iter().filter(|section| !section.attributes.aug);
    let bytes = added.map(|section| section.memory_size).sum();
    if bytes > MAX_ADDED_BYTES {
        return Err(TdvfError::TooMuch { bytes });
    }
    Ok(())
}
