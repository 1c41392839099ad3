//! The fields of a quote of a TD.

use kvm_ops_attest::tdx::Quote;

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
    let report = &quote.report;
    let mut fields = Vec::new();
    let mut add = |name, value: String, meaning: String| {
        fields.push(Field {
            name,
            value,
            meaning,
        });
    };
    let none = String::new;
    add("version", quote.version.to_string(), none());
    add("tee tcb svn", hex::encode(report.tee_tcb_svn), none());
    add("mrseam", hex::encode(report.mr_seam), none());
    add("mrsignerseam", hex::encode(report.mr_signer_seam), none());
    add(
        "seam attributes",
        format!("{:#x}", report.seam_attributes),
        none(),
    );
    add(
        "attributes",
        format!("{:#x}", report.attributes),
        bits(report.attributes, &ATTRIBUTES).join(", "),
    );
    add("xfam", format!("{:#x}", report.xfam), none());
    add("mrtd", hex::encode(report.mrtd), none());
    add("mrconfigid", hex::encode(report.mr_config_id), none());
    add("mrowner", hex::encode(report.mr_owner), none());
    add("mrownerconfig", hex::encode(report.mr_owner_config), none());
    let names = ["rtmr0", "rtmr1", "rtmr2", "rtmr3"];
    for (name, value) in names.into_iter().zip(report.rtmr) {
        add(name, hex::encode(value), none());
    }
    add("report data", hex::encode(report.report_data), none());
    if let Some(svn) = report.tee_tcb_svn2 {
        add("tee tcb svn 2", hex::encode(svn), none());
    }
    if let Some(hash) = report.mr_service_td {
        add("mrservicetd", hex::encode(hash), none());
    }
    fields
}
