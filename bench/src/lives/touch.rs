//! Guests of the benchmark.

use kvm_ops::guest::{Action, Outcome};
use kvm_ops::{Gfn, Gpa, Level, Privacy};

/// Accepts every page of some ranges in order, and shuts down. The host handles the fault of a page
/// that is missing; the guest does not notice.
pub fn accept_all(ranges: Vec<(Gpa, u64)>) -> impl FnMut(Outcome<'_>) -> Action<'static> + Send {
    let mut pages = ranges
        .into_iter()
        .flat_map(|(first, bytes)| (0..bytes).step_by(4096).map(move |n| first.get() + n));
    move |last| {
        if let Outcome::Fault(fault) = last {
            // A panic is the only sign that reaches the benchmark.
            panic!("a page was not accepted: {fault}");
        }
        match pages.next() {
            Some(gpa) => Action::Accept {
                gpa: Gpa::new(gpa),
                level: Level::Size4K,
            },
            None => Action::Shutdown,
        }
    }
}

/// The address that [`hello`] uses.
pub const GREETING: Gpa = Gpa::new(0x1000);

/// Writes a word to its memory (private memory, if it has any), reads it back, prints a byte, and
/// shuts down.
pub fn hello() -> impl FnMut(Outcome<'_>) -> Action<'static> + Send {
    let mut at = GREETING;
    let mut step = 0;
    move |last| {
        if let Outcome::Start { mask, .. } = last {
            let frame = Gfn::containing(GREETING);
            at = mask.join(frame, Privacy::Private).unwrap_or(GREETING);
        }
        step += 1;
        match (step, last) {
            (1, _) => Action::Write {
                gpa: at,
                data: b"greeting",
            },
            (2, Outcome::Done) => Action::Read { gpa: at, len: 8 },
            (3, Outcome::Data(b"greeting")) => Action::Out {
                port: 0x402,
                data: b"!",
            },
            (4, Outcome::Done) => Action::Shutdown,
            // An end that the benchmark treats as a failure.
            _ => Action::Halt,
        }
    }
}
