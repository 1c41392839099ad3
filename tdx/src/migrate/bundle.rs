//! A bundle as it travels between hosts.

use alloc::vec::Vec;

use kvm_ops::{PAGE_SIZE, VcpuId};

use super::entry::Entry;
use super::lane::BATCH;

/// Bytes of an MBMD.
pub const MBMD_BYTES: usize = 48;
/// Bytes of a MAC.
const MAC: usize = 16;
const PAGE: usize = PAGE_SIZE as usize;

/// Offsets in an MBMD (TDX module ABI, "MBMD").
const AT_STREAM: usize = 4;
const AT_KIND: usize = 6;
const AT_EPOCH: usize = 12;

/// What a bundle holds: the type in its MBMD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BundleKind {
    /// State that is fixed when a TD is built: attributes, CPUID values, measurements.
    Immutable,
    /// The TD's state.
    TdState,
    /// A vCPU's state.
    VcpuState,
    /// Pages of memory.
    Memory,
    /// The end of an epoch, or the start token.
    Token,
    /// The target's word that it never ran the TD.
    AbortToken,
}

impl BundleKind {
    const ALL: [(u8, Self); 6] = [
        (0, Self::Immutable),
        (1, Self::TdState),
        (2, Self::VcpuState),
        (16, Self::Memory),
        (32, Self::Token),
        (33, Self::AbortToken),
    ];

    fn from_wire(raw: u8) -> Option<Self> {
        let known = Self::ALL.iter().find(|(number, _)| *number == raw);
        known.map(|(_, kind)| *kind)
    }

    /// The numbers of entries and of pages that a bundle of this kind may have.
    const fn limits(
        self,
    ) -> (
        core::ops::RangeInclusive<usize>,
        core::ops::RangeInclusive<usize>,
    ) {
        match self {
            Self::Immutable | Self::TdState | Self::VcpuState => (0..=0, 1..=BATCH),
            Self::Memory => (1..=BATCH, 0..=BATCH),
            Self::Token | Self::AbortToken => (0..=0, 0..=0),
        }
    }
}

/// A bundle: one unit that the module exports and imports. Everything in it is encrypted or
/// authenticated under the session's keys, which no host has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    pub(crate) kind: BundleKind,
    /// The vCPU, as the hosts number it; 0 for other kinds.
    pub(crate) vcpu: VcpuId,
    pub(crate) mbmd: [u8; MBMD_BYTES],
    pub(crate) entries: Vec<Entry>,
    pub(crate) macs: Vec<u8>,
    pub(crate) pages: Vec<u8>,
}

/// The reason why bytes are no bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BundleError {
    /// Fewer bytes than its counts say, or more.
    Length(usize),
    /// An unknown type in the MBMD.
    Kind(u8),
    /// A number of entries that its kind cannot have.
    Entries(usize),
    /// A number of pages that its kind or its entries cannot have.
    Pages(usize),
}

impl core::error::Error for BundleError {}

impl core::fmt::Display for BundleError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Length(bytes) => write!(f, "{bytes:#x} bytes are no bundle"),
            Self::Kind(kind) => write!(f, "bundle type {kind:#x}"),
            Self::Entries(entries) => write!(f, "a bundle of this type with {entries} entries"),
            Self::Pages(pages) => write!(f, "a bundle with {pages} pages, which do not fit it"),
        }
    }
}

/// Bytes before the entries: vCPU 4, entries 2, pages 2, MBMD.
const HEAD: usize = 8 + MBMD_BYTES;

impl Bundle {
    /// The most bytes of an encoded bundle.
    pub const MAX_BYTES: usize = HEAD + BATCH * (8 + MAC + PAGE);

    /// Its kind.
    pub const fn kind(&self) -> BundleKind {
        self.kind
    }

    /// The forward stream that carries it.
    pub const fn stream(&self) -> u16 {
        u16::from_le_bytes([self.mbmd[AT_STREAM], self.mbmd[AT_STREAM + 1]])
    }

    /// The type in its MBMD.
    pub(crate) const fn type_number(&self) -> u8 {
        self.mbmd[AT_KIND]
    }

