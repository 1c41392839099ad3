//! The report of the checks.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// The outcome of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The back end did what it must.
    Passed,
    /// The check could not run on this subject, for this reason.
    Skipped(&'static str),
    /// The back end did something else.
    Failed(String),
}

/// All checks with their outcomes, in the order they ran.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    checks: Vec<(&'static str, Outcome)>,
}

impl Report {
    pub(super) fn add(&mut self, name: &'static str, outcome: Outcome) {
        self.checks.push((name, outcome));
    }

    /// The checks.
    pub fn checks(&self) -> &[(&'static str, Outcome)] {
        &self.checks
    }

    /// True if checks ran and none failed.
    pub fn passed(&self) -> bool {
        self.count(|o| *o == Outcome::Passed) > 0
            && self.count(|o| matches!(o, Outcome::Failed(_))) == 0
    }

    fn count(&self, which: impl Fn(&Outcome) -> bool) -> usize {
        self.checks
            .iter()
            .filter(|(_, outcome)| which(outcome))
            .count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, outcome) in &self.checks {
            match outcome {
                Outcome::Passed => writeln!(f, "passed   {name}")?,
                Outcome::Skipped(why) => writeln!(f, "skipped  {name}: {why}")?,
                Outcome::Failed(why) => writeln!(f, "FAILED   {name}: {why}")?,
            }
        }
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.count(|o| *o == Outcome::Passed),
            self.count(|o| matches!(o, Outcome::Failed(_))),
            self.count(|o| matches!(o, Outcome::Skipped(_))),
        )
    }
}
