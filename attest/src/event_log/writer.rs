//! Writes a log.

use sha2::{Digest as _, Sha384};

use super::log::{OLD_DIGEST, RTMRS, SIGNATURE};
use super::{EventKind, LogError, MAX_LOG, SHA384};

/// Bytes of an event beside its data: register, type, one digest with its algorithm, two counts.
const EVENT: usize = 4 + 4 + 4 + 2 + 48 + 4;

/// Writes a log event by event, as firmware does.
#[derive(Clone, Debug)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// A log with its header alone, whose only algorithm is SHA-384.
    pub fn new() -> Self {
        let mut data = SIGNATURE.to_vec();
        // Platform class 0 (client); version 2.0, errata 105; UINTN of 8 bytes.
        data.extend_from_slice(&[0, 0, 0, 0, 0, 2, 105, 2]);
        data.extend_from_slice(&1_u32.to_le_bytes());
        data.extend_from_slice(&SHA384.to_le_bytes());
        data.extend_from_slice(&48_u16.to_le_bytes());
        // No data of the vendor.
        data.push(0);
        let mut writer = Self { bytes: Vec::new() };
        writer.head(1, EventKind::NO_ACTION);
        writer.bytes.extend_from_slice(&[0; OLD_DIGEST]);
        writer.data(&data);
        writer
    }

    /// Adds an event about `data`. Returns the digest to extend RTMR `rtmr` with
    /// (TDG.MR.RTMR.EXTEND).
    ///
    /// # Errors
    /// [`LogError::Rtmr`] for an RTMR that does not exist, [`LogError::TooLong`] for a log of more
    /// than [`MAX_LOG`] bytes; the log is as it was.
    pub fn measure(
        &mut self,
        rtmr: usize,
        kind: EventKind,
        data: &[u8],
    ) -> Result<[u8; 48], LogError> {
        let digest = Sha384::digest(data).into();
        self.add(rtmr, kind, digest, data)?;
        Ok(digest)
    }

    /// Adds an event with the digest of something that `data` describes.
    ///
    /// # Errors
    /// As [`Writer::measure`].
    pub fn add(
        &mut self,
        rtmr: usize,
        kind: EventKind,
        digest: [u8; 48],
        data: &[u8],
    ) -> Result<(), LogError> {
        if rtmr >= RTMRS {
            return Err(LogError::Rtmr(rtmr));
        }
        let length = self.bytes.len() + EVENT + data.len();
        if length > MAX_LOG {
            return Err(LogError::TooLong(length));
        }
        self.head(rtmr as u32 + 1, kind);
        self.bytes.extend_from_slice(&1_u32.to_le_bytes());
        self.bytes.extend_from_slice(&SHA384.to_le_bytes());
        self.bytes.extend_from_slice(&digest);
        self.data(data);
        Ok(())
    }

    /// The log so far.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn head(&mut self, register: u32, kind: EventKind) {
        self.bytes.extend_from_slice(&register.to_le_bytes());
        self.bytes.extend_from_slice(&kind.0.to_le_bytes());
    }

    fn data(&mut self, data: &[u8]) {
        // MAX_LOG has 22 bits.
        let length = data.len() as u32;
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(data);
    }
}
