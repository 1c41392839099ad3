//! Attestation reports and their verification.

use crate::builder::TcbVersion;
use crate::crypto::{CERT_LEN, CertUsage, Certificate, SIGNATURE_LEN};
use crate::wire::{array_at, copy_at, put, u32_at, u64_at};
use thiserror::Error;

/// Report of an SEV or SEV-ES guest, signed by the platform endorsement key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LegacyReport {
    /// Nonce of the one who asked.
    pub mnonce: [u8; 16],
    /// Launch digest; zeros for a guest that was received.
    pub launch_digest: [u8; 32],
    /// Policy of the guest.
    pub policy: u32,
    /// R and S, 72 bytes each, little-endian.
    pub signature: [u8; 144],
}

impl LegacyReport {
    /// Length in bytes.
    pub const LEN: usize = 0xd0;

    /// The bytes that are signed.
    pub fn signed_bytes(&self) -> [u8; 0x34] {
        let mut out = [0; 0x34];
        out[..0x10].copy_from_slice(&self.mnonce);
        out[0x10..0x30].copy_from_slice(&self.launch_digest);
        out[0x30..].copy_from_slice(&self.policy.to_le_bytes());
        out
    }

    /// The report as ATTESTATION writes it.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        put(&mut out, 0, &self.signed_bytes());
        put(&mut out, 0x34, &(CertUsage::Pek as u32).to_le_bytes());
        let algorithm = crate::crypto::CertAlgorithm::EcdsaSha384 as u32;
        put(&mut out, 0x38, &algorithm.to_le_bytes());
        put(&mut out, 0x40, &self.signature);
        out
    }

    /// Reads a report; nothing is checked yet.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        Self {
            mnonce: copy_at(bytes, 0),
            launch_digest: copy_at(bytes, 0x10),
            policy: u32_at(bytes, 0x30),
            signature: copy_at(bytes, 0x40),
        }
    }

    /// Returns true if the report was signed with the key of this certificate.
    pub fn is_signed_by(&self, pek: &Certificate) -> bool {
        let mut signature = [0; SIGNATURE_LEN];
        signature[..144].copy_from_slice(&self.signature);
        pek.usage() == Some(CertUsage::Pek)
            && pek
                .key()
                .is_some_and(|k| k.verify(&self.signed_bytes(), &signature))
    }
}

/// Key that signed an SNP report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SigningKey {
    Vcek,
    Vlek,
    None,
    Other(u8),
}

impl SigningKey {
    fn number(self) -> u32 {
        match self {
            SigningKey::Vcek => 0,
            SigningKey::Vlek => 1,
            SigningKey::None => 7,
            SigningKey::Other(n) => (n & 7).into(),
        }
    }

    fn from_number(n: u32) -> Self {
        match n & 7 {
            0 => SigningKey::Vcek,
            1 => SigningKey::Vlek,
            7 => SigningKey::None,
            n => SigningKey::Other(n as u8),
        }
    }
}

/// Attestation report of an SNP guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Version of the layout.
    pub version: u32,
    /// Security version of the guest, from its ID block.
    pub guest_svn: u32,
    /// Policy of the guest.
    pub policy: u64,
    /// Family, from its ID block.
    pub family_id: [u8; 16],
    /// Image, from its ID block.
    pub image_id: [u8; 16],
    /// VMPL the report was made for.
    pub vmpl: u32,
    /// Security version of the platform.
    pub current_tcb: TcbVersion,
    /// Bit 0 SMT, 3 RAPL disabled, 4 ciphertext hiding.
    pub platform_info: u64,
    /// True if the report has the digest of an author key.
    pub author_key_enabled: bool,
    /// True if the host asked not to sign.
    pub mask_chip_key: bool,
    /// Key that signed.
    pub signing_key: SigningKey,
    /// Data of the guest's choice.
    pub report_data: [u8; 64],
    /// Launch digest.
    pub measurement: [u8; 48],
    /// Data of the host's choice.
    pub host_data: [u8; 32],
    /// SHA-384 of the ID key.
    pub id_key_digest: [u8; 48],
    /// SHA-384 of the author key.
    pub author_key_digest: [u8; 48],
    /// Identity of this guest instance.
    pub report_id: [u8; 32],
    /// Identity of its migration agent; all ones without one.
    pub report_id_ma: [u8; 32],
    /// Security version whose key signed.
    pub reported_tcb: TcbVersion,
    /// CPUID family, model and stepping; from version 3 on.
    pub cpuid_fms: Option<(u8, u8, u8)>,
    /// Identity of the chip; zeros if masked.
    pub chip_id: [u8; 64],
    /// Security version the platform cannot go behind.
    pub committed_tcb: TcbVersion,
    /// Version of the firmware: major, minor, build.
    pub current_version: (u8, u8, u8),
    /// Committed version of the firmware.
    pub committed_version: (u8, u8, u8),
    /// Security version at launch.
    pub launch_tcb: TcbVersion,
}

