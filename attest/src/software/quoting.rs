//! A quoting service: turns a TD's report into a quote.
//!
//! Source of the format: Intel's *TDX DCAP Quoting Library API*, quote formats 4 and 5.

use p256::ecdsa::signature::Signer;
use p256::ecdsa::{Signature, SigningKey};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::parts::IssueError;
use super::pcs::{Pcs, Platform, qe_signer, qe_svn};
use crate::tdx::{SEALED_LEN, SealedError, SealedReport};
use crate::x509::Certificate;

/// Length of a TD's report, TDREPORT_STRUCT.
pub const TD_REPORT_LEN: usize = SEALED_LEN;
/// Intel's vendor id of quoting enclaves.
const QE_VENDOR: [u8; 16] = [
    0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07,
];

/// The format of a quote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuoteFormat {
    /// Version 4: the body of TDX 1.0.
    V4,
    /// Version 5 with the body of TDX 1.5: also TEE_TCB_SVN2 and the service TDs.
    V5,
}

/// Reasons to make no quote.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QuotingError {
    /// The report is no TDREPORT_STRUCT of a TD.
    #[error("not a report of a TD")]
    Form(#[from] SealedError),
    /// The report's hashes or its MAC do not match.
    #[error("the report was not made on this platform, or was changed")]
    Mac,
    /// The chain could not be made.
    #[error("cannot certify the platform's key")]
    Issue(#[from] IssueError),
}

/// The platform that a report was made on: checks its MAC, as ENCLU\[EVERIFYREPORT2\] does.
pub trait TdReportMac {
    /// Returns true if the MAC over the report's first part is this platform's.
    fn is_valid(&self, report: &[u8; TD_REPORT_LEN]) -> bool;
}

impl<F: Fn(&[u8; TD_REPORT_LEN]) -> bool> TdReportMac for F {
    fn is_valid(&self, report: &[u8; TD_REPORT_LEN]) -> bool {
        self(report)
    }
}

/// A quoting enclave with its attestation key, and the platform's certified key.
///
/// Its keys follow from a seed: with the same seed it is the same enclave on the same platform.
pub struct QuotingService {
    platform: Platform,
    attestation_key: SigningKey,
    pck: SigningKey,
    chain: [Certificate; 3],
}

impl QuotingService {
    /// A service on the default platform.
    pub fn new(seed: [u8; 32]) -> Result<Self, IssueError> {
        Self::on(Platform::default(), seed, None)
    }

    /// A service on another platform, whose PCK certificate is valid for a time in seconds of Unix
    /// time, or from 2020 to 2049.
    pub fn on(
        platform: Platform,
        seed: [u8; 32],
        valid: Option<(u64, u64)>,
    ) -> Result<Self, IssueError> {
        let mut rng = ChaCha20Rng::from_seed(seed);
        let attestation_key = SigningKey::random(&mut rng);
        let pck = SigningKey::random(&mut rng);
        let public = p256::PublicKey::from(*pck.verifying_key());
        let leaf = Pcs.certify(&public, &platform, valid)?;
        Ok(Self {
            chain: [leaf, Pcs.pck_ca()?, Pcs.root()?],
            platform,
            attestation_key,
            pck,
        })
    }

    /// The platform that the quotes are of.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Makes a quote of a report, if the report was made on this platform.
    ///
    /// # Errors
    ///
    /// A report of another type or length, one whose hashes do not match its contents, or whose
    /// MAC is not the platform's.
    pub fn quote(
        &self,
        report: &[u8],
        platform: &impl TdReportMac,
        format: QuoteFormat,
    ) -> Result<Vec<u8>, QuotingError> {
        let sealed = SealedReport::from_bytes(report)?;
        let report: &[u8; TD_REPORT_LEN] = report
            .try_into()
            .map_err(|_| SealedError::Length(report.len()))?;
        if !sealed.hashes_match || !platform.is_valid(report) {
            return Err(QuotingError::Mac);
        }
        Ok(self.sign(&body(report, format), format))
    }

    /// Makes a quote of a body as it is, which no TD has to have said: for tests of verifiers.
    pub fn quote_of_body(&self, body: &[u8], format: QuoteFormat) -> Vec<u8> {
        self.sign(body, format)
    }

    fn sign(&self, body: &[u8], format: QuoteFormat) -> Vec<u8> {
        let mut quote = header(format);
        if format == QuoteFormat::V5 {
            quote.extend_from_slice(&3_u16.to_le_bytes());
            quote.extend_from_slice(&(body.len() as u32).to_le_bytes());
        }
        quote.extend_from_slice(body);
        let signature: Signature = self.attestation_key.sign(&quote);
        let mut auth = signature.to_bytes().to_vec();
        let key = self.attestation_point();
        auth.extend_from_slice(&key);
        let certified = self.certified(&key);
        put_data(&mut auth, 6, &certified);
        quote.extend_from_slice(&(auth.len() as u32).to_le_bytes());
        quote.extend_from_slice(&auth);
        quote
    }

    /// The attestation key's coordinates, without the tag of an uncompressed point.
    fn attestation_point(&self) -> Vec<u8> {
        let point = self.attestation_key.verifying_key().to_encoded_point(false);
        point.as_bytes()[1..].to_vec()
    }

    /// The platform's certification of the attestation key, and the chain of the platform's key.
    fn certified(&self, key: &[u8]) -> Vec<u8> {
        let auth_data: [u8; 32] = std::array::from_fn(|n| n as u8);
        let bound = Sha256::new()
            .chain_update(key)
            .chain_update(auth_data)
            .finalize();
        let report = self.qe_report(&bound);
        let signature: Signature = self.pck.sign(&report);
        let mut out = report.to_vec();
        out.extend_from_slice(&signature.to_bytes());
        out.extend_from_slice(&(auth_data.len() as u16).to_le_bytes());
        out.extend_from_slice(&auth_data);
        let chain: String = self.chain.iter().map(Certificate::to_pem).collect();
        put_data(&mut out, 5, chain.as_bytes());
        out
    }

    /// REPORT of the quoting enclave (SGX, 384 bytes).
    fn qe_report(&self, report_data: &[u8]) -> [u8; 384] {
        let mut report = [0; 384];
        report[..16].copy_from_slice(&self.platform.cpu_svn);
        // ATTRIBUTES: INIT, PROVISION_KEY; XFRM: x87 and SSE.
        report[48] = 0x11;
        report[56] = 0x03;
        let enclave = Sha256::digest("kvm-ops software platform: QE");
        report[64..96].copy_from_slice(&enclave);
        report[128..160].copy_from_slice(&qe_signer());
        report[256] = 2;
        report[258..260].copy_from_slice(&qe_svn().to_le_bytes());
        report[320..352].copy_from_slice(report_data);
        report
    }
}

/// Certification data: its type, its length, and itself.
fn put_data(out: &mut Vec<u8>, kind: u16, data: &[u8]) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&(data.len() as u32).to_le_bytes());
    out.extend_from_slice(data);
}

