//! `attest inspect`: what a file says, whether it is to be believed or not.

mod certificates;
mod event_log;
mod kind;

use kvm_ops_attest::event_log::EventLog;
use kvm_ops_attest::snp::Report;
use kvm_ops_attest::tdx::{Quote, SealedReport};
use serde_json::{Map, Value, json};

use super::args::InspectArgs;
use super::fields::{self, Field};
use super::files;
use crate::doctor::text::{finish, table};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::term;
use kind::Kind;

/// The contents of a file, to be shown.
struct Shown {
    /// The answer as text, after the line that names the kind.
    text: String,
    /// The same as JSON, beside `kind`.
    json: Map<String, Value>,
}

pub(super) fn run(args: &InspectArgs) -> Outcome {
    let bytes = files::read(&args.evidence)?;
    let name = args.evidence.display();
    let kind = Kind::of(&bytes).ok_or_else(|| {
        Failure::new(format!("{name} is no evidence: {}", kind::describe(&bytes))).hint(
            "inspect knows reports of SNP guests, reports and quotes of TDs, certificates, tables of \
             certificates, revocation lists and event logs",
        )
        .code(Code::Input)
    })?;
    let shown = show(kind, &bytes).map_err(|why| {
        Failure::because(
            format!("{name} begins as {}, but is none", kind.name()),
            why,
        )
        .code(Code::Input)
    })?;
    if args.json {
        let mut json = json!({ "kind": kind.word(), "verified": false });
        if let Some(object) = json.as_object_mut() {
            object.extend(shown.json);
        }
        term::say(format!("{json:#}"))?;
    } else {
        term::say(format!(
            "{name}: {}. Nothing of it was verified.\n\n{}",
            kind.name(),
            shown.text
        ))?;
    }
    Ok(Code::Fine)
}

fn show(kind: Kind, bytes: &[u8]) -> Result<Shown, String> {
    match kind {
        Kind::SnpReport => {
            let report = Report::from_bytes(bytes).map_err(|error| error.to_string())?;
            Ok(of_fields(&fields::of_report(&report, None)))
        }
        Kind::Quote => {
            let quote = Quote::from_bytes(bytes).map_err(|error| error.to_string())?;
            let mut shown = of_fields(&fields::of_quote(&quote));
            if !quote.pck_chain.is_empty() {
                shown.append(certificates::of_chain(&quote.pck_chain)?);
            }
            Ok(shown)
        }
        Kind::SealedReport => {
            let report = SealedReport::from_bytes(bytes).map_err(|error| error.to_string())?;
            Ok(of_fields(&fields::of_sealed(&report)))
        }
        Kind::Certificates => certificates::of_bundle(bytes),
        Kind::Table => certificates::of_table(bytes),
        Kind::Crl => certificates::of_crl(bytes),
        Kind::EventLog => {
            let log = EventLog::from_bytes(bytes).map_err(|error| error.to_string())?;
            Ok(event_log::of_log(&log))
        }
    }
}

impl Shown {
    /// Adds another part; the names of the two differ.
    fn append(&mut self, other: Self) {
        self.text = format!("{}\n\n{}", self.text, other.text);
        self.json.extend(other.json);
    }
}

/// One table of fields.
fn of_fields(fields: &[Field]) -> Shown {
    let mut json = Map::new();
    json.insert("says".to_owned(), Value::Object(fields::json(fields)));
    Shown {
        text: text_of(fields),
        json,
    }
}

fn text_of(fields: &[Field]) -> String {
    let mut rows = table(&["FIELD", "VALUE"]);
    fields::add_rows(&mut rows, fields);
    finish(rows)
}
