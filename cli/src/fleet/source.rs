//! The text of a fleet file.

use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::exit_code::Code;
use crate::failure::Failure;
use crate::files;

/// The built-in fleet.
pub(crate) const DEFAULT: &str = include_str!("../../fleets/default.toml");

/// The size limit in bytes, above any real fleet file: a disk image given by mistake is refused
/// early.
const MAX_BYTES: u64 = 1 << 20;

/// The text of a fleet file, and its name in messages.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) text: String,
    /// The directory for relative paths in the file.
    pub(crate) base: PathBuf,
}

impl Source {
    /// The built-in fleet.
    pub(crate) fn built_in() -> Self {
        Self::new("built-in fleet", DEFAULT, "")
    }

    /// Wraps a text.
    pub(crate) fn new(
        name: impl Into<String>,
        text: impl Into<String>,
        base: impl Into<PathBuf>,
    ) -> Self {
        Self {
            name: name.into(),
            text: text.into(),
            base: base.into(),
        }
    }

    /// Reads a file, or standard input for `-`.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        if path == Path::new("-") {
            let text = read(io::stdin().lock()).map_err(|error| {
                Failure::because("cannot read standard input", error).code(Code::Input)
            })?;
            return Ok(Self::new("standard input", text, ""));
        }
        let name = path.display().to_string();
        let bytes = files::read("the fleet file", path, MAX_BYTES)
            .map_err(|failure| failure.hint("`kvm-ops fleet --show-default` prints one"))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            Failure::because(
                format!("the fleet file {name} is no text"),
                error.utf8_error(),
            )
            .code(Code::Input)
        })?;
        Ok(Self::new(
            name,
            text,
            path.parent().unwrap_or(Path::new("")),
        ))
    }

    /// Limits a span to the text and to character boundaries, so that it can be shown.
    pub(crate) fn clamp(&self, span: &Range<usize>) -> Range<usize> {
        let floor = |at: usize| {
            (0..=at.min(self.text.len()))
                .rev()
                .find(|at| self.text.is_char_boundary(*at))
                .unwrap_or(0)
        };
        let start = floor(span.start);
        start..floor(span.end).max(start)
    }
}

fn read(from: impl Read) -> io::Result<String> {
    let mut text = String::new();
    from.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::other(format!(
            "it is larger than {MAX_BYTES} bytes, which no fleet file is"
        )));
    }
    Ok(text)
}
