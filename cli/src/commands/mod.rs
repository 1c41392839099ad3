//! One file per command. A command takes its arguments, prints its result to standard output, and
//! returns the exit code.

pub(crate) mod attest;
pub(crate) mod completions;
pub(crate) mod conform;
pub(crate) mod doctor;
pub(crate) mod fleet;
pub(crate) mod man;
pub(crate) mod measure;
pub(crate) mod migrate;
pub(crate) mod run;
pub(crate) mod with;
