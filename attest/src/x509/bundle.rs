//! Several certificates in one file.

use x509_cert::der::pem::decode_vec;
use x509_cert::der::{Reader, SliceReader};

use super::{Certificate, X509Error};

/// Most bytes of a bundle that are read.
pub const MAX_BUNDLE: usize = 0x10000;
/// Most certificates of a bundle. A chain has three.
pub const MAX_CERTIFICATES: usize = 8;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Reads certificates that follow one another, as DER or as PEM, in any order.
///
/// # Errors
///
/// No certificate, more than [`MAX_CERTIFICATES`] or [`MAX_BUNDLE`] bytes, or bytes between and
/// after them that are no certificate.
pub fn bundle(bytes: &[u8]) -> Result<Vec<Certificate>, X509Error> {
    if bytes.len() > MAX_BUNDLE {
        return Err(X509Error::TooLong(bytes.len(), MAX_BUNDLE));
    }
    let found = match std::str::from_utf8(bytes) {
        Ok(text) if text.contains(BEGIN) => pem(text)?,
        _ => der(bytes)?,
    };
    if found.is_empty() {
        return Err(X509Error::Empty);
    }
    Ok(found)
}

fn push(found: &mut Vec<Certificate>, der: &[u8]) -> Result<(), X509Error> {
    if found.len() == MAX_CERTIFICATES {
        return Err(X509Error::TooMany(MAX_CERTIFICATES));
    }
    found.push(Certificate::from_der(der)?);
    Ok(())
}

fn der(bytes: &[u8]) -> Result<Vec<Certificate>, X509Error> {
    let mut found = Vec::new();
    let mut reader = SliceReader::new(bytes)?;
    while !reader.is_finished() {
        push(&mut found, reader.tlv_bytes()?)?;
    }
    Ok(found)
}

fn pem(text: &str) -> Result<Vec<Certificate>, X509Error> {
    let mut found = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let end = rest
            .find(END)
            .filter(|_| rest.starts_with(BEGIN))
            .ok_or_else(|| X509Error::Pem("text that is no certificate".into()))?;
        let (block, after) = rest.split_at(end + END.len());
        let (_, der) = decode_vec(block.as_bytes()).map_err(|e| X509Error::Pem(e.to_string()))?;
        push(&mut found, &der)?;
        rest = after.trim_start();
    }
    Ok(found)
}
