//! Payloads of records that protocols have in common.

use alloc::vec::Vec;

use kvm_ops::{Error, Gfn};

use crate::layout::Layout;
use crate::migrate_error::{MigrateError, ProtocolError, Reason, Refusal};

type Result<T> = core::result::Result<T, MigrateError>;

/// Takes a payload apart, front to back.
#[derive(Clone, Debug)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The fields of a payload.
    pub const fn of(payload: &'a [u8]) -> Self {
        Self(payload)
    }

    /// The bytes that are left.
    pub const fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`ProtocolError::Field`] for a payload of another length.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        if len > self.0.len() {
            return Err(ProtocolError::Field("payload length").into());
        }
        let (head, tail) = self.0.split_at(len);
        self.0 = tail;
        Ok(head)
    }

    /// The next bytes as an array.
    ///
    /// # Errors
    /// [`ProtocolError::Field`] for a payload of another length.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    /// The next byte.
    ///
    /// # Errors
    /// [`ProtocolError::Field`] for a payload of another length.
    pub fn u8(&mut self) -> Result<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// The next number of 2 bytes.
    ///
    /// # Errors
    /// [`ProtocolError::Field`] for a payload of another length.
    pub fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next number of 4 bytes.
    ///
    /// # Errors
    /// [`ProtocolError::Field`] for a payload of another length.
    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next number of 8 bytes.
    ///
    /// # Errors
    /// [`ProtocolError::Field`] for a payload of another length.
    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Succeeds if nothing is left.
    ///
    /// # Errors
    /// [`ProtocolError::Field`] for a payload of another length.
    pub fn end(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(ProtocolError::Field("payload length").into())
    }

    /// The next bytes as a layout.
    ///
    /// # Errors
    /// [`ProtocolError::Field`] for ranges that are no layout.
    pub fn layout(&mut self) -> Result<Layout> {
        let count = self.u16()?;
        let mut ranges = Vec::new();
        for _ in 0..count {
            ranges.push((Gfn::new(self.u64()?), self.u64()?));
        }
        Layout::new(ranges).map_err(|_| ProtocolError::Field("memory layout").into())
    }
}

impl Layout {
    /// Writes it as [`Fields::layout`] reads it: the number of ranges (2 bytes), then for each its first
    /// frame and the number of its frames (8 each).
    pub fn encode(&self, out: &mut Vec<u8>) {
        let ranges = self.ranges();
        out.extend_from_slice(&(ranges.len() as u16).to_le_bytes());
        for (first, pages) in ranges {
            out.extend_from_slice(&first.get().to_le_bytes());
            out.extend_from_slice(&pages.to_le_bytes());
        }
    }
}

impl Refusal {
    /// Bytes of its encoded form.
    pub const BYTES: usize = 10;

    /// The reason (2 bytes) and the status (8).
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..2].copy_from_slice(&(self.reason as u16).to_le_bytes());
        out[2..].copy_from_slice(&self.status.to_le_bytes());
        out
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`ProtocolError::Field`] for bytes that are no refusal.
    pub fn decode(payload: &[u8]) -> Result<Self> {
        let mut fields = Fields::of(payload);
        let reason = Reason::from_wire(fields.u16()?);
        let reason = reason.ok_or(ProtocolError::Field("reason of a refusal"))?;
        let status = fields.u64()?;
        fields.end()?;
        Ok(Self { reason, status })
    }

    /// The refusal that tells the peer of an error here, with the firmware's status as it is.
    pub const fn of(error: &MigrateError) -> Self {
        let (reason, status) = match error {
            MigrateError::Failed { error, .. } => match error {
                Error::Firmware(word) => (Reason::Firmware, *word),
                error => (Reason::Host, error.errno() as u64),
            },
            MigrateError::Protocol(ProtocolError::Session) => (Reason::Session, 0),
            MigrateError::Protocol(
                ProtocolError::Incomplete { .. } | ProtocolError::TooManyRecords,
            ) => (Reason::Limits, 0),
            MigrateError::Protocol(ProtocolError::NoPostCopy) => (Reason::PostCopy, 0),
            MigrateError::WrongPhase => (Reason::Busy, 0),
            _ => (Reason::Damaged, 0),
        };
        Self { reason, status }
    }
}
