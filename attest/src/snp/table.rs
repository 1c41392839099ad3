//! The certificate table of extended guest requests (GHCB specification, SNP Extended Guest
//! Request): headers of a GUID, an offset and a length, a header of zeros, then the certificates.

/// Most bytes of a table that are read.
pub const MAX_TABLE: usize = 0x10000;
/// Length of a header.
const HEADER: usize = 24;
/// Most headers that are read.
const MAX_ENTRIES: usize = 16;

/// The kind of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum EntryKind {
    Vcek,
    Vlek,
    Ask,
    Ark,
    Crl,
}

impl EntryKind {
    /// Every kind, with its GUID in the order of its text form.
    const GUIDS: [(Self, u128); 5] = [
        (Self::Vcek, 0x63da758d_e664_4564_adc5_f4b93be8accd),
        (Self::Vlek, 0xa8074bc2_a25a_483e_aae6_39c045a0b8a1),
        (Self::Ask, 0x4ab7b379_bbac_4fe4_a02f_05aef327c782),
        (Self::Ark, 0xc0b406a4_a803_4952_9743_3fb6014cd0ae),
        (Self::Crl, 0x92f81bc3_5811_4d3d_97ff_d19f88dc67ea),
    ];

    fn from_guid(guid: u128) -> Option<Self> {
        let found = Self::GUIDS.iter().find(|(_, known)| *known == guid);
        found.map(|(kind, _)| *kind)
    }

    fn guid(self) -> u128 {
        let found = Self::GUIDS.iter().find(|(kind, _)| *kind == self);
        found.map_or(0, |(_, guid)| *guid)
    }
}

/// Returns true if the bytes begin with the header of a table.
pub fn is_table(bytes: &[u8]) -> bool {
    guid_of(bytes).is_some_and(|guid| EntryKind::from_guid(guid).is_some())
}

fn guid_of(bytes: &[u8]) -> Option<u128> {
    bytes.first_chunk().map(|guid| u128::from_be_bytes(*guid))
}

/// Reads the entries whose kind is known; others are passed over.
///
/// # Errors
///
/// A table without an end, with more than 16 headers or 64 KiB, or an entry outside of it.
pub fn read(bytes: &[u8]) -> Result<Vec<(EntryKind, &[u8])>, String> {
    if bytes.len() > MAX_TABLE {
        return Err(format!("a table of {:#x} bytes", bytes.len()));
    }
    let mut found = Vec::new();
    for (n, header) in bytes.chunks_exact(HEADER).enumerate().take(MAX_ENTRIES) {
        let guid = guid_of(header).unwrap_or(0);
        let word = |at: usize| {
            let bytes = header[at..at + 4].try_into().unwrap_or([0; 4]);
            u32::from_le_bytes(bytes) as usize
        };
        let (offset, length) = (word(16), word(20));
        if guid == 0 {
            return Ok(found);
        }
        let data = offset
            .checked_add(length)
            .and_then(|end| bytes.get(offset..end))
            .ok_or_else(|| {
                format!("entry {n} at {offset:#x} with {length:#x} bytes lies outside")
            })?;
        if let Some(kind) = EntryKind::from_guid(guid) {
            found.push((kind, data));
        }
    }
    Err("the table of certificates has no end".into())
}

/// Writes a table.
pub fn write(entries: &[(EntryKind, &[u8])]) -> Vec<u8> {
    let mut offset = HEADER * (entries.len() + 1);
    let mut out = Vec::new();
    for (kind, data) in entries {
        out.extend_from_slice(&kind.guid().to_be_bytes());
        out.extend_from_slice(&(offset as u32).to_le_bytes());
        out.extend_from_slice(&(data.len() as u32).to_le_bytes());
        offset += data.len();
    }
    out.resize(HEADER * (entries.len() + 1), 0);
    entries
        .iter()
        .for_each(|(_, data)| out.extend_from_slice(data));
    out
}
