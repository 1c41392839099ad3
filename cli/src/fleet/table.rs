//! Typed reading of a TOML table, which collects problems instead of stopping at the first.

use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{At, Problem, Problems, did_you_mean};

/// A table and the problems found in it.
pub(super) struct Table<'a, 'i> {
    /// The table's name in messages.
    what: &'static str,
    /// The table's place in the file, for problems about missing keys.
    pub(super) span: Range<usize>,
    table: &'a DeTable<'i>,
    problems: &'a Problems,
}

impl<'a, 'i> Table<'a, 'i> {
    pub(super) fn new(
        what: &'static str,
        span: Range<usize>,
        table: &'a DeTable<'i>,
        problems: &'a Problems,
    ) -> Self {
        Self {
            what,
            span,
            table,
            problems,
        }
    }

    /// Reports keys that are not in `known`.
    pub(super) fn only(&self, known: &[&str]) {
        for key in self.table.keys() {
            let name: &str = key.get_ref();
            if known.contains(&name) {
                continue;
            }
            let hint = did_you_mean(name, known)
                .unwrap_or_else(|| format!("{} has the keys {}", self.what, list(known)));
            self.problems.add(
                Problem::new(format!("unknown key `{name}` in {}", self.what))
                    .at(&key.span(), "not a key of this table")
                    .hint(hint),
            );
        }
    }

    /// Returns the value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&'a Spanned<DeValue<'i>>> {
        self.table
            .iter()
            .find(|(name, _)| AsRef::<str>::as_ref(name.get_ref()) == key)
            .map(|(_, value)| value)
    }

    fn wrong_type(&self, key: &str, wanted: &str, value: &Spanned<DeValue<'_>>) {
        self.problems
            .add(Problem::new(format!("`{key}` must be {wanted}")).at(
                &value.span(),
                format!("this is {}", article(value.get_ref().type_str())),
            ));
    }

    /// Reads a string.
    pub(super) fn string(&self, key: &str) -> Option<At<String>> {
        let value = self.get(key)?;
        match value.get_ref().as_str() {
            Some(text) => Some(At {
                value: text.to_owned(),
                span: value.span(),
            }),
            None => {
                self.wrong_type(key, "a string", value);
                None
            }
        }
    }

    /// Reads a boolean.
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        let value = self.get(key)?;
        let flag = value.get_ref().as_bool();
        if flag.is_none() {
            self.wrong_type(key, "true or false", value);
        }
        flag
    }

    /// Reads an integer within a range.
    pub(super) fn integer(&self, key: &str, range: RangeInclusive<u64>) -> Option<At<u64>> {
        let value = self.get(key)?;
        let DeValue::Integer(integer) = value.get_ref() else {
            self.wrong_type(key, "an integer", value);
            return None;
        };
        let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok();
        match number.filter(|number| range.contains(number)) {
            Some(number) => Some(At {
                value: number,
                span: value.span(),
            }),
            None => {
                self.problems
                    .add(Problem::new(format!("`{key}` is out of range")).at(
                        &value.span(),
                        format!("must be {} to {}", range.start(), range.end()),
                    ));
                None
            }
        }
    }

    /// Reads a string and parses it with `parse`.
    pub(super) fn parsed<T>(
        &self,
        key: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<At<T>> {
        let At { value, span } = self.string(key)?;
        match parse(&value) {
            Ok(value) => Some(At { value, span }),
            Err(why) => {
                self.problems
                    .add(Problem::new(format!("`{key}` is not acceptable")).at(&span, why));
                None
            }
        }
    }

    /// Reads a string that must be one of `names`.
    pub(super) fn choice<T>(
        &self,
        key: &str,
        names: &[&str],
        find: impl Fn(&str) -> Option<T>,
    ) -> Option<At<T>> {
        let At { value, span } = self.string(key)?;
        match find(&value) {
            Some(value) => Some(At { value, span }),
            None => {
                let hint = did_you_mean(&value, names)
                    .unwrap_or_else(|| format!("it is one of {}", list(names)));
                self.problems.add(
                    Problem::new(format!("unknown {key} `{value}`"))
                        .at(&span, "not known")
                        .hint(hint),
                );
                None
            }
        }
    }

    /// Reads a nested table.
    pub(super) fn table(&self, key: &str, what: &'static str) -> Option<Table<'a, 'i>> {
        let value = self.get(key)?;
        match value.get_ref().as_table() {
            Some(table) => Some(Table::new(what, value.span(), table, self.problems)),
            None => {
                self.wrong_type(key, "a table", value);
                None
            }
        }
    }

    /// Reads an array of tables.
    pub(super) fn tables(&self, key: &str, what: &'static str) -> Option<Vec<Table<'a, 'i>>> {
        let value = self.get(key)?;
        let Some(array) = value.get_ref().as_array() else {
            self.problems.add(
                Problem::new(format!("`{key}` must be an array of tables"))
                    .at(
                        &value.span(),
                        format!("this is {}", article(value.get_ref().type_str())),
                    )
                    .hint(format!("write [[{key}]]")),
            );
            return None;
        };
        let mut tables = Vec::new();
        for item in array.iter() {
            match item.get_ref().as_table() {
                Some(table) => tables.push(Table::new(what, item.span(), table, self.problems)),
                None => self.wrong_type(key, "an array of tables", item),
            }
        }
        Some(tables)
    }
}

fn article(noun: &str) -> String {
    let vowel = noun.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {noun}", if vowel { "an" } else { "a" })
}

/// Formats `a, b and c`, each quoted.
pub(super) fn list(names: &[&str]) -> String {
    let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}
