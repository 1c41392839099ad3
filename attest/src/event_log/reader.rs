//! Reads the bytes of a log.

use super::LogError;

/// A position in a log.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The event that is read.
    event: usize,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            event: 0,
        }
    }

    /// Begins an event here. Returns its offset.
    pub(super) const fn begin(&mut self) -> usize {
        self.event = self.at;
        self.at
    }

    /// The bytes that follow.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], LogError> {
        let taken = self.rest().get(..length).ok_or(LogError::Cut(self.event))?;
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LogError> {
        let cut = LogError::Cut(self.event);
        self.take(N)?.try_into().map_err(|_| cut)
    }

    pub(super) fn u16(&mut self) -> Result<u16, LogError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, LogError> {
        self.array().map(u32::from_le_bytes)
    }

    /// The data of an event: its length, then the bytes.
    pub(super) fn data(&mut self) -> Result<&'a [u8], LogError> {
        let length = self.u32()?;
        self.take(length as usize)
    }
}
