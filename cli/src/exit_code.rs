//! The exit codes.

use std::process::ExitCode;

/// The result of the program, as a number for scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Code {
    /// Everything went as expected.
    Fine = 0,
    /// The host, a file or the library refused the request; no guest ran to its end.
    Refused = 1,
    /// The command line or the fleet file is wrong.
    Usage = 2,
    /// A guest crashed, or ended in another way than expected.
    Guest = 3,
    /// A teardown leaked something.
    Leak = 4,
    /// Stopped by SIGINT or SIGTERM.
    Interrupted = 130,
}

/// The table for `--help` and the man page.
pub(crate) const HELP: &str = "\
Exit codes:
  0    as expected; for `run`: the guest halted, shut down, or ran until the timeout
  1    the host, a file or the library refused; nothing ran. For `conform`: something differs;
       for `attest verify`: a check failed, or was neither made nor waived
  2    the command line or the fleet file is wrong; nothing ran
  3    a guest crashed, or ended otherwise than expected
  4    a teardown left something behind, or the counts of a firmware and of its users differ
  130  stopped by SIGINT or SIGTERM, after an orderly teardown";

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}