    /// Returns whether it is the token that ends the in-order phase: its epoch is the last one.
    pub(crate) fn is_start_token(&self) -> bool {
        self.kind == BundleKind::Token && self.mbmd[AT_EPOCH..AT_EPOCH + 4] == [0xff; 4]
    }

    /// The number of pages of guest memory that it brings or describes.
    pub fn guest_pages(&self) -> usize {
        let described = |entry: &&Entry| entry.succeeded();
        self.entries.iter().filter(described).count()
    }

    /// The number of bytes of its encoded form.
    pub fn len(&self) -> usize {
        HEAD + self.entries.len() * 8 + self.macs.len() + self.pages.len()
    }

    /// False: a bundle has an MBMD at least.
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Its kind, from the MBMD.
    pub(crate) fn kind_of(mbmd: &[u8; MBMD_BYTES]) -> Result<BundleKind, BundleError> {
        BundleKind::from_wire(mbmd[AT_KIND]).ok_or(BundleError::Kind(mbmd[AT_KIND]))
    }

    /// Writes it: vCPU (4 bytes), number of entries (2), number of pages (2), MBMD (48), entries (8
    /// each), their MACs (16 each), pages (4096 each). Numbers are little-endian.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(self.len());
        out.extend(self.encoded_head());
        out.extend_from_slice(&self.pages);
    }

    /// Its encoded form without the pages, which follow.
    pub(crate) fn encoded_head(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.len() - self.pages.len());
        out.extend_from_slice(&self.vcpu.0.to_le_bytes());
        // Both are at most `BATCH`.
        out.extend_from_slice(&(self.entries.len() as u16).to_le_bytes());
        out.extend_from_slice(&((self.pages.len() / PAGE) as u16).to_le_bytes());
        out.extend_from_slice(&self.mbmd);
        for entry in &self.entries {
            out.extend_from_slice(&entry.0.to_le_bytes());
        }
        out.extend_from_slice(&self.macs);
        out
    }

    /// Reads what [`encode`](Self::encode) wrote. The bytes come from a peer: the form is checked
    /// here, and nothing else; the rest is the module's to judge.
    ///
    /// # Errors
    /// [`BundleError`] says what does not fit.
    pub fn decode(bytes: &[u8]) -> Result<Self, BundleError> {
        let wrong_length = BundleError::Length(bytes.len());
        let (head, rest) = bytes.split_first_chunk::<8>().ok_or(wrong_length)?;
        let (mbmd, rest) = rest.split_first_chunk::<MBMD_BYTES>().ok_or(wrong_length)?;
        let [a, b, c, d, e, f, g, h] = *head;
        let vcpu = VcpuId(u32::from_le_bytes([a, b, c, d]));
        let entries = usize::from(u16::from_le_bytes([e, f]));
        let pages = usize::from(u16::from_le_bytes([g, h]));
        let kind = Self::kind_of(mbmd)?;
        let (entries_of_kind, pages_of_kind) = kind.limits();
        if !entries_of_kind.contains(&entries) {
            return Err(BundleError::Entries(entries));
        }
        if !pages_of_kind.contains(&pages) {
            return Err(BundleError::Pages(pages));
        }
        if rest.len() != entries * (8 + MAC) + pages * PAGE {
            return Err(wrong_length);
        }
        let (words, rest) = rest.split_at(entries * 8);
        let (macs, contents) = rest.split_at(entries * MAC);
        let (words, _) = words.as_chunks::<8>();
        let words = words.iter().map(|word| Entry(u64::from_le_bytes(*word)));
        let entries: Vec<Entry> = words.collect();
        let with_contents = entries.iter().filter(|entry| entry.has_contents()).count();
        if kind == BundleKind::Memory && with_contents != pages {
            return Err(BundleError::Pages(pages));
        }
        Ok(Self {
            kind,
            vcpu,
            mbmd: *mbmd,
            entries,
            macs: macs.to_vec(),
            pages: contents.to_vec(),
        })
    }
}
