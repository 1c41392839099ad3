//! Reading and writing little-endian fields of fixed-size records.
//!
//! Offsets are constants checked against records whose length is checked first, so a read beyond
//! the end is a mistake in this crate. It then reads as zeros instead of ending the process.

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(copy_at(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(copy_at(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(copy_at(bytes, at))
}

pub(crate) fn copy_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(field) = bytes.get(at..at + N) {
        out.copy_from_slice(field);
    }
    out
}

/// A field of a page-sized record, borrowed.
pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    const { assert!(N <= 0x404) };
    static ZEROS: [u8; 0x404] = [0; 0x404];
    bytes
        .get(at..at + N)
        .unwrap_or(&ZEROS[..N])
        .try_into()
        .unwrap_or_else(|_| unreachable!("the slice has N bytes"))
}

/// Writes a field; one that does not fit is dropped.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + field.len()) {
        place.copy_from_slice(field);
    }
}
