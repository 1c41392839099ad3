//! The fields of quotes and reports of TDs.

use kvm_ops_attest::tdx::{Quote, SealedReport, TdReport};

use super::{Field, bits};

/// Bits of ATTRIBUTES (TDX module ABI specification).
const ATTRIBUTES: [(u64, &str); 7] = [
    (1, "DEBUG"),
    (1 << 27, "LASS"),
    (1 << 28, "SEPT_VE_DISABLE"),
    (1 << 29, "MIGRATABLE"),
    (1 << 30, "PKS"),
    (1 << 31, "KL"),
    (1 << 63, "PERFMON"),
];

/// Every field in the order of the quote.
pub(in super::super) fn of_quote(quote: &Quote) -> Vec<Field> {
    let mut fields = vec![Field::plain("version", quote.version.to_string())];
    add_report(&mut fields, &quote.report);
    fields
}

/// Every field of a report for the platform.
pub(in super::super) fn of_sealed(sealed: &SealedReport) -> Vec<Field> {
    let hashes = if sealed.hashes_match {
        "match"
    } else {
        "do not match"
    };
    let mut fields = vec![
        Field::plain("version", sealed.version.to_string()),
        Field::plain("subtype", sealed.subtype.to_string()),
        Field::plain("cpu svn", hex::encode(sealed.cpu_svn)),
        Field::plain("mac", hex::encode(sealed.mac)),
        Field::plain("hashes of the parts", hashes),
    ];
    add_report(&mut fields, &sealed.report);
    fields
}

fn add_report(fields: &mut Vec<Field>, report: &TdReport) {
    let mut add = |name, value: String| fields.push(Field::plain(name, value));
    add("tee tcb svn", hex::encode(report.tee_tcb_svn));
    add("mrseam", hex::encode(report.mr_seam));
    add("mrsignerseam", hex::encode(report.mr_signer_seam));
    add("seam attributes", format!("{:#x}", report.seam_attributes));
    fields.push(Field {
        name: "attributes",
        value: format!("{:#x}", report.attributes),
        meaning: bits(report.attributes, &ATTRIBUTES).join(", "),
    });
    let mut add = |name, value: String| fields.push(Field::plain(name, value));
    add("xfam", format!("{:#x}", report.xfam));
    add("mrtd", hex::encode(report.mrtd));
    add("mrconfigid", hex::encode(report.mr_config_id));
    add("mrowner", hex::encode(report.mr_owner));
    add("mrownerconfig", hex::encode(report.mr_owner_config));
    let names = ["rtmr0", "rtmr1", "rtmr2", "rtmr3"];
    for (name, value) in names.into_iter().zip(report.rtmr) {
        add(name, hex::encode(value));
    }
    add("report data", hex::encode(report.report_data));
    if let Some(svn) = report.tee_tcb_svn2 {
        add("tee tcb svn 2", hex::encode(svn));
    }
    if let Some(hash) = report.mr_service_td {
        add("mrservicetd", hex::encode(hash));
    }
}
