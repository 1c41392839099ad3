//! Revocation lists.

use x509_cert::crl::CertificateList;
use x509_cert::der::{Decode, Encode};
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use super::cert::common_name;
use super::signed::Signed;
use super::{Certificate, X509Error};

/// Most bytes of a list that are read.
pub const MAX_CRL: usize = 0x10_0000;

/// A revocation list, and its bytes as they came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crl {
    der: Vec<u8>,
    parsed: CertificateList,
}

impl Crl {
    /// Reads DER; nothing may follow. The signature is not checked here.
    pub fn from_der(der: &[u8]) -> Result<Self, X509Error> {
        if der.len() > MAX_CRL {
            return Err(X509Error::TooLong(der.len(), MAX_CRL));
        }
        Signed::split(der)?;
        Ok(Self {
            der: der.to_vec(),
            parsed: CertificateList::from_der(der)?,
        })
    }

    /// The bytes.
    pub fn as_der(&self) -> &[u8] {
        &self.der
    }

    /// Checks that `key` signed the list, with RSASSA-PSS and SHA-384.
    pub fn verify(&self, key: &SubjectPublicKeyInfoOwned) -> Result<(), X509Error> {
        let inner = self.parsed.tbs_cert_list.signature.to_der()?;
        Signed::split(&self.der)?.verify(&inner, key)
    }

    /// Returns true if the certificate and this list name the same issuer.
    pub fn is_of_issuer_of(&self, certificate: &Certificate) -> bool {
        self.parsed.tbs_cert_list.issuer == certificate.parsed().tbs_certificate.issuer
    }

    /// Returns true if the list has the certificate's serial number.
    pub fn revokes(&self, certificate: &Certificate) -> bool {
        let serial = &certificate.parsed().tbs_certificate.serial_number;
        let list = self.parsed.tbs_cert_list.revoked_certificates.as_deref();
        list.unwrap_or_default()
            .iter()
            .any(|entry| entry.serial_number == *serial)
    }

    /// Common name of the issuer, or an empty text.
    pub fn issuer(&self) -> String {
        common_name(&self.parsed.tbs_cert_list.issuer)
    }

    /// Serial numbers of the revoked certificates, big-endian.
    pub fn revoked(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        let list = self.parsed.tbs_cert_list.revoked_certificates.as_deref();
        let list = list.unwrap_or_default().iter();
        list.map(|entry| entry.serial_number.as_bytes())
    }

    /// When the list was issued, and when the next one is due, in seconds of Unix time.
    pub fn validity(&self) -> (u64, Option<u64>) {
        let list = &self.parsed.tbs_cert_list;
        let seconds = |time: &x509_cert::time::Time| time.to_unix_duration().as_secs();
        (
            seconds(&list.this_update),
            list.next_update.as_ref().map(seconds),
        )
    }
}
