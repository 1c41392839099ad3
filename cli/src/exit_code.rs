//! The exit codes.

use std::process::ExitCode;

/// The result of the program, as a number for scripts.
///
/// In this order they also decide what is told of several mistakes: the first that applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Code {
    /// Everything went as expected.
    Fine = 0,
    /// A check was made, and the answer is no.
    Negative = 1,
    /// The command line or the fleet file is wrong.
    Usage = 2,
    /// A guest crashed, or ended in another way than expected.
    Guest = 3,
    /// A teardown leaked something.
    Leak = 4,
    /// A file cannot be read, or is not what the command needs.
    Input = 5,
    /// The host, the system or a peer refused.
    Host = 6,
    /// Stopped by SIGINT or SIGTERM.
    Interrupted = 130,
}

/// The exit codes of every command, with their meanings.
pub(crate) const TABLE: [(Code, &str); 8] = [
    (
        Code::Fine,
        "as expected; for `run`: the guest halted, asked for a reset, or ran until the timeout",
    ),
    (
        Code::Negative,
        "`attest verify`: a check failed, or was neither made nor waived; `conform`: a vector differs",
    ),
    (
        Code::Usage,
        "the command line or the fleet file is wrong; nothing ran",
    ),
    (
        Code::Guest,
        "a guest crashed, or ended otherwise than expected",
    ),
    (
        Code::Leak,
        "a teardown left something behind, or the counts of a firmware and of its users differ",
    ),
    (
        Code::Input,
        "a file cannot be read, or is not what the command needs; nothing ran",
    ),
    (
        Code::Host,
        "the host, the system or a peer refused: a technology, memory, keys, a network, the output",
    ),
    (
        Code::Interrupted,
        "stopped by SIGINT or SIGTERM, after an orderly teardown; a second signal ends at once",
    ),
];

/// The table for `--help`.
pub(crate) fn help() -> String {
    let rows = TABLE.map(|(code, meaning)| format!("  {:<4} {meaning}", code as u8));
    format!("Exit codes:\n{}", rows.join("\n"))
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}
