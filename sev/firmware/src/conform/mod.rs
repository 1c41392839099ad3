//! Replays measurement vectors and names the first difference of each that differs.
//!
//! A file holds many vectors; each gives a kind, an input and the expected values, and this module
//! recomputes the values from the input with the same functions the software AMD SP uses. Files
//! may be compressed with gzip or zstd; folders are walked.
//!
//! ```no_run
//! let summary = soft_amd_sp::conform::replay_paths(["tests/vectors/sev"]);
//! println!("{summary}");
//! assert!(summary.is_success());
//! ```

mod fields;
mod file;
mod kinds;
mod pattern;

use std::fmt;
use std::path::{Path, PathBuf};

/// One thing that did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The file.
    pub file: PathBuf,
    /// The vector, or `None` if the file itself could not be used.
    pub vector: Option<String>,
    /// The fault: the first field that differs with both values, or the reason for which the vector
    /// could not be run.
    pub reason: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file.display())?;
        if let Some(vector) = &self.vector {
            write!(f, "{vector}: ")?;
        }
        f.write_str(&self.reason)
    }
}

/// Result of a replay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Vectors whose every value was equal.
    pub passed: usize,
    /// Files that were read.
    pub files: usize,
    /// Vectors and files that did not pass.
    pub failures: Vec<Failure>,
}

impl Summary {
    /// Number of vectors and unusable files that did not pass.
    pub fn failed(&self) -> usize {
        self.failures.len()
    }

    /// Returns true if something was replayed and nothing failed.
    pub fn is_success(&self) -> bool {
        self.passed > 0 && self.failures.is_empty()
    }
}

/// The first failure of each file, how many more there are in it, and a closing line
/// `N passed, M failed`.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.failures.as_slice();
        while let Some(first) = rest.first() {
            let same = rest.iter().take_while(|x| x.file == first.file).count();
            writeln!(f, "{first}")?;
            if same > 1 {
                writeln!(f, "{}: and {} more", first.file.display(), same - 1)?;
            }
            rest = &rest[same..];
        }
        write!(f, "{} passed, {} failed", self.passed, self.failed())
    }
}

/// Replays every vector in the given files and folders.
pub fn replay_paths<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Summary {
    let mut summary = Summary::default();
    for path in paths {
        let (files, problems) = file::find(path.as_ref());
        summary.failures.extend(problems);
        for file in files {
            replay_file(&file, &mut summary);
        }
    }
    summary
}

fn replay_file(path: &Path, summary: &mut Summary) {
    summary.files += 1;
    let failure = |vector: Option<&str>, reason: String| Failure {
        file: path.to_owned(),
        vector: vector.map(str::to_owned),
        reason,
    };
    let vectors = match file::read(path) {
        Ok(vectors) => vectors,
        Err(reason) => return summary.failures.push(failure(None, reason)),
    };
    for (index, vector) in vectors.iter().enumerate() {
        match kinds::check(vector) {
            Ok(()) => summary.passed += 1,
            Err(reason) => {
                let id = vector["id"]
                    .as_str()
                    .map_or(format!("#{index}"), str::to_owned);
                summary.failures.push(failure(Some(&id), reason));
            }
        }
    }
}
