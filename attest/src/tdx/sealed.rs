//! The report that a TD gets from the TDX module: sealed by a MAC for its platform.

use sha2::{Digest, Sha384};
use thiserror::Error;

use super::TdReport;
use crate::bytes::at;

/// Length of a report, TDREPORT_STRUCT.
pub const SEALED_LEN: usize = 1024;
/// Type of the report of a TD, in its first byte.
const TYPE_TD: u8 = 0x81;

/// The bytes are no report of a TD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum SealedError {
    #[error("a TD's report has {SEALED_LEN:#x} bytes, not {0:#x}")]
    Length(usize),
    #[error("the report is of the type {0:#x}, not a TD's ({TYPE_TD:#x})")]
    Type(u8),
}

/// A TDREPORT_STRUCT (TDX module ABI, TDG.MR.REPORT).
///
/// Its MAC can be checked only on the platform that made it; a quoting service does, and makes a
/// quote of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedReport {
    /// Subtype of the report; 0.
    pub subtype: u8,
    /// Version: 0 for TDX 1.0, 1 with TEE_TCB_SVN2 and service TDs.
    pub version: u8,
    /// Security versions of the processor.
    pub cpu_svn: [u8; 16],
    /// HMAC-SHA-256 of the first 224 bytes, by a key of the platform.
    pub mac: [u8; 32],
    /// True if the hashes under the MAC are those of TEE_TCB_INFO and TDINFO.
    pub hashes_match: bool,
    /// The parts that a quote repeats.
    pub report: TdReport,
}

impl SealedReport {
    /// Reads a report. Nothing but length, type and hashes is looked at.
    ///
    /// # Errors
    /// [`SealedError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SealedError> {
        let bytes: &[u8; SEALED_LEN] = bytes
            .try_into()
            .map_err(|_| SealedError::Length(bytes.len()))?;
        let [kind, subtype, version, ..] = *bytes;
        if kind != TYPE_TD {
            return Err(SealedError::Type(kind));
        }
        let is_hash = |part: &[u8], hash: &[u8]| Sha384::digest(part)[..] == *hash;
        // REPORTMACSTRUCT, TEE_TCB_INFO at 256, TDINFO_STRUCT at 512.
        Ok(Self {
            subtype,
            version,
            cpu_svn: at(bytes, 16),
            mac: at(bytes, 224),
            hashes_match: is_hash(&bytes[256..495], &bytes[32..80])
                && is_hash(&bytes[512..], &bytes[80..128]),
            report: TdReport {
                tee_tcb_svn: at(bytes, 264),
                mr_seam: at(bytes, 280),
                mr_signer_seam: at(bytes, 328),
                seam_attributes: u64::from_le_bytes(at(bytes, 376)),
                attributes: u64::from_le_bytes(at(bytes, 512)),
                xfam: u64::from_le_bytes(at(bytes, 520)),
                mrtd: at(bytes, 528),
                mr_config_id: at(bytes, 576),
                mr_owner: at(bytes, 624),
                mr_owner_config: at(bytes, 672),
                rtmr: [720, 768, 816, 864].map(|offset| at(bytes, offset)),
                report_data: at(bytes, 128),
                tee_tcb_svn2: (version >= 1).then(|| at(bytes, 384)),
                mr_service_td: (version >= 1).then(|| at(bytes, 912)),
            },
        })
    }
}
