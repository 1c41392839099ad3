//! Intel's extension of PCK certificates (SGX PCK Certificate and CRL Profile Specification, 1.3).

use x509_cert::der::asn1::{ObjectIdentifier, OctetStringRef};
use x509_cert::der::{Any, Encode, Tag};

use super::super::parts::Result;
use super::Platform;

pub(super) const SGX: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113741.1.13.1");

/// The value of the extension.
pub(super) fn sgx_extension(platform: &Platform) -> Result<Vec<u8>> {
    let octets = |bytes| OctetStringRef::new(bytes)?.to_der();
    let mut tcb = Vec::new();
    for (n, svn) in platform.cpu_svn.iter().enumerate() {
        tcb.push(entry(&format!("2.{}", n + 1), &svn.to_der()?)?);
    }
    tcb.push(entry("2.17", &platform.pce_svn.to_der()?)?);
    tcb.push(entry("2.18", &octets(&platform.cpu_svn)?)?);
    // Dynamic platform, cached keys, SMT.
    let flags = ["7.1", "7.2", "7.3"].map(|arc| entry(arc, &false.to_der()?));
    let flags: Vec<_> = flags.into_iter().collect::<Result<_>>()?;
    // SGX type 1: scalable.
    let scalable = Any::new(Tag::Enumerated, &[1][..])?.to_der()?;
    sequence(&[
        entry("1", &octets(&platform.ppid)?)?,
        entry("2", &sequence(&tcb)?)?,
        entry("3", &octets(&[0, 0])?)?,
        entry("4", &octets(&platform.fmspc)?)?,
        entry("5", &scalable)?,
        entry("6", &octets(&platform.instance_id)?)?,
        entry("7", &sequence(&flags)?)?,
    ])
}

/// SEQUENCE { arc, value }
fn entry(arc: &str, value: &[u8]) -> Result<Vec<u8>> {
    let arc = ObjectIdentifier::new(&format!("{SGX}.{arc}"));
    let arc = arc.map_err(x509_cert::der::Error::from)?;
    sequence(&[arc.to_der()?, value.to_vec()])
}

fn sequence(parts: &[Vec<u8>]) -> Result<Vec<u8>> {
    Ok(Any::new(Tag::Sequence, parts.concat())?.to_der()?)
}
