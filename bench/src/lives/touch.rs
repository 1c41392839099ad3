//! Guests of the benchmark.

use kvm_ops::guest::{Action, Outcome};
use kvm_ops::{Gfn, Gpa, Level, Privacy};

/// Accepts every page of some ranges, one after the other, and shuts down. A page that is not there
/// is a fault that the guest does not see.
pub fn accept_all(ranges: Vec<(Gpa, u64)>) -> impl FnMut(Outcome<'_>) -> Action<'static> + Send {
    let mut pages = ranges
        .into_iter()
        .flat_map(|(first, bytes)| (0..bytes).step_by(4096).map(move |n| first.get() + n));
    move |last| {
        if let Outcome::Fault(fault) = last {
            // Nothing else would be seen of it.
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

/// Where [`hello`] writes and reads.
pub const GREETING: Gpa = Gpa::new(0x1000);

/// Writes a word to its memory, private where it has such, reads it back, prints a byte, and shuts
/// down.
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
            // The run ends otherwise than the benchmark wants.
            _ => Action::Halt,
        }
    }
}
