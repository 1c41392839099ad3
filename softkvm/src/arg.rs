//! Structures in the caller's memory.

use kvm_ops_uapi::checks::Check;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::Process;
use crate::refusal::Result;

/// Reads a structure.
pub(crate) fn read<T>(process: &dyn Process, address: u64, check: Check) -> Result<T>
where
    T: FromBytes + FromZeros + IntoBytes,
{
    let mut value = T::new_zeroed();
    let copied = process.read(address, value.as_mut_bytes());
    copied.map_err(|_| check)?;
    Ok(value)
}

/// Writes a structure.
pub(crate) fn write<T>(process: &dyn Process, address: u64, value: &T, check: Check) -> Result<()>
where
    T: IntoBytes + Immutable + ?Sized,
{
    let copied = process.write(address, value.as_bytes());
    copied.map_err(|_| check.into())
}

/// Reads a list behind the fixed part of a structure. The caller has limited the count.
pub(crate) fn read_list<T>(
    process: &dyn Process,
    address: u64,
    count: usize,
    check: Check,
) -> Result<Vec<T>>
where
    T: FromBytes + FromZeros + IntoBytes + Clone,
{
    let mut list = vec![T::new_zeroed(); count];
    for (index, entry) in list.iter_mut().enumerate() {
        let at = address.wrapping_add((index * size_of::<T>()) as u64);
        process.read(at, entry.as_mut_bytes()).map_err(|_| check)?;
    }
    Ok(list)
}

/// Reads bytes. The caller has limited the length.
pub(crate) fn read_bytes(
    process: &dyn Process,
    address: u64,
    len: usize,
    check: Check,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    process.read(address, &mut bytes).map_err(|_| check)?;
    Ok(bytes)
}
