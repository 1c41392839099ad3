//! The account as text.

use std::collections::BTreeSet;
use std::fmt;

use super::{Account, kind};
use crate::term::{BOLD, ERROR};
use crate::units::plural;

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages, keys, .. } = self;
        write!(
            f,
            "{BOLD}{}{BOLD:#}: {} taken = {} freed + {} leaked",
            self.firmware,
            plural(pages.taken, "page"),
            pages.freed,
            pages.leaked,
        )?;
        if let (Some(given), Some(returned)) = (pages.given, pages.returned) {
            write!(f, ", of which it got {given} and gave {returned} back")?;
        }
        write!(
            f,
            "; {} leased = {} given back + {} leaked",
            plural(keys.leased, "key"),
            keys.freed,
            keys.leaked,
        )?;
        let kinds: BTreeSet<_> = self.calls_by_name.keys().map(|name| kind(name)).collect();
        for of in kinds {
            let calls = || {
                self.calls_by_name
                    .iter()
                    .filter(|(name, _)| kind(name) == of)
            };
            let total = calls().map(|(_, n)| n).sum();
            let listed = wrapped(calls().map(|(name, n)| format!("{name} {n}")));
            write!(f, "\n{}:\n{listed}", plural(total, of))?;
        }
        if !self.refused.is_empty() {
            let refused = self.refused.iter().map(|(what, n)| format!("{what} {n}"));
            write!(f, "\nof these not successful:\n{}", wrapped(refused))?;
        }
        for what in &self.disagreements {
            write!(f, "\n{ERROR}does not add up{ERROR:#}: {what}")?;
        }
        Ok(())
    }
}

/// Joins items with line breaks after at most `WIDTH` columns.
fn wrapped(items: impl Iterator<Item = String>) -> String {
    let mut lines = vec![String::from(" ")];
    for item in items {
        let line = lines.len() - 1;
        if lines[line].len() > 1 && lines[line].len() + item.len() > WIDTH {
            lines.push(String::from(" "));
        }
        if let Some(line) = lines.last_mut() {
            line.push_str(&format!(" {item},"));
        }
    }
    if let Some(line) = lines.last_mut() {
        line.pop();
    }
    lines.join("\n")
}

/// The maximum width of such a line, in columns.
const WIDTH: usize = 96;
