//! The answer of `attest new`: the files, and the command that verifies them.

use serde::Serialize;

use super::args::NewArgs;
use crate::exit_code::Code;
use crate::failure::Outcome;
use crate::term;

/// Evidence that was written.
pub(super) struct Written<'a> {
    pub(super) about: String,
    pub(super) files: &'a [&'static str],
    /// The command that verifies it, in lines for a shell.
    pub(super) question: String,
}

/// The same in JSON.
#[derive(Serialize)]
struct Report<'a> {
    directory: String,
    files: &'a [&'static str],
    /// The words of the command that verifies the evidence.
    verify: Vec<&'a str>,
}

impl Written<'_> {
    pub(super) fn tell(&self, args: &NewArgs) -> Outcome {
        let directory = args.directory.display().to_string();
        if args.json {
            let words = self.question.split_whitespace();
            term::say_json(&Report {
                directory,
                files: self.files,
                verify: words.filter(|word| *word != "\\").collect(),
            })?;
        } else {
            term::say(format!(
                "{directory}: {}.\nA verifier that knows what to expect asks:\n\n{}",
                self.about, self.question
            ))?;
        }
        Ok(Code::Fine)
    }
}
