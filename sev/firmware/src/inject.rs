//! Failures on request.
//!
//! A plan is data: the same plan over the same calls fails the same calls. Random plans come from
//! a seed.

use crate::observe::Operation;
use crate::status::Status;
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use std::collections::BTreeMap;

/// One planned failure: the `nth` call of `operation`, counted from 1 from when it was planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Operation that fails.
    pub operation: Operation,
    /// Number of the call, from 1.
    pub nth: u64,
    /// Result: a [`Status`] for commands, a code in rAX for instructions, anything but 0 for
    /// WBINVD.
    pub code: u32,
}

/// Random failures from a seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RandomFailures {
    /// Seed of the sequence.
    pub seed: u64,
    /// On average one call in this many fails; 0 for none.
    pub one_in: u32,
    /// Statuses that commands fail with, drawn evenly. Empty: commands do not fail.
    pub statuses: Vec<Status>,
    /// Codes that RMP instructions fail with, drawn evenly. Empty: instructions do not fail.
    pub codes: Vec<u32>,
}

/// The plan that is in force.
#[derive(Default)]
pub(crate) struct Injection {
    planned: Vec<Failure>,
    calls: BTreeMap<Operation, u64>,
    random: Option<(RandomFailures, ChaCha8Rng)>,
}

/// Planned failures kept at once; later ones are refused, so that a caller cannot grow the list.
pub(crate) const MAX_PLANNED: usize = 4096;

impl Injection {
    pub(crate) fn plan(&mut self, failure: Failure) -> bool {
        if self.planned.len() == MAX_PLANNED {
            return false;
        }
        let made = self.calls.get(&failure.operation).copied().unwrap_or(0);
        let nth = made.saturating_add(failure.nth.max(1));
        self.planned.push(Failure { nth, ..failure });
        true
    }

    pub(crate) fn randomly(&mut self, random: RandomFailures) {
        let rng = ChaCha8Rng::seed_from_u64(random.seed);
        self.random = Some((random, rng));
    }

    pub(crate) fn clear(&mut self) {
        self.planned.clear();
        self.random = None;
    }

    /// Counts a call and says whether it fails.
    pub(crate) fn next(&mut self, operation: Operation) -> Option<u32> {
        if let Operation::UnknownCommand(_) = operation {
            return None;
        }
        let calls = self.calls.entry(operation).or_default();
        *calls += 1;
        let n = *calls;
        let due = |f: &Failure| f.operation == operation && f.nth == n;
        if let Some(at) = self.planned.iter().position(due) {
            return Some(self.planned.swap_remove(at).code);
        }
        let (random, rng) = self.random.as_mut()?;
        let draw = |rng: &mut ChaCha8Rng, n: usize| rng.next_u32() as usize % n;
        match operation {
            Operation::Instruction(_) => {
                let hit = !random.codes.is_empty() && hits(random.one_in, rng);
                hit.then(|| random.codes[draw(rng, random.codes.len())])
            }
            _ => {
                let hit = !random.statuses.is_empty() && hits(random.one_in, rng);
                hit.then(|| random.statuses[draw(rng, random.statuses.len())].0.into())
            }
        }
    }
}

fn hits(one_in: u32, rng: &mut ChaCha8Rng) -> bool {
    one_in != 0 && rng.next_u32().is_multiple_of(one_in)
}
