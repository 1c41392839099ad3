//! The fields of evidence by name, so that a table can say where a bit lies.

use std::ops::Range;

use x509_cert::der::{Decode, Header, Reader, SliceReader};

/// A named range of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) at: Range<usize>,
}

impl Field {
    pub(super) fn new(name: impl Into<String>, at: Range<usize>) -> Self {
        let name = name.into();
        Self { name, at }
    }
}

/// Fields that follow one another, by their first bytes, up to `end`.
pub(super) fn starts(starts: &[(usize, &str)], end: usize) -> Vec<Field> {
    let ends = starts.iter().skip(1).map(|(start, _)| *start).chain([end]);
    let fields = starts.iter().zip(ends);
    fields
        .filter(|((start, _), end)| start < end)
        .map(|((start, name), end)| Field::new(*name, *start..end))
        .collect()
}

/// The fields of a certificate (RFC 5280, 4.1). What is not of that form is one field.
pub(super) fn of_certificate(der: &[u8]) -> Vec<Field> {
    certificate(der).unwrap_or_else(|| vec![Field::new("certificate", 0..der.len())])
}

fn certificate(der: &[u8]) -> Option<Vec<Field>> {
    let outer = element(der, 0)?;
    let body = element(der, outer.contents.start)?;
    let mut fields = vec![
        Field::new("tag and length", 0..outer.contents.start),
        Field::new(
            "tbsCertificate's tag and length",
            outer.contents.start..body.contents.start,
        ),
    ];
    let mut names = [
        "serialNumber",
        "signature (algorithm)",
        "issuer",
        "validity",
        "subject",
        "subjectPublicKeyInfo",
    ]
    .into_iter();
    let mut at = body.contents.start;
    while at < body.contents.end {
        let child = element(der, at)?;
        let name = match der[at] {
            0xa0 => "version",
            0xa3 => "extensions",
            _ => names.next().unwrap_or("unique identifier"),
        };
        fields.push(Field::new(name, at..child.contents.end));
        at = child.contents.end;
    }
    let algorithm = element(der, at)?;
    let signature = element(der, algorithm.contents.end)?;
    fields.push(Field::new("signatureAlgorithm", at..algorithm.contents.end));
    fields.push(Field::new(
        "signatureValue",
        algorithm.contents.end..signature.contents.end,
    ));
    (signature.contents.end == der.len()).then_some(fields)
}

/// An element of DER.
struct Element {
    contents: Range<usize>,
}

fn element(der: &[u8], at: usize) -> Option<Element> {
    let mut reader = SliceReader::new(der.get(at..)?).ok()?;
    let header = Header::decode(&mut reader).ok()?;
    let start = at + usize::try_from(reader.position()).ok()?;
    let end = start.checked_add(usize::try_from(header.length).ok()?)?;
    (end <= der.len()).then_some(Element {
        contents: start..end,
    })
}
