//! One certificate.

use x509_cert::der::Decode;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::name::Name;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use super::X509Error;
use super::signed::Signed;

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
        use x509_cert::der::pem::{LineEnding, encode_string};
        // Fails only for labels and lengths that do not occur.
        encode_string("CERTIFICATE", LineEnding::LF, &self.der).unwrap_or_default()
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

fn common_name(name: &Name) -> String {
    let found = name
        .0
        .iter()
        .flat_map(|part| part.0.iter())
        .find(|attribute| attribute.oid == COMMON_NAME);
    let text = found.map(|attribute| String::from_utf8_lossy(attribute.value.value()));
    text.map(|text| text.into_owned()).unwrap_or_default()
}
