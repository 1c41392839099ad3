//! One certificate.

use sha2::{Digest, Sha256};
use x509_cert::der::asn1::{ObjectIdentifier, UintRef};
use x509_cert::der::{Decode, Reader, SliceReader};
use x509_cert::name::Name;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use super::X509Error;
use super::signed::Signed;

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// A certificate, and its bytes as they came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    der: Vec<u8>,
    parsed: x509_cert::Certificate,
}

impl Certificate {
    /// Reads DER; nothing may follow. Signatures are not checked here.
    pub fn from_der(der: &[u8]) -> Result<Self, X509Error> {
        Signed::split(der)?;
        Ok(Self {
            der: der.to_vec(),
            parsed: x509_cert::Certificate::from_der(der)?,
        })
    }

    /// The bytes.
    pub fn as_der(&self) -> &[u8] {
        &self.der
    }

    /// The certificate as PEM.
    pub fn to_pem(&self) -> String {
        Self::pem_of(&self.der)
    }

    /// PEM of bytes that may be no certificate.
    pub(crate) fn pem_of(der: &[u8]) -> String {
        use x509_cert::der::pem::{LineEnding, encode_string};
        // Fails only for labels and lengths that do not occur.
        encode_string("CERTIFICATE", LineEnding::LF, der).unwrap_or_default()
    }

    /// The parsed fields.
    pub fn parsed(&self) -> &x509_cert::Certificate {
        &self.parsed
    }

    /// Common name of the subject, or an empty text.
    pub fn subject(&self) -> String {
        common_name(&self.parsed.tbs_certificate.subject)
    }

    /// Common name of the issuer, or an empty text.
    pub fn issuer(&self) -> String {
        common_name(&self.parsed.tbs_certificate.issuer)
    }

    /// Serial number, big-endian.
    pub fn serial(&self) -> &[u8] {
        self.parsed.tbs_certificate.serial_number.as_bytes()
    }

    /// SHA-256 of the whole certificate, which verifiers' pages name certificates by.
    pub fn fingerprint(&self) -> [u8; 32] {
        Sha256::digest(&self.der).into()
    }

    /// The kind of the key that is certified, in a few words.
    pub fn key_kind(&self) -> String {
        let key = self.key();
        match key.algorithm.oid {
            RSA => match rsa_bits(key.subject_public_key.raw_bytes()) {
                Some(bits) => format!("RSA of {bits} bits"),
                None => "RSA".to_owned(),
            },
            EC => match curve(key) {
                Some(P256) => "ECDSA on P-256".to_owned(),
                Some(P384) => "ECDSA on P-384".to_owned(),
                _ => "on an elliptic curve".to_owned(),
            },
            other => other.to_string(),
        }
    }

    /// The key that is certified.
    pub fn key(&self) -> &SubjectPublicKeyInfoOwned {
        &self.parsed.tbs_certificate.subject_public_key_info
    }

    /// Returns true if this certificate names `issuer` as its issuer.
    pub fn names_issuer(&self, issuer: &Self) -> bool {
        self.parsed.tbs_certificate.issuer == issuer.parsed.tbs_certificate.subject
    }

    /// Checks that `key` signed the certificate, with RSASSA-PSS and SHA-384.
    #[cfg(feature = "snp")]
    pub fn verify(&self, key: &SubjectPublicKeyInfoOwned) -> Result<(), X509Error> {
        use x509_cert::der::Encode;
        let inner = self.parsed.tbs_certificate.signature.to_der()?;
        Signed::split(&self.der)?.verify(&inner, key)
    }

    /// Checks that the certificate's own key signed it, with ECDSA on P-256 and SHA-256.
    #[cfg(feature = "tdx")]
    pub(crate) fn verify_own_p256(&self) -> Result<(), X509Error> {
        use x509_cert::der::Encode;
        let inner = self.parsed.tbs_certificate.signature.to_der()?;
        Signed::split(&self.der)?.verify_p256(&inner, self.key())
    }

    /// First and last second of validity, in seconds of Unix time.
    pub fn validity(&self) -> (u64, u64) {
        let validity = &self.parsed.tbs_certificate.validity;
        let seconds = |time: &x509_cert::time::Time| time.to_unix_duration().as_secs();
        (seconds(&validity.not_before), seconds(&validity.not_after))
    }

    /// Returns true if the certificate may sign others (basic constraints, RFC 5280, 4.2.1.9).
    pub fn is_authority(&self) -> bool {
        use x509_cert::ext::pkix::BasicConstraints;
        let found = self.parsed.tbs_certificate.get::<BasicConstraints>();
        matches!(found, Ok(Some((_, constraints))) if constraints.ca)
    }
}

/// The curve of a key on a named one (RFC 5480, 2.1.1).
fn curve(key: &SubjectPublicKeyInfoOwned) -> Option<ObjectIdentifier> {
    let parameters = key.algorithm.parameters.as_ref()?;
    parameters.decode_as().ok()
}

/// Bits of the modulus of an RSAPublicKey (RFC 8017, A.1.1).
fn rsa_bits(key: &[u8]) -> Option<usize> {
    let mut reader = SliceReader::new(key).ok()?;
    let modulus = reader.sequence(|reader| {
        let modulus = UintRef::decode(reader)?;
        UintRef::decode(reader)?;
        Ok(modulus.as_bytes().len())
    });
    modulus.ok().map(|bytes| bytes * 8)
}

pub(super) fn common_name(name: &Name) -> String {
    let found = name
        .0
        .iter()
        .flat_map(|part| part.0.iter())
        .find(|attribute| attribute.oid == COMMON_NAME);
    let text = found.map(|attribute| String::from_utf8_lossy(attribute.value.value()));
    text.map(|text| text.into_owned()).unwrap_or_default()
}
