//! SEV certificates: 0x824 bytes with a key and up to two signatures.

use super::{KEY_LEN, PrivateKey, PublicKey, SIGNATURE_LEN};
use crate::wire::{array_at, put, u32_at};

/// Length of a certificate.
pub const CERT_LEN: usize = 0x824;

const VERSION: u32 = 1;
const USAGE: usize = 0x08;
const ALGORITHM: usize = 0x0c;
const KEY: usize = 0x10;
/// Signatures cover everything before the first of them.
const SIGNED: usize = 0x414;
const SIGNATURES: [usize; 2] = [0x414, 0x61c];

/// Purpose of a certificate's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CertUsage {
    /// AMD root key. Real ones are RSA keys in another format.
    Ark = 0x0000,
    /// AMD SEV signing key. Real ones are RSA keys in another format.
    Ask = 0x0013,
    /// Owner's certificate authority.
    Oca = 0x1001,
    /// Platform endorsement key.
    Pek = 0x1002,
    /// Platform Diffie-Hellman key.
    Pdh = 0x1003,
    /// Chip endorsement key.
    Cek = 0x1004,
    /// Versioned chip endorsement key. Real ones are X.509 certificates.
    Vcek = 0x2000,
    /// Versioned loaded endorsement key. Real ones are X.509 certificates, signed by another key
    /// of the vendor than the ASK.
    Vlek = 0x2001,
    /// No certificate, or no signature.
    Invalid = 0x1000,
}

impl CertUsage {
    fn from_number(n: u32) -> Option<Self> {
        use CertUsage::*;
        [Ark, Ask, Oca, Pek, Pdh, Cek, Vcek, Vlek]
            .into_iter()
            .find(|u| *u as u32 == n)
    }
}

/// Algorithm of a key or signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CertAlgorithm {
    /// ECDSA with SHA-256.
    EcdsaSha256 = 0x0002,
    /// ECDH, nominally with SHA-256.
    EcdhSha256 = 0x0003,
    /// ECDSA with SHA-384.
    EcdsaSha384 = 0x0102,
    /// ECDH, nominally with SHA-384.
    EcdhSha384 = 0x0103,
}

/// A certificate in the firmware's layout.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate(Box<[u8; CERT_LEN]>);

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate")
            .field("usage", &self.usage())
            .field("api", &self.api_version())
            .finish_non_exhaustive()
    }
}

impl Certificate {
    /// An unsigned certificate for `key`.
    pub fn new(usage: CertUsage, key: &PublicKey, api_major: u8, api_minor: u8) -> Self {
        let algorithm = match usage {
            CertUsage::Pdh => CertAlgorithm::EcdhSha384,
            _ => CertAlgorithm::EcdsaSha384,
        };
        let mut bytes = Box::new([0; CERT_LEN]);
        put(&mut bytes[..], 0, &VERSION.to_le_bytes());
        bytes[4] = api_major;
        bytes[5] = api_minor;
        put(&mut bytes[..], USAGE, &(usage as u32).to_le_bytes());
        put(&mut bytes[..], ALGORITHM, &(algorithm as u32).to_le_bytes());
        put(&mut bytes[..], KEY, &key.to_bytes());
        for at in SIGNATURES {
            put(
                &mut bytes[..],
                at,
                &(CertUsage::Invalid as u32).to_le_bytes(),
            );
        }
        Self(bytes)
    }

    /// A certificate for a guest owner's Diffie-Hellman key, as LAUNCH_START takes it.
    pub fn for_owner(key: &PublicKey) -> Self {
        Self::new(CertUsage::Pdh, key, 0, 0)
    }

    /// Adds a signature in the first free place; a certificate with two keeps them.
    pub fn signed_by(mut self, signer: CertUsage, key: &PrivateKey) -> Self {
        let signature = key.sign(&self.0[..SIGNED]);
        if let Some(at) = self.free_place() {
            put(&mut self.0[..], at, &(signer as u32).to_le_bytes());
            let algorithm = CertAlgorithm::EcdsaSha384 as u32;
            put(&mut self.0[..], at + 4, &algorithm.to_le_bytes());
            put(&mut self.0[..], at + 8, &signature);
        }
        self
    }

    fn free_place(&self) -> Option<usize> {
        SIGNATURES
            .into_iter()
            .find(|at| u32_at(&self.0[..], *at) == CertUsage::Invalid as u32)
    }

    /// Reads a certificate; `None` unless version, usage and key are understood.
    pub fn from_bytes(bytes: &[u8; CERT_LEN]) -> Option<Self> {
        let cert = Self(Box::new(*bytes));
        cert.usage()?;
        (u32_at(bytes, 0) == VERSION).then_some(())?;
        cert.key()?;
        Some(cert)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; CERT_LEN] {
        &self.0
    }

    /// The purpose of the key.
    pub fn usage(&self) -> Option<CertUsage> {
        CertUsage::from_number(u32_at(&self.0[..], USAGE))
    }

    /// Firmware version of the platform that made the certificate.
    pub fn api_version(&self) -> (u8, u8) {
        (self.0[4], self.0[5])
    }

    /// The certified key; `None` if the bytes are not a point of P-384.
    pub fn key(&self) -> Option<PublicKey> {
        PublicKey::from_bytes(array_at::<KEY_LEN>(&self.0[..], KEY))
    }

    /// Returns true if `signer`'s key signed this certificate.
    pub fn is_signed_by(&self, signer: &Certificate) -> bool {
        let (Some(usage), Some(key)) = (signer.usage(), signer.key()) else {
            return false;
        };
        SIGNATURES.into_iter().any(|at| {
            let bytes = array_at::<SIGNATURE_LEN>(&self.0[..], at + 8);
            let message = &self.0[..SIGNED];
            let algorithm = u32_at(&self.0[..], at + 4);
            u32_at(&self.0[..], at) == usage as u32
                && if algorithm == CertAlgorithm::EcdsaSha384 as u32 {
                    key.verify(message, bytes)
                } else {
                    algorithm == CertAlgorithm::EcdsaSha256 as u32
                        && key.verify_sha256(message, bytes)
                }
        })
    }
}