fn header(format: QuoteFormat) -> Vec<u8> {
    let version: u16 = match format {
        QuoteFormat::V4 => 4,
        QuoteFormat::V5 => 5,
    };
    let mut out = version.to_le_bytes().to_vec();
    // Attestation key: ECDSA on P-256; TEE type: TDX; the next four bytes are reserved.
    out.extend_from_slice(&2_u16.to_le_bytes());
    out.extend_from_slice(&0x81_u32.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&QE_VENDOR);
    out.extend_from_slice(&[0; 20]);
    out
}

/// The body of a quote, gathered from TEE_TCB_INFO (at 256) and TDINFO (at 512) of a report.
fn body(report: &[u8; TD_REPORT_LEN], format: QuoteFormat) -> Vec<u8> {
    let (tcb, info) = (&report[256..495], &report[512..]);
    let parts = [
        &tcb[8..24],       // TEE_TCB_SVN
        &tcb[24..72],      // MRSEAM
        &tcb[72..120],     // MRSIGNERSEAM
        &tcb[120..128],    // ATTRIBUTES of the module
        &info[..16],       // ATTRIBUTES and XFAM
        &info[16..400],    // MRTD, MRCONFIGID, MROWNER, MROWNERCONFIG, RTMR0 to 3
        &report[128..192], // REPORTDATA
    ];
    let mut body = parts.concat();
    if format == QuoteFormat::V5 {
        body.extend_from_slice(&tcb[128..144]); // TEE_TCB_SVN2
        body.extend_from_slice(&info[400..448]); // SERVTD_HASH
    }
    body
}
