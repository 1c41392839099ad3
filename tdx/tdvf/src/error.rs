//! Errors of reading an image.

use thiserror::Error;

use crate::SectionKind;

/// Errors of an image without metadata that a TD could be launched from. Every offset counts from
/// the start of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TdvfError {
    /// The image lacks the GUID that closes the table of GUIDed entries.
    #[error(
        "the image of {length:#x} bytes has no table of GUIDed entries 32 bytes before its end"
    )]
    NoTable {
        /// Bytes of the image.
        length: usize,
    },
    /// An entry of the table claims more bytes than the table has before it, or fewer than its own
    /// length and GUID need.
    #[error("a table entry at offset {offset:#x} has the impossible length {length:#x}")]
    EntryLength {
        /// The offset of its length.
        offset: usize,
        /// The length that it claims.
        length: usize,
    },
    /// The table has no entry that points at TDX metadata.
    #[error("the image has no TDX metadata: its table at offset {table:#x} has no such entry")]
    NoMetadata {
        /// The offset of the table.
        table: usize,
    },
    /// The table points at TDX metadata twice.
    #[error("the table has a second entry for TDX metadata at offset {offset:#x}")]
    SecondEntry {
        /// The offset of its length.
        offset: usize,
    },
    /// The entry's offset leads out of the image.
    #[error(
        "the table entry at offset {offset:#x} puts the TDX metadata {from_end:#x} bytes before the \
         end of an image that has no 16 bytes there"
    )]
    Pointer {
        /// The offset of the pointer.
        offset: usize,
        /// Its value.
        from_end: u32,
    },
    /// The descriptor does not begin with `TDVF`.
    #[error("the TDX metadata at offset {offset:#x} begins with {found:#010x}, not with `TDVF`")]
    Signature {
        /// The offset of the descriptor.
        offset: usize,
        /// The value there, read little-endian.
        found: u32,
    },
    /// The descriptor is of a version that is not known.
    #[error("the TDX metadata at offset {offset:#x} has version {version}, known is 1")]
    Version {
        /// The offset of the version.
        offset: usize,
        /// Its value.
        version: u32,
    },
    /// The descriptor has no sections.
    #[error("the TDX metadata at offset {offset:#x} has no sections")]
    NoSections {
        /// The offset of their number.
        offset: usize,
    },
    /// The descriptor's length is not that of its sections.
    #[error(
        "the TDX metadata at offset {offset:#x} has the length {length:#x}, which is not that of \
         {sections} sections"
    )]
    Length {
        /// The offset of the length.
        offset: usize,
        /// Its value.
        length: u32,
        /// The number of sections that the descriptor states.
        sections: u32,
    },
    /// The descriptor runs out of the image.
    #[error(
        "the TDX metadata at offset {offset:#x} runs out of the image with its {length:#x} bytes"
    )]
    Truncated {
        /// The offset of the descriptor.
        offset: usize,
        /// Its length.
        length: u32,
    },
    /// A section makes no sense.
    #[error("section {index} (its entry is at offset {offset:#x})")]
    Section {
        /// Its number in the descriptor, from 0.
        index: usize,
        /// The offset of its entry.
        offset: usize,
        /// The fault.
        #[source]
        fault: SectionFault,
    },
    /// Two sections want the same page, which can be added only once.
    #[error("sections {first} and {second} both have the page at gpa {gpa:#x}")]
    Overlap {
        /// The number of the one.
        first: usize,
        /// The number of the other, which is larger.
        second: usize,
        /// The lowest page that both have.
        gpa: u64,
    },
    /// More than one section is for the hand-off block.
    #[error("section {second} is a second TD_HOB, the first is section {first}")]
    SecondHob {
        /// The number of the first.
        first: usize,
        /// The number of the second.
        second: usize,
    },
    /// No boot firmware volume covers the address where vCPUs start.
    #[error("no BFV section covers the reset vector at gpa 0xfffffff0")]
    NoResetVector,
    /// More pages would be added before the launch than [`MAX_ADDED_BYTES`](crate::MAX_ADDED_BYTES)
    /// holds.
    #[error("the sections add {bytes:#x} bytes before the launch, the limit is {limit:#x}",
            limit = crate::MAX_ADDED_BYTES)]
    TooMuch {
        /// The sum of the sections.
        bytes: u64,
    },
}

/// The fault of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SectionFault {
    /// The type is none of [`SectionKind::ALL`].
    #[error("unknown section type {0:#x}")]
    Kind(u32),
    /// Attributes other than MR.EXTEND and PAGE.AUG are set.
    #[error("unknown attributes in {0:#x}")]
    Attributes(u32),
    /// The address is not that of a page.
    #[error("memory address {0:#x} is not a multiple of the page size")]
    MisalignedAddress(u64),
    /// The size is not in whole pages.
    #[error("memory size {0:#x} is not a multiple of the page size")]
    MisalignedSize(u64),
    /// There is no memory.
    #[error("memory size 0x0")]
    Empty,
    /// The end is beyond what the firmware, or a private address, can reach.
    #[error("{kind} memory at {address:#x} with {size:#x} bytes does not end below {limit:#x}")]
    TooHigh {
        /// Its purpose.
        kind: SectionKind,
        /// Its address.
        address: u64,
        /// Its size.
        size: u64,
        /// 4 GiB, or [`MAX_GPA`](crate::MAX_GPA).
        limit: u64,
    },
    /// More data than memory.
    #[error("raw data of {raw:#x} bytes is longer than its memory, {memory:#x} bytes")]
    RawTooLong {
        /// Bytes in the image.
        raw: u32,
        /// Bytes of memory.
        memory: u64,
    },
    /// The data runs out of the image.
    #[error(
        "raw data at offset {offset:#x} with {size:#x} bytes is outside of the image, {image:#x} bytes"
    )]
    DataOutside {
        /// The address that it claims.
        offset: u32,
        /// The length that it claims.
        size: u32,
        /// Bytes of the image.
        image: usize,
    },
    /// A firmware volume without data.
    #[error("a {0} section needs raw data")]
    NoData(SectionKind),
    /// Data where zeros belong.
    #[error("a {0} section has no raw data, but {1:#x} bytes are stated")]
    UnexpectedData(SectionKind, u32),
    /// PAGE.AUG where contents are needed.
    #[error("a {0} section cannot have the attribute PAGE.AUG, only PermMem can")]
    Aug(SectionKind),
    /// Both attributes: a page that is absent at the launch cannot be measured.
    #[error("attributes PAGE.AUG and MR.EXTEND exclude each other")]
    AugAndExtend,
}
