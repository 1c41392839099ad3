//! The outer structure that certificates and revocation lists share, taken apart without a copy.

use x509_cert::der::asn1::BitStringRef;
use x509_cert::der::{Decode, Reader, SliceReader};

use super::X509Error;

/// The signed part of a DER structure, the algorithm and the signature.
///
/// The signed part is kept as it came: encoding it again could repair what a forger changed.
#[cfg_attr(not(feature = "snp"), allow(dead_code))] // Quotes' chains are verified elsewhere.
pub(super) struct Signed<'a> {
    pub(super) body: &'a [u8],
    pub(super) algorithm: &'a [u8],
    pub(super) signature: &'a [u8],
}

impl<'a> Signed<'a> {
    /// Splits `SEQUENCE { body, algorithm, BIT STRING }`; nothing may follow it.
    pub(super) fn split(der: &'a [u8]) -> Result<Self, X509Error> {
        let mut reader = SliceReader::new(der)?;
        let signed = reader.sequence(|reader| {
            let body = reader.tlv_bytes()?;
            let algorithm = reader.tlv_bytes()?;
            let signature = BitStringRef::decode(reader)?;
            Ok((body, algorithm, signature))
        });
        let (body, algorithm, signature) = signed?;
        reader.finish(())?;
        let signature = signature
            .as_bytes()
            .ok_or_else(|| X509Error::Der("a signature of a broken number of bytes".into()))?;
        Ok(Self {
            body,
            algorithm,
            signature,
        })
    }
}
