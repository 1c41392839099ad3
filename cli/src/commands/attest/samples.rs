//! `kvm-ops attest samples`: evidence for the tests of verifiers.

use std::fs;
use std::path::Path;

use kvm_ops_attest::snp::{Expected, Product};
use kvm_ops_attest::software::samples::{
    Sample, TIME, expected_of_quotes, expected_of_report, expected_of_reports, quotes, reports,
};
use kvm_ops_attest::software::{IssueError, Kds, Pcs};
use serde_json::{Value, json};

use super::args::SamplesArgs;
use super::files::write_new;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::term;

pub(super) fn run(args: &SamplesArgs) -> Outcome {
    let directory = &args.directory;
    fs::create_dir(directory).map_err(|error| {
        Failure::because(format!("cannot create {}", directory.display()), error)
            .hint("name a directory that does not exist")
    })?;
    let refuse = |error: IssueError| Failure::because("cannot make the samples", error);
    let (reports, quotes) = (reports().map_err(refuse)?, quotes().map_err(refuse)?);
    for (name, root) in roots().map_err(refuse)? {
        write_new(&directory.join(name), root.as_bytes())?;
    }
    let mut entries = Vec::new();
    for (technology, samples) in [("snp", &reports), ("tdx", &quotes)] {
        for sample in samples {
            entries.push(write(directory, technology, sample)?);
        }
    }
    let manifest = manifest(&entries);
    let text = format!("{manifest:#}\n");
    write_new(&directory.join("manifest.json"), text.as_bytes())?;
    if args.json {
        term::say_json(&manifest)?;
        return Ok(Code::Fine);
    }
    let bad = |samples: &[Sample]| samples.iter().filter(|s| s.fails.is_some()).count();
    term::say(format!(
        "{}: {} reports of SNP guests, {} of them bad, and {} quotes of TDs, {} of them bad",
        directory.display(),
        reports.len(),
        bad(&reports),
        quotes.len(),
        bad(&quotes),
    ))?;
    Ok(Code::Fine)
}

fn roots() -> Result<[(&'static str, String); 4], IssueError> {
    Ok([
        ("ark-milan.pem", Kds::new(Product::Milan).ark()?.to_pem()),
        ("ark-genoa.pem", Kds::new(Product::Genoa).ark()?.to_pem()),
        ("ark-turin.pem", Kds::new(Product::Turin).ark()?.to_pem()),
        ("sgx-root-ca.pem", Pcs.root()?.to_pem()),
    ])
}

/// Writes a sample's files, and tells its entry of the manifest.
fn write(directory: &Path, technology: &str, sample: &Sample) -> Result<Value, Failure> {
    let place = directory.join(technology).join(sample.name);
    fs::create_dir_all(&place)
        .map_err(|error| Failure::because(format!("cannot create {}", place.display()), error))?;
    for (name, bytes) in &sample.files {
        write_new(&place.join(name), bytes)?;
    }
    let mut entry = json!({
        "name": format!("{technology}/{}", sample.name),
        "technology": technology,
        "good": sample.fails.is_none(),
        "fails": sample.fails,
        "about": sample.about,
    });
    if let Some(others) = other_expectations(technology, sample) {
        entry["expected"] = others;
    }
    Ok(entry)
}

/// The values that a verifier must expect of this sample in place of those for all.
fn other_expectations(technology: &str, sample: &Sample) -> Option<Value> {
    if technology != "snp" {
        return None;
    }
    let all = of_report(&expected_of_reports());
    let mut others = of_report(&expected_of_report(sample));
    others
        .as_object_mut()?
        .retain(|name, value| all[name] != *value);
    (!others.as_object()?.is_empty()).then_some(others)
}

fn digest(bytes: Option<[u8; 48]>) -> Option<String> {
    bytes.map(hex::encode)
}

/// Expected values of a report, named as the options of `attest verify` are.
fn of_report(report: &Expected) -> Value {
    json!({
        "measurement": digest(report.measurement),
        "report-data": report.report_data.map(hex::encode),
        "host-data": report.host_data.map(hex::encode),
        "vmpl": report.vmpl,
        "policy": report.policy.map(|policy| format!("{policy:#x}")),
        "min-tcb": report.tcb.map(|tcb| tcb.to_string()),
        "chip-id": report.chip_id.map(hex::encode),
    })
}

fn manifest(entries: &[Value]) -> Value {
    let quote = expected_of_quotes();
    json!({
        "format": "kvm-ops-evidence/1",
        "time": TIME,
        "expected": {
            "snp": of_report(&expected_of_reports()),
            "tdx": {
                "mrtd": digest(quote.mrtd),
                "rtmr0": digest(quote.rtmr[0]),
                "rtmr1": digest(quote.rtmr[1]),
                "rtmr2": digest(quote.rtmr[2]),
                "rtmr3": digest(quote.rtmr[3]),
                "mrconfigid": digest(quote.mr_config_id),
                "mrowner": digest(quote.mr_owner),
                "mrownerconfig": digest(quote.mr_owner_config),
                "mrseam": digest(quote.mr_seam),
                "attributes": quote.attributes.map(|bits| format!("{bits:#x}")),
                "xfam": quote.xfam.map(|bits| format!("{bits:#x}")),
                "report-data": quote.report_data.map(hex::encode),
            },
        },
        "samples": entries,
    })
}
