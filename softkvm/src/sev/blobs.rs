//! A structure with its blobs behind it, as `EncCmd` takes them: offsets in place of addresses.

use kvm_ops_uapi::checks::Check;
use kvm_ops_uapi::sev::BLOB_MAX;
use kvm_ops_uapi::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::refusal::{Result, ensure};
use crate::{Process, arg};

pub(super) struct Blobs<T> {
    pub(super) head: T,
    tail: Vec<u8>,
}

impl<T: FromBytes + FromZeros + IntoBytes + Immutable + KnownLayout + Clone> Blobs<T> {
    pub(super) fn new(head: T) -> Self {
        Self {
            head,
            tail: Vec::new(),
        }
    }

    /// Appends bytes, and returns their offset.
    pub(super) fn push(&mut self, bytes: &[u8]) -> U64 {
        let at = size_of::<T>() + self.tail.len();
        self.tail.extend_from_slice(bytes);
        U64::new(at as u64)
    }

    /// Appends bytes of the caller's: 1 to 16384, at an address that is not 0.
    pub(super) fn push_from(
        &mut self,
        process: &dyn Process,
        (address, len): (U64, U32),
        (wrong_len, fault): (Check, Check),
    ) -> Result<U64> {
        let len = len.get();
        let given = address.get() != 0 && (1..=BLOB_MAX).contains(&len);
        ensure(given, wrong_len)?;
        let bytes = arg::read_bytes(process, address.get(), len as usize, fault)?;
        Ok(self.push(&bytes))
    }

    /// The bytes for a command.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        [self.head.as_bytes(), &self.tail].concat()
    }

    /// The structure at the start of what a command left.
    pub(super) fn head_of(bytes: &[u8]) -> Option<T> {
        T::read_from_prefix(bytes).ok().map(|(head, _)| head)
    }
}
