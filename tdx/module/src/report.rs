//! The fields of a TD's report about the module and the platform, and its MAC.
//!
//! Source: TDX module ABI specification, TDREPORT_STRUCT, REPORTMACSTRUCT and TEE_TCB_INFO.

use crate::platform::Platform;
use hmac::digest::KeyInit;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256, Sha384, Sha512};

/// Length of a report.
pub const REPORT_LEN: usize = 1024;
/// REPORTMACSTRUCT up to its MAC.
const MACED: core::ops::Range<usize> = 0..224;
const MAC: core::ops::Range<usize> = 224..256;
/// CPUSVN, TEE_TCB_INFO_HASH, TEE_TCB_INFO.
const CPUSVN: core::ops::Range<usize> = 16..32;
const TCB_INFO_HASH: core::ops::Range<usize> = 32..80;
const TCB_INFO: core::ops::Range<usize> = 256..495;

/// Security versions of the module: minor version 5, major version 1, microcode 4.
pub const TEE_TCB_SVN: [u8; 16] = [5, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Security versions of the processor's parts.
pub const CPU_SVN: [u8; 16] = [3, 3, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0];

/// MRSEAM: the measurement of the software module in its reports.
#[must_use]
pub fn mr_seam() -> [u8; 48] {
    Sha384::digest(b"soft-tdx-module 1.5.05").into()
}

/// TEE_TCB_INFO: which fields are valid, versions, MRSEAM; signer and attributes are zero.
fn tee_tcb_info() -> [u8; 239] {
    const VALID: u64 = 0x301ff;
    let mut info = [0; 239];
    info[..8].copy_from_slice(&VALID.to_le_bytes());
    info[8..24].copy_from_slice(&TEE_TCB_SVN);
    info[24..72].copy_from_slice(&mr_seam());
    info[128..144].copy_from_slice(&TEE_TCB_SVN);
    info
}

/// The key of report MACs, which never leaves a platform.
pub(crate) struct ReportKey([u8; 64]);

impl ReportKey {
    pub(crate) fn new(seed: &[u8; 32]) -> Self {
        let digest = Sha512::new().chain_update(b"report key").chain_update(seed);
        Self(digest.finalize().into())
    }

    fn mac(&self, report: &[u8; REPORT_LEN]) -> Hmac<Sha256> {
        <Hmac<Sha256> as KeyInit>::new(&self.0.into()).chain_update(&report[MACED])
    }

    /// Completes a report whose own part is filled in.
    pub(crate) fn seal(&self, report: &mut [u8; REPORT_LEN]) {
        let info = tee_tcb_info();
        report[CPUSVN].copy_from_slice(&CPU_SVN);
        report[TCB_INFO_HASH].copy_from_slice(&Sha384::digest(info));
        report[TCB_INFO].copy_from_slice(&info);
        let mac = self.mac(report).finalize().into_bytes();
        report[MAC].copy_from_slice(&mac);
    }
}

impl Platform {
    /// Returns true if the MAC of a TD's report is this platform's, as ENCLU\[EVERIFYREPORT2\] tells
    /// an enclave. The MAC covers the first 224 bytes; the rest is covered by the hashes in them, which
    /// the caller compares.
    #[must_use]
    pub fn verify_report(&self, report: &[u8; REPORT_LEN]) -> bool {
        let mac = self.report_key.mac(report);
        mac.verify_slice(&report[MAC]).is_ok()
    }
}
