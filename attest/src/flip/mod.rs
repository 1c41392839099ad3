//! Every bit of a piece of evidence, flipped one at a time.
//!
//! A verifier that reads a field without checking who signed it is found by changing the field. Here
//! each bit of a report or a quote, of the certificates above it and of the collateral beside it is
//! changed, and the changed evidence is verified as if it had come so. A bit is refused by a check,
//! or it is shown to be outside of what is signed; a bit that is neither is a hole in the verifier.

mod fields;
#[cfg(feature = "tdx")]
mod quotes;
#[cfg(feature = "snp")]
mod reports;

#[cfg(feature = "tdx")]
pub use quotes::quote;
#[cfg(feature = "snp")]
pub use reports::report;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use thiserror::Error;

use crate::row::Verdict;
use fields::Field;

/// Bits that a thread takes at once.
const BATCH: usize = 32;

/// The result of flipping the bits of one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The report, the quote, a certificate by its subject, or a part of the collateral.
    pub piece: String,
    /// The name of the field.
    pub field: String,
    /// The bytes of the field within its piece.
    pub at: Range<usize>,
    /// The number of bits that were flipped.
    pub flipped: usize,
    /// The number of bits refused, by the check that failed first.
    pub refused: BTreeMap<&'static str, usize>,
    /// The number of bits that change nothing that counts, by the reason.
    pub outside: BTreeMap<&'static str, usize>,
    /// Bits that were believed without such a reason: bit `n` is bit `n % 8` of byte `n / 8`.
    pub believed: Vec<usize>,
}

/// Why no bit was flipped.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FlipError {
    /// The evidence is refused as it is.
    #[error("the evidence is refused before a bit is flipped: the check `{check}` failed: {why}")]
    Refused {
        /// The check that failed first.
        check: &'static str,
        /// The reason.
        why: String,
    },
}

/// The result for one bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Refused(&'static str),
    Outside(&'static str),
    Believed,
}

impl Fate {
    /// The fate of evidence with this verdict.
    fn of(verdict: &Verdict) -> Self {
        match verdict.first_unmet() {
            Some(check) => Self::Refused(check.name),
            None => Self::Believed,
        }
    }

    /// `reason`, if the bit was believed and that is shown to hold.
    fn or_outside(self, reason: &'static str, shown: impl FnOnce() -> bool) -> Self {
        match self {
            Self::Believed if shown() => Self::Outside(reason),
            fate => fate,
        }
    }
}

/// Refuses evidence that is not authentic as it came.
fn authentic(verdict: &Verdict) -> Result<(), FlipError> {
    match verdict.first_failure() {
        Some((check, why)) if !verdict.is_authentic() => Err(FlipError::Refused {
            check: check.name,
            why: why.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// A piece of the evidence, and the verification of the whole with the piece changed.
struct Piece<'a> {
    name: String,
    bytes: Vec<u8>,
    fields: Vec<Field>,
    judge: Box<Judge<'a>>,
}

type Judge<'a> = dyn Fn(&[u8]) -> Fate + Sync + 'a;

/// Flips the first bit of each field and every `every`th from there, on all processors.
fn flip(pieces: &[Piece<'_>], every: NonZeroUsize) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut jobs = Vec::new();
    for (which, piece) in pieces.iter().enumerate() {
        for field in &piece.fields {
            let bits = field.at.start * 8..field.at.end * 8;
            jobs.extend(
                bits.step_by(every.get())
                    .map(|bit| (lines.len(), which, bit)),
            );
            lines.push(Line {
                piece: piece.name.clone(),
                field: field.name.clone(),
                at: field.at.clone(),
                flipped: 0,
                refused: BTreeMap::new(),
                outside: BTreeMap::new(),
                believed: Vec::new(),
            });
        }
    }
    let mut fates = run(pieces, &jobs);
    // In the order of the bits, whichever thread was first.
    fates.sort_by_key(|(job, _)| *job);
    for (job, fate) in fates {
        let (line, _, bit) = jobs[job];
        let line = &mut lines[line];
        line.flipped += 1;
        match fate {
            Fate::Refused(check) => *line.refused.entry(check).or_default() += 1,
            Fate::Outside(reason) => *line.outside.entry(reason).or_default() += 1,
            Fate::Believed => line.believed.push(bit),
        }
    }
    lines
}

/// Line, piece, bit.
type Job = (usize, usize, usize);

fn run(pieces: &[Piece<'_>], jobs: &[Job]) -> Vec<(usize, Fate)> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let first = next.fetch_add(BATCH, Ordering::Relaxed);
            if first >= jobs.len() {
                return done;
            }
            for (job, (_, which, bit)) in jobs.iter().enumerate().skip(first).take(BATCH) {
                let piece = &pieces[*which];
                let mut changed = piece.bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                done.push((job, (piece.judge)(&changed)));
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = work();
        for other in others {
            match other.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}
