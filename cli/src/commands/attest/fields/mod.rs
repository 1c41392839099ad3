//! The fields of evidence, in the order in which they are shown.

mod quote;
mod report;

pub(super) use quote::of_quote;
pub(super) use report::of_report;

/// A field: its name, its value, and the meaning of a value that does not explain itself.
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) value: String,
    pub(super) meaning: String,
}

/// The names of the bits that are set.
fn bits(value: u64, names: &[(u64, &str)]) -> Vec<String> {
    names
        .iter()
        .filter(|(bit, _)| value & bit != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect()
}
