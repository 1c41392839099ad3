//! Evidence for the tests of verifiers: good, and wrong in one way each.

#[cfg(feature = "snp")]
mod snp;
#[cfg(feature = "tdx")]
mod tdx;

#[cfg(feature = "snp")]
pub use snp::{chip, expected as expected_of_reports, expected_of as expected_of_report, reports};
#[cfg(feature = "tdx")]
pub use tdx::{expected as expected_of_quotes, quotes};

/// When the samples are to be verified: 2026-01-01, in seconds of Unix time.
pub const TIME: u64 = 1_767_225_600;

/// A piece of evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its name.
    pub name: &'static str,
    /// The fault of the sample.
    pub about: &'static str,
    /// The first check that fails; `None` for good evidence.
    pub fails: Option<&'static str>,
    /// Its files, by name.
    pub files: Vec<(&'static str, Vec<u8>)>,
    /// A report of Turin.
    #[cfg_attr(not(feature = "snp"), allow(dead_code))]
    is_turin: bool,
}

impl Sample {
    /// The contents of a file; empty if there is none of that name.
    pub fn file(&self, name: &str) -> &[u8] {
        let found = self.files.iter().find(|(other, _)| *other == name);
        found.map(|(_, bytes)| bytes.as_slice()).unwrap_or_default()
    }
}
