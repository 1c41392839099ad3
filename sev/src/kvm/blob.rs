//! Structures and blobs inside a command's data.

use core::ops::Range;

use kvm_ops::Result;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::rules::{EFAULT, errno};

/// The structure that a command's data begins with.
pub(crate) fn read<T: FromBytes>(data: &[u8]) -> Result<T> {
    T::read_from_prefix(data)
        .map(|(value, _)| value)
        .map_err(|_| errno(EFAULT))
}

/// Writes it back.
pub(crate) fn write<T: IntoBytes + Immutable>(data: &mut [u8], value: &T) -> Result<()> {
    value.write_to_prefix(data).map_err(|_| errno(EFAULT))
}

/// The place of a blob.
pub(crate) fn range(data: &[u8], offset: u64, len: u64) -> Result<Range<usize>> {
    let fault = errno(EFAULT);
    let end = offset.checked_add(len).ok_or(fault)?;
    if end > data.len() as u64 {
        return Err(fault);
    }
    let bound = |at: u64| usize::try_from(at).map_err(|_: core::num::TryFromIntError| fault);
    Ok(bound(offset)?..bound(end)?)
}

/// A blob to be read.
pub(crate) fn blob(data: &[u8], offset: u64, len: u64) -> Result<&[u8]> {
    let range = range(data, offset, len)?;
    Ok(&data[range])
}

/// A blob to be written.
pub(crate) fn blob_mut(data: &mut [u8], offset: u64, len: u64) -> Result<&mut [u8]> {
    let range = range(data, offset, len)?;
    Ok(&mut data[range])
}