impl Report {
    /// Length in bytes.
    pub const LEN: usize = 0x4a0;
    /// Length of the part that is signed; the signature follows.
    pub const SIGNED: usize = 0x2a0;
    /// SIG_ALGO: ECDSA on P-384 with SHA-384.
    const ALGORITHM: u32 = 1;

    /// The report without signature.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        let flags = u32::from(self.author_key_enabled)
            | u32::from(self.mask_chip_key) << 1
            | self.signing_key.number() << 2;
        let version = |(major, minor, build): (u8, u8, u8)| [build, minor, major];
        let mut set = |at: usize, bytes: &[u8]| put(&mut out, at, bytes);
        set(0x000, &self.version.to_le_bytes());
        set(0x004, &self.guest_svn.to_le_bytes());
        set(0x008, &self.policy.to_le_bytes());
        set(0x010, &self.family_id);
        set(0x020, &self.image_id);
        set(0x030, &self.vmpl.to_le_bytes());
        set(0x034, &Self::ALGORITHM.to_le_bytes());
        set(0x038, &self.current_tcb.0.to_le_bytes());
        set(0x040, &self.platform_info.to_le_bytes());
        set(0x048, &flags.to_le_bytes());
        set(0x050, &self.report_data);
        set(0x090, &self.measurement);
        set(0x0c0, &self.host_data);
        set(0x0e0, &self.id_key_digest);
        set(0x110, &self.author_key_digest);
        set(0x140, &self.report_id);
        set(0x160, &self.report_id_ma);
        set(0x180, &self.reported_tcb.0.to_le_bytes());
        if let Some((family, model, stepping)) = self.cpuid_fms {
            set(0x188, &[family, model, stepping]);
        }
        set(0x1a0, &self.chip_id);
        set(0x1e0, &self.committed_tcb.0.to_le_bytes());
        set(0x1e8, &version(self.current_version));
        set(0x1ec, &version(self.committed_version));
        set(0x1f0, &self.launch_tcb.0.to_le_bytes());
        out
    }

    /// Reads a report; nothing is checked yet.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let flags = u32_at(bytes, 0x48);
        let tcb = |at| TcbVersion(u64_at(bytes, at));
        let version = |at: usize| (bytes[at + 2], bytes[at + 1], bytes[at]);
        let layout = u32_at(bytes, 0);
        Self {
            version: layout,
            guest_svn: u32_at(bytes, 4),
            policy: u64_at(bytes, 8),
            family_id: copy_at(bytes, 0x10),
            image_id: copy_at(bytes, 0x20),
            vmpl: u32_at(bytes, 0x30),
            current_tcb: tcb(0x38),
            platform_info: u64_at(bytes, 0x40),
            author_key_enabled: flags & 1 != 0,
            mask_chip_key: flags & 2 != 0,
            signing_key: SigningKey::from_number(flags >> 2),
            report_data: copy_at(bytes, 0x50),
            measurement: copy_at(bytes, 0x90),
            host_data: copy_at(bytes, 0xc0),
            id_key_digest: copy_at(bytes, 0xe0),
            author_key_digest: copy_at(bytes, 0x110),
            report_id: copy_at(bytes, 0x140),
            report_id_ma: copy_at(bytes, 0x160),
            reported_tcb: tcb(0x180),
            cpuid_fms: (layout >= 3).then(|| (bytes[0x188], bytes[0x189], bytes[0x18a])),
            chip_id: copy_at(bytes, 0x1a0),
            committed_tcb: tcb(0x1e0),
            current_version: version(0x1e8),
            committed_version: version(0x1ec),
            launch_tcb: tcb(0x1f0),
        }
    }
}

/// The certificates that lead from a report to the vendor's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertChain {
    /// Key that signs reports: a VCEK, or a VLEK.
    pub vcek: Certificate,
    /// Vendor's signing key.
    pub ask: Certificate,
    /// Vendor's root.
    pub ark: Certificate,
}

impl CertChain {
    /// Length of [`to_bytes`](Self::to_bytes).
    pub const LEN: usize = 3 * CERT_LEN;

