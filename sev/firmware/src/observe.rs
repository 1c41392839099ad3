//! Counters, a trace, and injected failures.

use crate::command::Command;
use crate::inject::Injection;
use crate::machine::Instruction;
use crate::status::Status;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// Something that is counted: a command or an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// A command of the AMD SP.
    Command(Command),
    /// A number that is not a command. Counters keep all of them under `u32::MAX`.
    UnknownCommand(u32),
    /// An instruction of the host or a guest.
    Instruction(Instruction),
}

impl From<Command> for Operation {
    fn from(command: Command) -> Self {
        Operation::Command(command)
    }
}

impl From<Instruction> for Operation {
    fn from(instruction: Instruction) -> Self {
        Operation::Instruction(instruction)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operation::Command(c) => c.fmt(f),
            Operation::UnknownCommand(id) => f.pad(&format!("command {id:#x}")),
            Operation::Instruction(i) => i.fmt(f),
        }
    }
}

/// One call in the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceEntry {
    /// Number of the call since the platform was built, from 0.
    pub sequence: u64,
    /// The operation called.
    pub operation: Operation,
    /// The first two operands: for commands the first 16 bytes of the buffer; for instructions
    /// the system and guest physical address, or the core.
    pub operands: [u64; 2],
    /// Result: a [`Status`] for commands, the code in rAX for instructions; 0xffff for an
    /// instruction that faulted.
    pub code: u32,
    /// True if the result was injected.
    pub injected: bool,
}

impl fmt::Display for TraceEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = self.operands;
        write!(
            f,
            "{:>6} {:<22} {a:#x} {b:#x} -> ",
            self.sequence, self.operation
        )?;
        match self.operation {
            Operation::Instruction(_) => write!(f, "{}", self.code)?,
            _ => write!(f, "{}", Status(self.code as u16))?,
        }
        if self.injected {
            f.write_str(" (injected)")?;
        }
        Ok(())
    }
}

/// Number of calls of each operation, by result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(BTreeMap<Operation, BTreeMap<u32, u64>>);

impl Counters {
    /// Number of calls.
    pub fn calls(&self, operation: impl Into<Operation>) -> u64 {
        self.0
            .get(&operation.into())
            .map_or(0, |codes| codes.values().sum())
    }

    /// Number of calls that ended with a code.
    pub fn ended_with(&self, operation: impl Into<Operation>, code: u32) -> u64 {
        let codes = self.0.get(&operation.into());
        codes
            .and_then(|codes| codes.get(&code))
            .copied()
            .unwrap_or(0)
    }

    /// Number of commands that ended with a status.
    pub fn commands_ended_with(&self, status: Status) -> u64 {
        self.iter()
            .filter(|(op, code, _)| {
                !matches!(op, Operation::Instruction(_)) && *code == u32::from(status.0)
            })
            .map(|(_, _, n)| n)
            .sum()
    }

    /// Operation, code and count, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Operation, u32, u64)> + '_ {
        self.0
            .iter()
            .flat_map(|(op, codes)| codes.iter().map(move |(code, n)| (*op, *code, *n)))
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (operation, code, n) in self.iter() {
            match operation {
                Operation::Instruction(_) => writeln!(f, "{operation:<22} {n:>10}  code {code}")?,
                _ => writeln!(f, "{operation:<22} {n:>10}  {}", Status(code as u16))?,
            }
        }
        Ok(())
    }
}

/// The observer: everything that happens passes through it.
pub(crate) struct Monitor {
    counters: Counters,
    trace: VecDeque<TraceEntry>,
    capacity: usize,
    sequence: u64,
    pub(crate) injection: Injection,
    /// True if the call that is recorded next was injected.
    pending: bool,
}

impl Monitor {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            counters: Counters::default(),
            trace: VecDeque::new(),
            capacity,
            sequence: 0,
            injection: Injection::default(),
            pending: false,
        }
    }

    /// Asks the injection whether this call shall fail.
    pub(crate) fn injected(&mut self, operation: Operation) -> Option<u32> {
        let code = self.injection.next(operation);
        self.pending = code.is_some();
        code
    }

    pub(crate) fn record(&mut self, operation: Operation, operands: [u64; 2], code: u32) {
        // Unknown numbers share one counter, so that a caller cannot grow the table.
        let counted = match operation {
            Operation::UnknownCommand(_) => Operation::UnknownCommand(u32::MAX),
            other => other,
        };
        *self
            .counters
            .0
            .entry(counted)
            .or_default()
            .entry(code)
            .or_default() += 1;
        let entry = TraceEntry {
            sequence: self.sequence,
            operation,
            operands,
            code,
            injected: std::mem::take(&mut self.pending),
        };
        self.sequence += 1;
        if self.capacity != 0 {
            if self.trace.len() == self.capacity {
                self.trace.pop_front();
            }
            self.trace.push_back(entry);
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters.clone()
    }

    pub(crate) fn trace(&self) -> Vec<TraceEntry> {
        self.trace.iter().copied().collect()
    }
}
