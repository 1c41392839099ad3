//! The verdict of a verification: one row for each check.

use std::collections::BTreeSet;
use std::fmt;

use thiserror::Error;

/// Result of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The check was made, and the evidence passed.
    Passed,
    /// The check was made, and the evidence did not pass, for this reason.
    Failed(String),
    /// The check was not made, because an earlier one failed.
    NotMade,
    /// The caller stated no expected value, so there was nothing to compare with.
    NotAsked,
    /// The caller gave this check up by name.
    Waived,
}

impl Outcome {
    /// A short word for tables and JSON.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed(_) => "failed",
            Self::NotMade => "not made",
            Self::NotAsked => "not asked",
            Self::Waived => "waived",
        }
    }
}

/// The weight of a check in the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Always made, and cannot be given up.
    Always,
    /// Must be made, or waived by name.
    Needed,
    /// Made if the caller states a value; its absence costs nothing.
    Optional,
}

/// A check that a verifier knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// Name on the command line and in JSON.
    pub name: &'static str,
    /// The statement that holds if the check passes.
    pub about: &'static str,
    /// The weight of the check in the verdict.
    pub weight: Weight,
}

impl Check {
    pub(crate) const fn new(name: &'static str, weight: Weight, about: &'static str) -> Self {
        Self {
            name,
            about,
            weight,
        }
    }
}

/// A check with its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The check.
    pub check: Check,
    /// Its result.
    pub outcome: Outcome,
    /// A remark for the reader beside the result: the name of the root, for instance.
    pub note: String,
}

/// Every row of a verification, in the order in which the checks are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    rows: Vec<Row>,
}

impl Verdict {
    /// The rows.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The row of the check with this name.
    pub fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.check.name == name)
    }

    /// The first check that failed, with the reason.
    pub fn first_failure(&self) -> Option<(Check, &str)> {
        self.rows.iter().find_map(|row| match &row.outcome {
            Outcome::Failed(why) => Some((row.check, why.as_str())),
            _ => None,
        })
    }

    /// The first check that is always made, and did not pass.
    pub(crate) fn first_unmet(&self) -> Option<Check> {
        let unmet =
            |row: &&Row| row.check.weight == Weight::Always && row.outcome != Outcome::Passed;
        self.rows.iter().find(unmet).map(|row| row.check)
    }

    /// Checks that are needed, and were neither made nor waived.
    pub fn open(&self) -> impl Iterator<Item = Check> {
        self.rows
            .iter()
            .filter(|row| row.outcome == Outcome::NotAsked && row.check.weight == Weight::Needed)
            .map(|row| row.check)
    }

    /// Returns true if every needed check was made and passed, or was waived by name.
    pub fn is_accepted(&self) -> bool {
        self.rows.iter().all(|row| match row.outcome {
            Outcome::Passed | Outcome::Waived => true,
            Outcome::NotAsked => row.check.weight == Weight::Optional,
            Outcome::Failed(_) | Outcome::NotMade => false,
        })
    }

    /// Returns true if its key signed the evidence, under a root that the caller trusts: no check
    /// that is always made failed. Says nothing about what the evidence tells.
    pub fn is_authentic(&self) -> bool {
        self.first_unmet().is_none()
    }
}

/// A waiver names no check, or one that cannot be given up.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the check `{name}` cannot be waived; those that can are {known}")]
pub struct WaiverError {
    name: String,
    known: String,
}

/// Checks that the caller gives up by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waivers(BTreeSet<String>);

impl Waivers {
    /// Waives nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Waives these checks of `known`, or says which of the names cannot be waived.
    pub fn new<'a>(
        names: impl IntoIterator<Item = &'a str>,
        known: &[Check],
    ) -> Result<Self, WaiverError> {
        let can = |check: &&Check| check.weight == Weight::Needed;
        let mut set = BTreeSet::new();
        for name in names {
            if !known.iter().filter(can).any(|check| check.name == name) {
                let known: Vec<_> = known.iter().filter(can).map(|check| check.name).collect();
                return Err(WaiverError {
                    name: name.to_owned(),
                    known: known.join(", "),
                });
            }
            set.insert(name.to_owned());
        }
        Ok(Self(set))
    }

    /// Returns true if the check with this name is waived.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

/// Collects rows.
pub(crate) struct Rows<'a> {
    rows: Vec<Row>,
    waivers: &'a Waivers,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(waivers: &'a Waivers) -> Self {
        Self {
            rows: Vec::new(),
            waivers,
        }
    }

    fn push(&mut self, check: Check, outcome: Outcome) {
        let waived = check.weight == Weight::Needed && self.waivers.has(check.name);
        let outcome = if waived { Outcome::Waived } else { outcome };
        let note = String::new();
        self.rows.push(Row {
            check,
            outcome,
            note,
        });
    }

    /// Says something beside the result of the row that was added last.
    pub(crate) fn note(&mut self, note: String) {
        if let Some(row) = self.rows.last_mut() {
            row.note = note;
        }
    }

    /// Adds a check that another check's waiver gives up.
    #[cfg(feature = "snp")]
    pub(crate) fn waived(&mut self, check: Check) {
        self.push(check, Outcome::Waived);
    }

    /// Adds a check that was made.
    pub(crate) fn made(&mut self, check: Check, result: Result<(), String>) {
        let outcome = result.map_or_else(Outcome::Failed, |()| Outcome::Passed);
        self.push(check, outcome);
    }

    /// Adds a check that yields a value if it passes.
    pub(crate) fn value<T>(&mut self, check: Check, result: Result<T, String>) -> Option<T> {
        match result {
            Ok(value) => {
                self.push(check, Outcome::Passed);
                Some(value)
            }
            Err(why) => {
                self.push(check, Outcome::Failed(why));
                None
            }
        }
    }

    /// Adds a check of a stated value, if one was stated.
    pub(crate) fn asked<T>(
        &mut self,
        check: Check,
        expected: Option<T>,
        compare: impl FnOnce(T) -> Result<(), String>,
    ) {
        match expected {
            Some(expected) => self.made(check, compare(expected)),
            None => self.push(check, Outcome::NotAsked),
        }
    }

    /// Adds what is left of `all` as not made, and ends.
    pub(crate) fn finish(mut self, all: &[Check]) -> Verdict {
        for check in all {
            if !self.rows.iter().any(|row| row.check == *check) {
                self.push(*check, Outcome::NotMade);
            }
        }
        let place = |row: &Row| all.iter().position(|check| *check == row.check);
        self.rows.sort_by_key(place);
        Verdict { rows: self.rows }
    }
}

/// Compares bytes, and shows both if they differ.
pub(crate) fn same(what: &str, has: &[u8], expected: &[u8]) -> Result<(), String> {
    if has == expected {
        return Ok(());
    }
    let (has, expected) = (hex::encode(has), hex::encode(expected));
    Err(format!("the {what} is {has}, expected {expected}"))
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.check.name, self.outcome.word())?;
        match &self.outcome {
            Outcome::Failed(why) => write!(f, " ({why})"),
            _ => Ok(()),
        }
    }
}
