//! Prints a verdict as text or JSON, and derives the exit code from it.

use std::path::Path;

use kvm_ops_attest::{Outcome as Row, Verdict};
use serde::Serialize;
use serde_json::{Map, Value};

use super::fields::{Field, add_rows, json};
use crate::doctor::text::{finish, table};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::term;

/// A verdict and the fields of the evidence.
pub(super) struct Findings<'a> {
    pub(super) evidence: &'a Path,
    pub(super) technology: &'static str,
    pub(super) verdict: &'a Verdict,
    /// The fields of the evidence; shown only if it is authentic.
    pub(super) fields: Vec<Field>,
}

impl Findings<'_> {
    /// Prints everything, and returns the exit code.
    pub(super) fn tell(&self, as_json: bool) -> Outcome {
        if as_json {
            term::say_json(&self.json())?;
        } else {
            term::say(self.text())?;
        }
        self.outcome()
    }

    fn outcome(&self) -> Outcome {
        let name = self.evidence.display();
        if let Some((check, why)) = self.verdict.first_failure() {
            let what = format!(
                "{name} is not to be believed: the check `{}` failed",
                check.name
            );
            return Err(Failure::because(what, why.to_owned()).code(Code::Negative));
        }
        let open: Vec<_> = self.verdict.open().map(|check| check.name).collect();
        if open.is_empty() && self.verdict.is_accepted() {
            return Ok(Code::Fine);
        }
        Err(Failure::new(format!(
            "{name} is authentic, but not accepted: not asked were {}",
            open.join(", ")
        ))
        .code(Code::Negative)
        .hint(format!(
            "state what you expect, or give the checks up: --waive {}",
            open.join(",")
        )))
    }

    fn text(&self) -> String {
        let mut rows = table(&["CHECK", "RESULT", ""]);
        for row in self.verdict.rows() {
            let mut about = row.check.about.to_owned();
            if let Row::Failed(why) = &row.outcome {
                about = why.clone();
            }
            if !row.note.is_empty() {
                about = format!("{about}: {}", row.note);
            }
            rows.add_row([row.check.name, row.outcome.word(), &about]);
        }
        let rows = finish(rows);
        if !self.verdict.is_authentic() {
            return rows;
        }
        let mut fields = table(&["FIELD", "VALUE"]);
        add_rows(&mut fields, &self.fields);
        format!("{rows}\n\n{}", finish(fields))
    }

    fn json(&self) -> Json<'_> {
        let rows = self.verdict.rows().iter().map(|row| JsonRow {
            check: row.check.name,
            outcome: row.outcome.word(),
            about: row.check.about,
            why: match &row.outcome {
                Row::Failed(why) => Some(why),
                _ => None,
            },
            note: Some(row.note.as_str()).filter(|note| !note.is_empty()),
        });
        Json {
            technology: self.technology,
            accepted: self.verdict.is_accepted(),
            authentic: self.verdict.is_authentic(),
            failed: self.verdict.first_failure().map(|(check, _)| check.name),
            not_asked: self.verdict.open().map(|check| check.name).collect(),
            rows: rows.collect(),
            says: self.verdict.is_authentic().then(|| json(&self.fields)),
        }
    }
}

#[derive(Serialize)]
struct Json<'a> {
    technology: &'static str,
    accepted: bool,
    authentic: bool,
    failed: Option<&'static str>,
    not_asked: Vec<&'static str>,
    rows: Vec<JsonRow<'a>>,
    says: Option<Map<String, Value>>,
}

#[derive(Serialize)]
struct JsonRow<'a> {
    check: &'static str,
    outcome: &'static str,
    about: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<&'a String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<&'a str>,
}
