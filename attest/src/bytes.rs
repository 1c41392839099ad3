//! Fixed parts of binary structures.

/// `N` bytes at `offset`. Offsets are constants of the caller, within the structure.
pub(crate) fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[offset..offset + N]);
    out
}
