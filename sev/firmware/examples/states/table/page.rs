//! Compares the model with the reference and writes the page.

use super::reference::{EXPLANATIONS, Explanation};
use super::{NONE, Table, tables};
use soft_amd_sp::Command;
use std::fmt::Write;

/// The reference for a cell: the answer, or `None` where it is silent, and the mark of its source.
struct Reference {
    answer: Option<String>,
    mark: &'static str,
}

/// One command in one state.
pub struct Cell {
    command: Command,
    state: String,
    model: String,
    reference: Reference,
    /// Number of the explanation, where model and reference differ and there is one.
    explanation: Option<usize>,
}

impl Cell {
    fn differs(&self) -> bool {
        self.reference.answer.as_deref() != Some(&self.model)
    }

    fn exists(&self) -> bool {
        self.model != NONE
    }

    fn text(&self) -> String {
        let mark = match self.reference.mark {
            "" => String::new(),
            mark => format!(" {mark}"),
        };
        if !self.exists() {
            return String::new();
        }
        if !self.differs() {
            return format!("`{}`{mark}", self.model);
        }
        let reference = match &self.reference.answer {
            Some(answer) => format!("`{answer}`{mark}"),
            None => "silent".to_owned(),
        };
        let why = match self.explanation {
            Some(number) => format!("[{number}]"),
            None => "**unexplained**".to_owned(),
        };
        format!("model `{}`, reference {reference} {why}", self.model)
    }
}

/// The rows of a text: the command's name and its cells.
fn rows(text: &'static str) -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.next().map(|name| (name, words.collect()))
    })
}

fn reference_of(word: &str, wrong_state: &str) -> Reference {
    let (answer, mark) = match word.split_once(':') {
        None => (word, ""),
        Some((answer, "R")) => (answer, "R"),
        Some((answer, "D")) => (answer, "D"),
        Some((_, mark)) => panic!("the mark {mark} means nothing"),
    };
    let answer = match answer {
        "?" => None,
        "." => Some(wrong_state.to_owned()),
        answer => Some(answer.to_owned()),
    };
    Reference { answer, mark }
}

/// Returns true if an explanation covers this answer of the model.
fn covers(e: &Explanation, table: &Table, command: Command, state: usize, model: &str) -> bool {
    e.table == table.title
        && rows(e.cells).any(|(name, cells)| name == command.name() && cells[state] == model)
}

/// A table with the reference beside it.
pub struct Compared {
    title: &'static str,
    states: Vec<String>,
    cells: Vec<Vec<Cell>>,
}

fn compare(table: Table) -> Compared {
    let mut reference = rows(table.reference);
    let mut cells = Vec::new();
    for (command, answers) in &table.rows {
        let (name, words) = reference
            .next()
            .expect("a row of the reference for each command");
        assert_eq!(
            name,
            command.name(),
            "rows of the reference are in the table's order"
        );
        assert_eq!(words.len(), answers.len(), "{name}: a cell for each state");
        let cell = |state: usize| Cell {
            command: *command,
            state: table.states[state].clone(),
            model: answers[state].clone(),
            reference: reference_of(words[state], table.wrong_state),
            explanation: EXPLANATIONS
                .iter()
                .position(|e| covers(e, &table, *command, state, &answers[state]))
                .map(|i| i + 1),
        };
        cells.push((0..answers.len()).map(cell).collect());
    }
    assert_eq!(reference.next(), None, "the reference has no other command");
    Compared {
        title: table.title,
        states: table.states,
        cells,
    }
}

/// The model beside the reference.
pub struct Comparison(Vec<Compared>);

impl Comparison {
    /// Runs the model.
    pub fn new() -> Self {
        Self(tables().into_iter().map(compare).collect())
    }

    fn cells(&self) -> impl Iterator<Item = &Cell> {
        let rows = self.0.iter().flat_map(|t| &t.cells);
        rows.flatten().filter(|c| c.exists())
    }

