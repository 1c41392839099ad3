//! Standard output and standard error: colours only if wanted, and no panic on a closed pipe.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use crate::failure::Failure;

/// The style of `error:` and of failed guests.
pub(crate) const ERROR: Style = AnsiColor::Red.on_default().bold();
/// The style of `hint:`.
pub(crate) const HINT: Style = AnsiColor::Cyan.on_default().bold();
/// The style of titles.
pub(crate) const BOLD: Style = Style::new().bold();

/// Writes a line to standard output.
pub(crate) fn say(text: impl Display) -> io::Result<()> {
    let mut out = anstream::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Writes a report as JSON to standard output.
pub(crate) fn say_json(report: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(report)
        .map_err(|error| Failure::because("cannot write the report", error))?;
    Ok(say(text)?)
}

/// Writes a line to standard error. An error is ignored: there is no other place to report it.
pub(crate) fn complain(text: impl Display) {
    let _ = writeln!(anstream::stderr().lock(), "{text}");
}

/// Returns true if standard output is a terminal, and neither `NO_COLOR` nor `TERM=dumb` is set.
pub(crate) fn colours_out() -> bool {
    wanted(anstream::AutoStream::choice(&io::stdout()))
}

/// The same for standard error.
pub(crate) fn colours_err() -> bool {
    wanted(anstream::AutoStream::choice(&io::stderr()))
}

fn wanted(choice: anstream::ColorChoice) -> bool {
    choice != anstream::ColorChoice::Never
}

/// Returns true if progress bars have a terminal.
pub(crate) fn has_bars() -> bool {
    io::stderr().is_terminal()
}

/// Returns true if standard output is a terminal.
pub(crate) fn shows_output() -> bool {
    io::stdout().is_terminal()
}

/// The width of the terminal on standard output in columns; `None` for a pipe or file, whose lines
/// need no folding.
pub(crate) fn columns() -> Option<u16> {
    terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| width.0)
}

/// Sends the library's events to standard error: failures always, life-cycle steps with `-v`,
/// everything with `-vv`.
pub(crate) fn log(verbose: u8) {
    let level = match verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    // Fails only if a subscriber is already set, which then does the job.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(colours_err())
        .with_target(verbose > 1)
        .try_init();
}
