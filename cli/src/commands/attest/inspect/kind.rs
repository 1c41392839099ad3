//! Kinds of evidence, told by the bytes.

use kvm_ops_attest::event_log::EventLog;
use kvm_ops_attest::snp::{REPORT_LEN, Report, table};
use kvm_ops_attest::tdx::{SEALED_LEN, SealedReport};
use kvm_ops_attest::x509::{Certificate, Crl};

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    SnpReport,
    Quote,
    SealedReport,
    Certificates,
    Table,
    Crl,
    EventLog,
}

impl Kind {
    /// The kind that the bytes begin as; they may still be refused when they are read.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        // The certain signs first: lengths and magic numbers.
        let known = [
            (Self::EventLog, EventLog::is_log(bytes)),
            (Self::Table, table::is_table(bytes)),
            (
                Self::SnpReport,
                bytes.len() == REPORT_LEN && Report::from_bytes(bytes).is_ok(),
            ),
            (
                Self::SealedReport,
                bytes.len() == SEALED_LEN && SealedReport::from_bytes(bytes).is_ok(),
            ),
            (Self::Quote, is_quote(bytes)),
            (
                Self::Certificates,
                bytes.starts_with(b"-----BEGIN CERTIFICATE-----"),
            ),
            (Self::Crl, Crl::from_der(bytes).is_ok()),
            (Self::Certificates, begins_with_certificate(bytes)),
        ];
        let mut found = known.into_iter().filter(|(_, is)| *is);
        found.next().map(|(kind, _)| kind)
    }

    /// The kind in a sentence.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::SnpReport => "the report of an SNP guest",
            Self::Quote => "the quote of a TD",
            Self::SealedReport => "the report of a TD, for its platform",
            Self::Certificates => "certificates",
            Self::Table => "the certificate table of an extended guest request",
            Self::Crl => "a revocation list",
            Self::EventLog => "the event log of a TD",
        }
    }

    /// The kind in JSON.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::SnpReport => "snp-report",
            Self::Quote => "tdx-quote",
            Self::SealedReport => "tdx-report",
            Self::Certificates => "certificates",
            Self::Table => "certificate-table",
            Self::Crl => "revocation-list",
            Self::EventLog => "event-log",
        }
    }
}

/// Version 4 or 5, attestation key type, TEE type of a TD.
fn is_quote(bytes: &[u8]) -> bool {
    matches!(bytes, [4 | 5, 0, _, _, 0x81, 0, 0, 0, ..])
}

/// One certificate in DER, or several one after another.
fn begins_with_certificate(bytes: &[u8]) -> bool {
    // A SEQUENCE with a length of two bytes.
    let [0x30, 0x82, high, low, ..] = *bytes else {
        return false;
    };
    let length = 4 + usize::from(u16::from_be_bytes([high, low]));
    let first = bytes.get(..length);
    first.is_some_and(|first| Certificate::from_der(first).is_ok())
}

/// What a file is that is no evidence, as far as its first bytes tell.
pub(super) fn describe(bytes: &[u8]) -> String {
    let length = bytes.len();
    let head = bytes.get(..8).unwrap_or(bytes);
    match head {
        [] => "it is empty".to_owned(),
        [b'{' | b'[', ..] => "it looks like JSON".to_owned(),
        [b'C', b'C', b'E', b'L', ..] => {
            "it is the ACPI table CCEL, which only tells where the event log lies".to_owned()
        }
        _ => format!("{length:#x} bytes that begin with {}", hex::encode(head)),
    }
}
