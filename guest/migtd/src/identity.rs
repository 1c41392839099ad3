//! The identity of a TD, as its report and its quote say it.

use kvm_ops_guest::tdx::{REPORT_LEN, TdReport};
use thiserror::Error;

/// The identity of a TD and of the TDX module below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// TEE_TCB_SVN: security versions of the TDX module's parts.
    pub tee_tcb_svn: [u8; 16],
    /// MRSEAM: the measurement of the TDX module.
    pub mrseam: [u8; 48],
    /// ATTRIBUTES of the TD.
    pub attributes: u64,
    /// XFAM of the TD.
    pub xfam: u64,
    /// MRTD: the measurement of the launch.
    pub mrtd: [u8; 48],
    /// MRCONFIGID, MROWNER and MROWNERCONFIG, of its host's choice.
    pub measurement_ids: [[u8; 48]; 3],
    /// The four RTMRs.
    pub rtmr: [[u8; 48]; 4],
    /// REPORTDATA: what the TD put in.
    pub report_data: [u8; 64],
}

impl Identity {
    /// The identity in a TDREPORT of this TD.
    pub fn of_report(report: &[u8; REPORT_LEN]) -> Self {
        let report = TdReport::new(report);
        Self {
            tee_tcb_svn: report.tee_tcb_svn(),
            mrseam: report.mrseam(),
            attributes: report.attributes(),
            xfam: report.xfam(),
            mrtd: report.mrtd(),
            measurement_ids: report.measurement_ids(),
            rtmr: report.rtmrs(),
            report_data: report.report_data(),
        }
    }
}

/// The reason why a quote is not believed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Untrusted(pub String);

/// Tells whose quote it is, if it is one that hardware, or a platform that the verifier trusts, has made.
///
/// What the quote says about the TD is for the [`Policy`](crate::Policy) to judge.
pub trait EvidenceVerifier: Send {
    /// Verifies a quote: signatures, chains, revocation and TCB.
    ///
    /// # Errors
    /// [`Untrusted`] with the check that failed.
    fn verify(&mut self, quote: &[u8]) -> Result<Identity, Untrusted>;
}

impl<F: FnMut(&[u8]) -> Result<Identity, Untrusted> + Send> EvidenceVerifier for F {
    fn verify(&mut self, quote: &[u8]) -> Result<Identity, Untrusted> {
        self(quote)
    }
}
