//! Certificates, tables of them, and revocation lists.

use std::time::{Duration, SystemTime};

use kvm_ops_attest::snp::Endorsement;
use kvm_ops_attest::snp::table::{self, EntryKind};
use kvm_ops_attest::x509::{Certificate, Crl, bundle};
use serde_json::{Map, Value};

use super::super::fields::{self, Field};
use super::{Shown, of_fields, text_of};

/// Most serial numbers of a revocation list that are shown.
const SERIALS: usize = 64;

/// Certificates in DER or PEM, one after another.
pub(super) fn of_bundle(bytes: &[u8]) -> Result<Shown, String> {
    let found = bundle(bytes).map_err(|error| error.to_string())?;
    Ok(several(found.iter().map(|certificate| (None, certificate))))
}

/// A chain as a quote has it.
pub(super) fn of_chain(chain: &[Vec<u8>]) -> Result<Shown, String> {
    let read = |der: &Vec<u8>| Certificate::from_der(der).map_err(|error| error.to_string());
    let chain: Vec<_> = chain.iter().map(read).collect::<Result<_, _>>()?;
    Ok(several(chain.iter().map(|certificate| (None, certificate))))
}

/// The certificate table of an extended guest request; a revocation list in it comes last.
pub(super) fn of_table(bytes: &[u8]) -> Result<Shown, String> {
    let (mut certificates, mut lists) = (Vec::new(), Vec::new());
    for (kind, data) in table::read(bytes)? {
        if kind == EntryKind::Crl {
            lists.push(of_crl(data)?);
            continue;
        }
        let found = bundle(data).map_err(|error| format!("its {}: {error}", entry(kind)))?;
        certificates.extend(found.into_iter().map(|certificate| (kind, certificate)));
    }
    let named = certificates.iter();
    let mut shown = several(named.map(|(kind, certificate)| (Some(entry(*kind)), certificate)));
    lists.into_iter().for_each(|list| shown.append(list));
    Ok(shown)
}

const fn entry(kind: EntryKind) -> &'static str {
    match kind {
        EntryKind::Vcek => "VCEK",
        EntryKind::Vlek => "VLEK",
        EntryKind::Ask => "ASK",
        EntryKind::Ark => "ARK",
        EntryKind::Crl => "CRL",
    }
}

/// A revocation list of AMD's.
pub(super) fn of_crl(bytes: &[u8]) -> Result<Shown, String> {
    let list = Crl::from_der(bytes).map_err(|error| error.to_string())?;
    let (from, next) = list.validity();
    let mut fields = vec![
        Field::plain("issuer", list.issuer()),
        Field::plain("issued", date(from)),
        Field::plain("next list", next.map_or("not said".to_owned(), date)),
    ];
    let serials = list.revoked();
    fields.push(Field::plain("revoked", serials.len().to_string()));
    for serial in serials.take(SERIALS) {
        fields.push(Field::plain("revoked serial", hex::encode(serial)));
    }
    let Shown { text, json } = of_fields(&fields);
    let json = json
        .into_iter()
        .map(|(_, says)| ("revocation_list".to_owned(), says));
    Ok(Shown {
        text,
        json: json.collect(),
    })
}

/// A table of fields for each certificate, with the name of its place if it has one.
fn several<'a>(
    certificates: impl Iterator<Item = (Option<&'static str>, &'a Certificate)>,
) -> Shown {
    let (mut texts, mut values) = (Vec::new(), Vec::new());
    for (place, certificate) in certificates {
        let mut fields: Vec<_> = place
            .map(|name| Field::plain("entry", name))
            .into_iter()
            .collect();
        fields.extend(of_certificate(certificate));
        texts.push(text_of(&fields));
        values.push(Value::Object(fields::json(&fields)));
    }
    Shown {
        text: texts.join("\n\n"),
        json: Map::from_iter([("certificates".to_owned(), Value::Array(values))]),
    }
}

fn of_certificate(certificate: &Certificate) -> Vec<Field> {
    let (from, to) = certificate.validity();
    let authority = if certificate.is_authority() {
        "yes"
    } else {
        "no"
    };
    let mut fields = vec![
        Field::plain("subject", certificate.subject()),
        Field::plain("issuer", certificate.issuer()),
        Field::plain("serial", hex::encode(certificate.serial())),
        Field::plain("valid from", date(from)),
        Field::plain("valid to", date(to)),
        Field::plain("authority", authority),
        Field::plain("key", certificate.key_kind()),
        Field::plain("sha256", hex::encode(certificate.fingerprint())),
    ];
    // Others than those of VCEKs and VLEKs have no such extensions.
    if let Ok(endorsement) = Endorsement::of(certificate) {
        fields.push(Field::plain("product", endorsement.product.name()));
        fields.push(Field::plain("tcb", endorsement.tcb.to_string()));
        let chip = endorsement
            .hwid
            .map(|chip| Field::plain("chip id", hex::encode(chip)));
        let provider = endorsement
            .csp_id
            .map(|name| Field::plain("provider", name));
        fields.extend(chip.into_iter().chain(provider));
    }
    fields
}

/// A time in seconds of Unix time, as a date. Years beyond 9999 stay numbers.
fn date(seconds: u64) -> String {
    const YEAR_10000: u64 = 253_402_300_800;
    if seconds >= YEAR_10000 {
        return format!("{seconds} s of Unix time");
    }
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    humantime::format_rfc3339_seconds(time).to_string()
}
