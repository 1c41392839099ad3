//! Results of a replay.

use super::FirstDifference;
use std::collections::BTreeMap;
use std::fmt;

/// Number of occurrences of each (leaf, status, operand).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Coverage(pub BTreeMap<(String, String, String), u64>);

impl Coverage {
    /// Counts an outcome; `status` may carry its operand after a bar.
    pub(super) fn add(&mut self, leaf: &str, status: &str) {
        let (status, operand) = status.split_once('|').unwrap_or((status, ""));
        let key = (leaf.to_owned(), status.to_owned(), operand.to_owned());
        *self.0.entry(key).or_default() += 1;
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "leaf,status,operand,count")?;
        for ((leaf, status, operand), n) in &self.0 {
            writeln!(f, "{leaf},{status},{operand},{n}")?;
        }
        Ok(())
    }
}

/// A transcript and how its replay went.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileResult {
    /// The file, or archive and file in it.
    pub name: String,
    /// The first difference, if there is one.
    pub difference: Option<FirstDifference>,
}

/// The results of many transcripts. Prints the differences, the coverage table and, last, a line
/// `N passed, M failed`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// Each transcript in the order of replay.
    pub files: Vec<FileResult>,
    /// Coverage of all transcripts together.
    pub coverage: Coverage,
}

impl Summary {
    pub(super) fn add(&mut self, name: String, result: Result<(), FirstDifference>) {
        self.files.push(FileResult {
            name,
            difference: result.err(),
        });
    }

    /// Transcripts without a difference.
    #[must_use]
    pub fn passed(&self) -> usize {
        self.files.len() - self.failed()
    }

    /// Transcripts with a difference.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.files.iter().filter(|f| f.difference.is_some()).count()
    }

    /// Returns true if at least one transcript was replayed and all passed.
    #[must_use]
    pub fn is_success(&self) -> bool {
        !self.files.is_empty() && self.failed() == 0
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for file in &self.files {
            if let Some(d) = &file.difference {
                writeln!(f, "FAILED {}\n{d}\n", file.name)?;
            }
        }
        writeln!(f, "{}", self.coverage)?;
        write!(f, "{} passed, {} failed", self.passed(), self.failed())
    }
}
