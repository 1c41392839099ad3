//! The parts that the authorities of both vendors' software platforms share.

use std::time::Duration;

use thiserror::Error;
use x509_cert::der::Encode;
use x509_cert::der::asn1::{GeneralizedTime, ObjectIdentifier, OctetString, UtcTime};
use x509_cert::der::oid::AssociatedOid;
use x509_cert::ext::Extension;
use x509_cert::name::Name;
use x509_cert::time::{Time, Validity};

use crate::x509::X509Error;

/// 2020-01-01 and 2049-12-31, in seconds of Unix time: when authorities are valid.
pub(super) const ALWAYS: (u64, u64) = (1_577_836_800, 2_524_521_600);

/// Reasons to issue no certificate.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The key is no point of the curve.
    #[error("the key is no point of the curve")]
    Key,
    /// A date that X.509 cannot hold.
    #[error("{0} seconds of Unix time are no date of a certificate")]
    Date(u64),
    /// A structure that cannot be encoded.
    #[error("cannot encode a certificate")]
    Encode(#[from] x509_cert::der::Error),
    /// A certificate that cannot be read back.
    #[error("cannot read the certificate back")]
    Read(#[from] X509Error),
    /// A key of an authority that cannot sign.
    #[error("an authority cannot sign: {0}")]
    Sign(String),
}

pub(super) type Result<T> = std::result::Result<T, IssueError>;

pub(super) fn plain(
    extn_id: ObjectIdentifier,
    value: Vec<u8>,
) -> x509_cert::der::Result<Extension> {
    Ok(Extension {
        extn_id,
        critical: false,
        extn_value: OctetString::new(value)?,
    })
}

pub(super) fn critical<T: AssociatedOid + Encode>(value: &T) -> Result<Extension> {
    Ok(Extension {
        extn_id: T::OID,
        critical: true,
        extn_value: OctetString::new(value.to_der()?)?,
    })
}

pub(super) fn name(common: &str) -> Result<Name> {
    // The organisation is not AMD's, so that a reader of the certificate sees what it is.
    let text = format!("CN={common},O=kvm-ops software platform,OU=No hardware");
    Ok(text.parse()?)
}

pub(super) fn validity((from, to): (u64, u64)) -> Result<Validity> {
    let time = |seconds: u64| {
        let duration = Duration::from_secs(seconds);
        // UTCTime up to 2049, GeneralizedTime from then on (RFC 5280, 4.1.2.5).
        UtcTime::from_unix_duration(duration)
            .map(Time::UtcTime)
            .or_else(|_| GeneralizedTime::from_unix_duration(duration).map(Time::GeneralTime))
            .map_err(|_| IssueError::Date(seconds))
    };
    Ok(Validity {
        not_before: time(from)?,
        not_after: time(to)?,
    })
}
