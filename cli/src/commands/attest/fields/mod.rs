//! The fields of evidence, in the order in which they are shown.

mod quote;
mod report;

use comfy_table::Table;
use serde_json::{Map, Value};

pub(super) use quote::{of_quote, of_sealed};
pub(super) use report::of_report;

/// A field: its name, its value, and the meaning of a value that does not explain itself.
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) value: String,
    pub(super) meaning: String,
}

impl Field {
    /// A field whose value explains itself.
    pub(super) fn plain(name: &'static str, value: impl Into<String>) -> Self {
        Self {
            name,
            value: value.into(),
            meaning: String::new(),
        }
    }
}

/// Adds a row for each field, and one for its meaning.
pub(super) fn add_rows(table: &mut Table, fields: &[Field]) {
    for field in fields {
        table.add_row([field.name, &field.value]);
        if !field.meaning.is_empty() {
            table.add_row(["", &field.meaning]);
        }
    }
}

/// The fields by name, with underscores for spaces. Fields of one name become a list.
pub(super) fn json(fields: &[Field]) -> Map<String, Value> {
    let mut object = Map::new();
    for field in fields {
        let value = Value::from(field.value.as_str());
        match object.entry(field.name.replace(' ', "_")) {
            serde_json::map::Entry::Vacant(entry) => {
                entry.insert(value);
            }
            serde_json::map::Entry::Occupied(mut entry) => match entry.get_mut() {
                Value::Array(values) => values.push(value),
                first => *first = Value::Array(vec![first.take(), value]),
            },
        }
    }
    object
}

/// The names of the bits that are set.
fn bits(value: u64, names: &[(u64, &str)]) -> Vec<String> {
    names
        .iter()
        .filter(|(bit, _)| value & bit != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect()
}
