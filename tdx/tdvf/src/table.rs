//! The table of GUIDed entries at the end of an OVMF image.
//!
//! It ends 32 bytes before the end of the image, before the code at the reset vector, and is read
//! backwards: an entry is its data, a 16-bit length that counts data, length and GUID, and the
//! GUID. The last entry, whose length is that of the whole table, closes it.

use crate::TdvfError;
use crate::wire::{guid, u32_at};

/// Closes the table: 96b582de-1fb2-45f7-baea-a366c55a082d.
pub(crate) const FOOTER: [u8; 16] = guid(
    0x96b5_82de,
    0x1fb2,
    0x45f7,
    [0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d],
);
/// Points at the TDX metadata: e47a6535-984a-4798-865e-4685a7bf8ec2.
pub(crate) const METADATA: [u8; 16] = guid(
    0xe47a_6535,
    0x984a,
    0x4798,
    [0x86, 0x5e, 0x46, 0x85, 0xa7, 0xbf, 0x8e, 0xc2],
);

/// Bytes behind the table.
pub(crate) const TAIL: usize = 32;
/// Length and GUID of an entry.
pub(crate) const ENTRY_TAIL: usize = 18;

/// The offset of the TDX metadata in the image.
pub(crate) fn find_metadata(image: &[u8]) -> Result<usize, TdvfError> {
    let (start, mut end) = bounds(image)?;
    let mut found = None;
    while end > start {
        let entry = Entry::ending_at(image, start, end)?;
        if entry.guid == METADATA {
            let offset = entry.tail;
            if found.is_some() {
                return Err(TdvfError::SecondEntry { offset });
            }
            let pointer = u32_at(image, entry.data).filter(|_| entry.tail - entry.data == 4);
            let length = end - entry.data;
            let from_end = pointer.ok_or(TdvfError::EntryLength { offset, length })?;
            found = Some((entry.data, from_end));
        }
        end = entry.data;
    }
    let (offset, from_end) = found.ok_or(TdvfError::NoMetadata { table: start })?;
    usize::try_from(from_end)
        .ok()
        .filter(|from_end| *from_end >= 16)
        .and_then(|from_end| image.len().checked_sub(from_end))
        .ok_or(TdvfError::Pointer { offset, from_end })
}

/// The offsets at which the entries before the footer begin and end.
fn bounds(image: &[u8]) -> Result<(usize, usize), TdvfError> {
    let none = TdvfError::NoTable {
        length: image.len(),
    };
    let end = image.len().checked_sub(TAIL).ok_or(none)?;
    let tail = end.checked_sub(ENTRY_TAIL).ok_or(none)?;
    if image.get(tail + 2..end) != Some(&FOOTER[..]) {
        return Err(none);
    }
    let footer = Entry::ending_at(image, 0, end)?;
    Ok((footer.data, tail))
}

struct Entry {
    /// The offset of its data.
    data: usize,
    /// The offset of its length, behind the data.
    tail: usize,
    guid: [u8; 16],
}

impl Entry {
    /// The entry whose last byte is before `end`; it begins at `start` or behind it.
    fn ending_at(image: &[u8], start: usize, end: usize) -> Result<Self, TdvfError> {
        let available = end - start;
        let bad = |offset, length| TdvfError::EntryLength { offset, length };
        let tail = end
            .checked_sub(ENTRY_TAIL)
            .filter(|tail| *tail >= start)
            .ok_or(bad(start, available))?;
        let bytes: [u8; ENTRY_TAIL] = image
            .get(tail..end)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(bad(tail, available))?;
        let length = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        if length < ENTRY_TAIL || length > available {
            return Err(bad(tail, length));
        }
        let mut guid = [0; 16];
        guid.copy_from_slice(&bytes[2..]);
        Ok(Self {
            data: end - length,
            tail,
            guid,
        })
    }
}
