//! One section of the metadata: a range of guest memory and what fills it.

use core::fmt;
use core::ops::Range;

use crate::error::SectionFault;
use crate::wire::{u32_at, u64_at};

/// Bytes of a section's entry in the descriptor.
pub(crate) const ENTRY: usize = 32;

/// The purpose of a section (TDVF design guide, section types; 5 and 6 are td-shim's).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum SectionKind {
    /// Boot firmware volume: the code.
    Bfv = 0,
    /// Configuration firmware volume: the variables.
    Cfv = 1,
    /// The place of the hand-off block by which the VMM describes memory to the firmware.
    TdHob = 2,
    /// Stack, heap and mailbox of the early firmware.
    TempMem = 3,
    /// Memory that is the guest's from the start.
    PermMem = 4,
    /// A kernel.
    Payload = 5,
    /// The parameters of that kernel.
    PayloadParam = 6,
}

impl SectionKind {
    /// Every kind in the order of its number.
    pub const ALL: [Self; 7] = [
        Self::Bfv,
        Self::Cfv,
        Self::TdHob,
        Self::TempMem,
        Self::PermMem,
        Self::Payload,
        Self::PayloadParam,
    ];

    /// The kind of that number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// Its name in the design guide.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bfv => "BFV",
            Self::Cfv => "CFV",
            Self::TdHob => "TD_HOB",
            Self::TempMem => "TempMem",
            Self::PermMem => "PermMem",
            Self::Payload => "Payload",
            Self::PayloadParam => "PayloadParam",
        }
    }

    /// Returns whether a VMM may provide its contents.
    pub(crate) const fn is_filled_by_vmm(self) -> bool {
        matches!(self, Self::TdHob | Self::Payload | Self::PayloadParam)
    }

    /// Returns whether early firmware, which runs with 32-bit addresses, must reach it.
    pub(crate) const fn is_early(self) -> bool {
        matches!(self, Self::Bfv | Self::Cfv | Self::TdHob | Self::TempMem)
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The way of a section's pages into the TD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// Bit 0, MR.EXTEND: the contents are part of MRTD, too.
    pub extend: bool,
    /// Bit 1, PAGE.AUG: the pages are not added before the launch. They come with
    /// TDH.MEM.PAGE.AUG, and the guest accepts them.
    pub aug: bool,
}

impl Attributes {
    /// The bits; `None` if any other is set.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits > 3 {
            return None;
        }
        Some(Self {
            extend: bits & 1 != 0,
            aug: bits & 2 != 0,
        })
    }

    /// The bits in the image.
    pub const fn bits(self) -> u32 {
        self.extend as u32 | (self.aug as u32) << 1
    }
}

/// One section. Values that [`Tdvf::parse`](crate::Tdvf::parse) returns keep the rules that
/// [`SectionFault`] lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Section {
    /// Its purpose.
    pub kind: SectionKind,
    /// The offset of its data in the image.
    pub data_offset: u32,
    /// The size of its data; the rest up to `memory_size` is zeros.
    pub raw_size: u32,
    /// Guest-physical address.
    pub memory_address: u64,
    /// Bytes of guest memory.
    pub memory_size: u64,
    /// The way of its pages into the TD.
    pub attributes: Attributes,
}

impl Section {
    /// The pages it has.
    pub const fn pages(&self) -> u64 {
        self.memory_size / crate::PAGE_SIZE as u64
    }

    /// Its guest-physical addresses.
    pub const fn memory(&self) -> Range<u64> {
        self.memory_address..self.memory_address.saturating_add(self.memory_size)
    }

    /// Its bytes in the image.
    pub(crate) fn data<'a>(&self, image: &'a [u8]) -> Option<&'a [u8]> {
        let start = usize::try_from(self.data_offset).ok()?;
        let length = usize::try_from(self.raw_size).ok()?;
        image.get(start..start.checked_add(length)?)
    }

    /// Reads an entry of [`ENTRY`] bytes, and checks what can be checked of it alone.
    pub(crate) fn parse(entry: &[u8], image: &[u8]) -> Result<Self, SectionFault> {
        let word = |at| u32_at(entry, at).unwrap_or(0);
        let long = |at| u64_at(entry, at).unwrap_or(0);
        let (kind, attributes) = (word(24), word(28));
        let section = Self {
            kind: SectionKind::from_number(kind).ok_or(SectionFault::Kind(kind))?,
            data_offset: word(0),
            raw_size: word(4),
            memory_address: long(8),
            memory_size: long(16),
            attributes: Attributes::from_bits(attributes)
                .ok_or(SectionFault::Attributes(attributes))?,
        };
        section.check(image)?;
        Ok(section)
    }

    /// The entry in an image.
    pub(crate) fn to_bytes(self) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        entry[0..4].copy_from_slice(&self.data_offset.to_le_bytes());
        entry[4..8].copy_from_slice(&self.raw_size.to_le_bytes());
        entry[8..16].copy_from_slice(&self.memory_address.to_le_bytes());
        entry[16..24].copy_from_slice(&self.memory_size.to_le_bytes());
        entry[24..28].copy_from_slice(&(self.kind as u32).to_le_bytes());
        entry[28..32].copy_from_slice(&self.attributes.bits().to_le_bytes());
        entry
    }

    fn check(&self, image: &[u8]) -> Result<(), SectionFault> {
        let page = crate::PAGE_SIZE as u64;
        let (address, size) = (self.memory_address, self.memory_size);
        if address % page != 0 {
            return Err(SectionFault::MisalignedAddress(address));
        }
        if size % page != 0 {
            return Err(SectionFault::MisalignedSize(size));
        }
        if size == 0 {
            return Err(SectionFault::Empty);
        }
        let limit = if self.kind.is_early() {
            1 << 32
        } else {
            crate::MAX_GPA
        };
        if address.checked_add(size).is_none_or(|end| end > limit) {
            let kind = self.kind;
            return Err(SectionFault::TooHigh {
                kind,
                address,
                size,
                limit,
            });
        }
        self.check_data(image)
    }

    fn check_data(&self, image: &[u8]) -> Result<(), SectionFault> {
        let (kind, raw) = (self.kind, self.raw_size);
        if u64::from(raw) > self.memory_size {
            return Err(SectionFault::RawTooLong {
                raw,
                memory: self.memory_size,
            });
        }
        if self.data(image).is_none() {
            return Err(SectionFault::DataOutside {
                offset: self.data_offset,
                size: raw,
                image: image.len(),
            });
        }
        match kind {
            SectionKind::Bfv | SectionKind::Cfv if raw == 0 => {
                return Err(SectionFault::NoData(kind));
            }
            SectionKind::TdHob | SectionKind::TempMem | SectionKind::PermMem if raw != 0 => {
                return Err(SectionFault::UnexpectedData(kind, raw));
            }
            _ => {}
        }
        if self.attributes.aug && kind != SectionKind::PermMem {
            return Err(SectionFault::Aug(kind));
        }
        if self.attributes.aug && self.attributes.extend {
            return Err(SectionFault::AugAndExtend);
        }
        Ok(())
    }
}