    /// Every command that was tried.
    pub fn commands(&self) -> impl Iterator<Item = Command> {
        self.cells().map(|c| c.command)
    }

    /// Cells in which model and reference differ without an explanation.
    pub fn unexplained(&self) -> Vec<String> {
        self.cells()
            .filter(|c| c.differs() && c.explanation.is_none())
            .map(|c| format!("{} in {}: {}", c.command, c.state, c.text()))
            .collect()
    }

    /// Explanations, by number, that have a cell where nothing is to be explained.
    pub fn idle(&self) -> Vec<usize> {
        let wanted = |e: &Explanation| {
            let words = rows(e.cells).flat_map(|(_, words)| words);
            words.filter(|w| *w != "_").count()
        };
        let used = |n| {
            let differing = self.cells().filter(|c| c.differs());
            differing.filter(|c| c.explanation == Some(n)).count()
        };
        (1..)
            .zip(EXPLANATIONS)
            .filter(|(n, e)| wanted(e) != used(*n))
            .map(|(n, _)| n)
            .collect()
    }

    /// The whole documentation page.
    pub fn page(&self) -> String {
        let mut out = INTRO.to_owned();
        for table in &self.0 {
            let _ = writeln!(out, "\n## {}\n", table.title);
            let _ = writeln!(out, "| command | {} |", table.states.join(" | "));
            let _ = writeln!(out, "|---|{}", "---|".repeat(table.states.len()));
            for row in &table.cells {
                let cells: Vec<_> = row.iter().map(Cell::text).collect();
                let _ = writeln!(out, "| {} | {} |", row[0].command, cells.join(" | "));
            }
        }
        out.push_str("\n## Differences\n\n");
        for (number, explanation) in (1..).zip(EXPLANATIONS) {
            let _ = writeln!(
                out,
                "{number}. {}: {}",
                explanation.table, explanation.because
            );
        }
        let agreed = |mark| {
            let same = self.cells().filter(|c| !c.differs());
            same.filter(|c| c.reference.mark == mark).count()
        };
        let differing: Vec<_> = self.cells().filter(|c| c.differs()).collect();
        let silent = differing
            .iter()
            .filter(|c| c.reference.answer.is_none())
            .count();
        let explained = differing.iter().filter(|c| c.explanation.is_some()).count();
        let _ = writeln!(
            out,
            "\nThe model agrees with {} answers that are stated, {} recalled, {} deduced. Of the\n\
             differences, in {} the reference is silent and in {} it says something else.\n\n\
             {} cells, {} differences, {explained} explained.",
            agreed(""),
            agreed("R"),
            agreed("D"),
            silent,
            differing.len() - silent,
            self.cells().count(),
            differing.len(),
        );
        out
    }
}

const INTRO: &str = "\
# Commands by state

Printed by `cargo run -p soft-amd-sp --example states`, which tries every command on the running
model in every state, with parameters that are valid where the state allows it, and puts beside it
what public sources say. A test compares this page with what the command prints, and fails where
model and reference differ without an explanation.

`=` it worked and the state stayed, `->X` it worked and led to X, `free` the guest ended; a number is
the status it was refused with:

| status | name | status | name |
|---|---|---|---|
| `0x01` | INVALID_PLATFORM_STATE | `0x10` | INVALID_GUEST |
| `0x02` | INVALID_GUEST_STATE | `0x12` | ACTIVE |
| `0x08` | INACTIVE | `0x15` | UNSUPPORTED |

One answer in a cell is that of both. It is stated by an open source (Linux: `psp-sev.h`,
`sev-dev.c`, KVM's `sev.c`, the SEV self-tests; QEMU; the crate `sev`), or marked **R**: recalled from
AMD's published interface documents (55766, 56860) without reading them again, or **D**: deduced from
how software behaves. **An answer marked R or D confirms the model less: both may be wrong in the
same way.** [inferred.md](inferred.md) lists those choices. Where the two differ, the cell has both
answers and the number of the explanation below.
";
