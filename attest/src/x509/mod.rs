//! X.509: certificates, bundles of them, and AMD's revocation lists, read within bounds.
//!
//! Signatures are checked for AMD's chains (RSASSA-PSS with SHA-384). Of Intel's only a root's own
//! is checked here; the chains are left to the crate dcap-qvl.

mod bundle;
mod cert;
#[cfg(feature = "snp")]
mod crl;
#[cfg(feature = "tdx")]
mod ecdsa;
#[cfg(feature = "snp")]
mod pss;
mod signed;

pub use bundle::{MAX_BUNDLE, MAX_CERTIFICATES, bundle};
pub use cert::Certificate;
#[cfg(feature = "snp")]
pub use crl::{Crl, MAX_CRL};

use thiserror::Error;

/// Why a certificate or revocation list is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum X509Error {
    /// The bytes are not DER, or not of the expected structure.
    #[error("not DER of the expected structure: {0}")]
    Der(String),
    /// The text is not PEM.
    #[error("not PEM: {0}")]
    Pem(String),
    /// More bytes than are read.
    #[error("{0:#x} bytes are more than the {1:#x} that are read")]
    TooLong(usize, usize),
    /// More certificates than a chain needs.
    #[error("more than {0} certificates")]
    TooMany(usize),
    /// No certificate at all.
    #[error("no certificate")]
    Empty,
    /// The two places that name the signature algorithm differ (RFC 5280, 4.1.1.2).
    #[error("the signature algorithm outside of what is signed differs from the one inside")]
    AlgorithmsDiffer,
    /// A signature that is not RSASSA-PSS with SHA-384 and a salt of 48 bytes.
    #[error("the signature is not RSASSA-PSS with SHA-384")]
    Algorithm,
    /// A signature that is not ECDSA on P-256 with SHA-256.
    #[error("the signature is not ECDSA on P-256 with SHA-256")]
    NotP256,
    /// The signer's key is not an RSA key of 4096 bits.
    #[error("the signer's key is not an RSA key of 4096 bits")]
    Key,
    /// The signature does not verify.
    #[error("the signature does not verify with the signer's key")]
    Signature,
}

impl From<x509_cert::der::Error> for X509Error {
    fn from(error: x509_cert::der::Error) -> Self {
        Self::Der(error.to_string())
    }
}
