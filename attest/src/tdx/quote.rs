//! The contents of a quote (Intel TDX DCAP quoting library API, quote formats 4 and 5).

use dcap_qvl::quote::{AuthData, Quote as Parsed, Report};
use thiserror::Error;

/// Most bytes of a quote that are read.
pub const MAX_QUOTE: usize = 0x10000;
const HEADER: usize = 48;
const TEE_TDX: u32 = 0x81;

/// The bytes are no quote of a TD.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum QuoteError {
    #[error("{0:#x} bytes are more than the {MAX_QUOTE:#x} that are read")]
    TooLong(usize),
    #[error("not of the form of a quote: {0}")]
    Form(String),
    #[error("the quote is of version {0}; those of TDs are 4 and 5")]
    Version(u16),
    #[error("the quote is of TEE type {0:#x}, not of a TD ({TEE_TDX:#x})")]
    TeeType(u32),
    #[error("{0:#x} bytes behind the quote are not all zero")]
    Tail(usize),
}

/// The part of a quote about the TD and the TDX module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TdReport {
    /// Security versions of the TDX module's parts.
    pub tee_tcb_svn: [u8; 16],
    /// Measurement of the TDX module.
    pub mr_seam: [u8; 48],
    /// Signer of the TDX module; zeros for Intel's.
    pub mr_signer_seam: [u8; 48],
    /// Attributes of the TDX module.
    pub seam_attributes: u64,
    /// ATTRIBUTES of the TD.
    pub attributes: u64,
    /// XFAM of the TD.
    pub xfam: u64,
    /// Build-time measurement.
    pub mrtd: [u8; 48],
    /// MRCONFIGID, of the host's choice.
    pub mr_config_id: [u8; 48],
    /// MROWNER, of the host's choice.
    pub mr_owner: [u8; 48],
    /// MROWNERCONFIG, of the host's choice.
    pub mr_owner_config: [u8; 48],
    /// Run-time measurements.
    pub rtmr: [[u8; 48]; 4],
    /// Data of the TD's choice.
    pub report_data: [u8; 64],
    /// Security versions after an update under running TDs; TD 1.5 reports.
    pub tee_tcb_svn2: Option<[u8; 16]>,
    /// Hash of the service TDs that are bound; TD 1.5 reports.
    pub mr_service_td: Option<[u8; 48]>,
}

/// A quote in its parts.
#[derive(Clone, Debug)]
pub struct Quote {
    /// Version of the format: 4 or 5.
    pub version: u16,
    /// The report of the TD.
    pub report: TdReport,
    /// Certificates of the PCK chain in DER, the PCK's own first; empty if the quote has none.
    pub pck_chain: Vec<Vec<u8>>,
    /// Length of what the attestation key signed.
    pub signed_len: usize,
}

impl Quote {
    /// Reads a quote. Nothing but its form is checked.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, QuoteError> {
        if bytes.len() > MAX_QUOTE {
            return Err(QuoteError::TooLong(bytes.len()));
        }
        let parsed = Parsed::parse(bytes).map_err(|e| QuoteError::Form(format!("{e:#}")))?;
        let header = &parsed.header;
        if header.tee_type != TEE_TDX {
            return Err(QuoteError::TeeType(header.tee_type));
        }
        if !matches!(header.version, 4 | 5) {
            return Err(QuoteError::Version(header.version));
        }
        let report = td_report(&parsed.report)
            .ok_or_else(|| QuoteError::Form("the body is no TD report".into()))?;
        let length = check_parts(&parsed.auth_data)?;
        check_tail(bytes, parsed.signed_length(), length)?;
        Ok(Self {
            version: header.version,
            report,
            pck_chain: dcap_qvl::intel::extract_cert_chain(&parsed).unwrap_or_default(),
            signed_len: parsed.signed_length(),
        })
    }
}

/// Types and lengths of the parts of the signature data are not signed, so they must fit exactly. The
/// length of all parts.
fn check_parts(auth: &AuthData) -> Result<usize, QuoteError> {
    let AuthData::V4(auth) = auth else {
        return Err(QuoteError::Form("signature data of another version".into()));
    };
    let inner = &auth.qe_report_data;
    let types = (
        auth.certification_data.cert_type,
        inner.certification_data.cert_type,
    );
    // 6: report of the quoting enclave; 5: the chain of its certificate, as PEM.
    if types != (6, 5) {
        let (outer, inner) = types;
        let what = format!("certification data of the types {outer} and {inner}, not 6 and 5");
        return Err(QuoteError::Form(what));
    }
    let used = inner.qe_report.len()
        + inner.qe_report_signature.len()
        + (2 + inner.qe_auth_data.data.len())
        + (6 + inner.certification_data.body.data.len());
    match used == auth.certification_data.body.data.len() {
        true => Ok(auth.ecdsa_signature.len() + auth.ecdsa_attestation_key.len() + 6 + used),
        false => Err(QuoteError::Form(
            "bytes within the signature data that are no part".into(),
        )),
    }
}

/// Quoting services pad quotes with zeros; anything else behind one is refused.
fn check_tail(bytes: &[u8], signed: usize, parts: usize) -> Result<(), QuoteError> {
    let short = || QuoteError::Form("the signature's length lies outside".into());
    let rest = bytes.get(signed.max(HEADER)..).ok_or_else(short)?;
    let (length, rest) = rest.split_first_chunk().ok_or_else(short)?;
    let length = u32::from_le_bytes(*length) as usize;
    if length != parts {
        let what = format!("signature data of {length:#x} bytes with parts of {parts:#x}");
        return Err(QuoteError::Form(what));
    }
    let tail = rest.get(length..).ok_or_else(short)?;
    match tail.iter().all(|byte| *byte == 0) {
        true => Ok(()),
        false => Err(QuoteError::Tail(tail.len())),
    }
}

fn td_report(report: &Report) -> Option<TdReport> {
    let td = report.as_td10()?;
    let newer = report.as_td15();
    Some(TdReport {
        tee_tcb_svn: td.tee_tcb_svn,
        mr_seam: td.mr_seam,
        mr_signer_seam: td.mr_signer_seam,
        seam_attributes: u64::from_le_bytes(td.seam_attributes),
        attributes: u64::from_le_bytes(td.td_attributes),
        xfam: u64::from_le_bytes(td.xfam),
        mrtd: td.mr_td,
        mr_config_id: td.mr_config_id,
        mr_owner: td.mr_owner,
        mr_owner_config: td.mr_owner_config,
        rtmr: [td.rt_mr0, td.rt_mr1, td.rt_mr2, td.rt_mr3],
        report_data: td.report_data,
        tee_tcb_svn2: newer.map(|newer| newer.tee_tcb_svn2),
        mr_service_td: newer.map(|newer| newer.mr_service_td),
    })
}