    /// The three certificates one after another.
    pub fn to_bytes(&self) -> Vec<u8> {
        let certs = [&self.vcek, &self.ask, &self.ark];
        certs.into_iter().flat_map(|c| *c.as_bytes()).collect()
    }

    /// Reads them back; signatures are checked by [`verify_report`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, VerifyError> {
        if bytes.len() != Self::LEN {
            return Err(VerifyError::ChainLength(bytes.len()));
        }
        let cert = |i: usize, usage| {
            Certificate::from_bytes(array_cert(bytes, i))
                .filter(|c| c.usage() == Some(usage))
                .ok_or(VerifyError::Certificate(usage))
        };
        Ok(Self {
            vcek: cert(0, CertUsage::Vcek).or_else(|_| cert(0, CertUsage::Vlek))?,
            ask: cert(1, CertUsage::Ask)?,
            ark: cert(2, CertUsage::Ark)?,
        })
    }
}

fn array_cert(bytes: &[u8], index: usize) -> &[u8; CERT_LEN] {
    static EMPTY: [u8; CERT_LEN] = [0; CERT_LEN];
    let at = index * CERT_LEN;
    bytes
        .get(at..at + CERT_LEN)
        .and_then(|b| b.try_into().ok())
        .unwrap_or(&EMPTY)
}

/// Errors of verifying a report.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The report has another length.
    #[error("a report has {expected:#x} bytes, not {0:#x}", expected = Report::LEN)]
    ReportLength(usize),
    /// The certificate chain has another length.
    #[error("a certificate chain has {expected:#x} bytes, not {0:#x}", expected = CertChain::LEN)]
    ChainLength(usize),
    /// A certificate cannot be read, or is for another use.
    #[error("the {0:?} certificate is not valid")]
    Certificate(CertUsage),
    /// A certificate is not signed by the one above it.
    #[error("the {0:?} certificate is not signed by the one above it")]
    Chain(CertUsage),
    /// The chain ends at a root that is not trusted.
    #[error("the chain does not end at the trusted root")]
    Root,
    /// The report was not signed at all, at the host's request.
    #[error("the report is not signed")]
    Unsigned,
    /// The report names an algorithm or key that is not supported.
    #[error("the report is signed in an unsupported way")]
    Algorithm,
    /// The signature is not that of the chain's key.
    #[error("the report's signature does not verify")]
    Signature,
}

/// Checks a report against a certificate chain, and the chain against a root that is trusted.
///
/// The chain is in the layout of the SEV API, and says nothing about TCB and chip: evidence for
/// others has X.509 certificates instead, as hardware's has.
///
/// The report's contents are returned for the caller to judge: policy, measurement, report data and
/// security version are not compared with anything.
pub fn verify_report(
    report: &[u8],
    chain: &CertChain,
    trusted_root: &Certificate,
) -> Result<Report, VerifyError> {
    let bytes: &[u8; Report::LEN] = report
        .try_into()
        .map_err(|_| VerifyError::ReportLength(report.len()))?;
    let parsed = Report::from_bytes(bytes);
    if chain.ark.key().is_none() || chain.ark.key() != trusted_root.key() {
        return Err(VerifyError::Root);
    }
    for (cert, signer) in [
        (&chain.ark, &chain.ark),
        (&chain.ask, &chain.ark),
        (&chain.vcek, &chain.ask),
    ] {
        if !cert.is_signed_by(signer) {
            return Err(VerifyError::Chain(
                cert.usage().unwrap_or(CertUsage::Invalid),
            ));
        }
    }
    let usage = match parsed.signing_key {
        SigningKey::Vcek => CertUsage::Vcek,
        SigningKey::Vlek => CertUsage::Vlek,
        SigningKey::None => return Err(VerifyError::Unsigned),
        SigningKey::Other(_) => return Err(VerifyError::Algorithm),
    };
    if u32_at(bytes, 0x34) != Report::ALGORITHM {
        return Err(VerifyError::Algorithm);
    }
    if chain.vcek.usage() != Some(usage) {
        return Err(VerifyError::Certificate(usage));
    }
    let signature = array_at::<SIGNATURE_LEN>(bytes, Report::SIGNED);
    // R and S fill 144 bytes; what is behind them must be zero, or one report had many forms.
    if signature[144..].iter().any(|byte| *byte != 0) {
        return Err(VerifyError::Signature);
    }
    let vcek = chain.vcek.key().ok_or(VerifyError::Certificate(usage))?;
    if !vcek.verify(&bytes[..Report::SIGNED], signature) {
        return Err(VerifyError::Signature);
    }
    Ok(parsed)
}
