//! The state of a vCPU between its handle and its TD.
//!
//! ```text
//!          sit                     claim            give
//!   out <-------> in vcpu_run   out -----> claimed -----> gone
//!         stand                    <-----
//!                                  unclaim
//! ```
//! While `vcpu_run` is under way the handle has the registers of the next entry; in between they lie
//! here too, so that a move finds them. A vCPU whose exit waits for its answer cannot be claimed: the
//! answer is the embedder's, and would come to a handle that is of no use any more.

use kvm_ops::SeamRegs;
use kvm_ops_mmu::Mutex;

use crate::run::Pending;

/// What the next entry needs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Resume {
    pub(crate) regs: SeamRegs,
    pub(crate) pending: Pending,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// No `vcpu_run` is under way, or it waits at the gate.
    Out(Resume),
    /// A `vcpu_run` is under way.
    In,
    /// The vCPU is on its way to another VM, which may be undone.
    Claimed(Resume),
    /// The vCPU is another VM's.
    Gone,
}

/// The place of one vCPU.
#[derive(Debug)]
pub(crate) struct Seat(Mutex<State>);

/// The answer to a try.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tried<T> {
    Done(T),
    /// Another thread is at it: try again.
    Wait,
    /// It will not be done.
    No,
}

impl Seat {
    pub(crate) fn new(resume: Resume) -> Self {
        Self(Mutex::new(State::Out(resume)))
    }

    fn with<T>(&self, relax: impl FnMut(), f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock(relax))
    }

    /// A `vcpu_run` begins, or goes on. `No` for a vCPU that is another VM's.
    pub(crate) fn sit(&self, relax: impl FnMut()) -> Tried<Resume> {
        self.with(relax, |state| match *state {
            State::Out(resume) => {
                *state = State::In;
                Tried::Done(resume)
            }
            // A handle has one `vcpu_run` at a time.
            State::In | State::Claimed(_) => Tried::Wait,
            State::Gone => Tried::No,
        })
    }

    /// A `vcpu_run` ends, or waits.
    pub(crate) fn stand(&self, relax: impl FnMut(), resume: Resume) {
        self.with(relax, |state| *state = State::Out(resume));
    }

    /// Claims the vCPU for a move. `No` while an exit waits for its answer.
    pub(crate) fn claim(&self, relax: impl FnMut()) -> Tried<()> {
        self.with(relax, |state| match *state {
            State::Out(resume) if resume.pending.waits_for_answer() => Tried::No,
            State::Out(resume) => {
                *state = State::Claimed(resume);
                Tried::Done(())
            }
            State::In => Tried::Wait,
            State::Claimed(_) | State::Gone => Tried::No,
        })
    }

    /// What the next entry needs, to be told to another host. `No` while an exit waits for its answer.
    pub(crate) fn look(&self, relax: impl FnMut()) -> Tried<Resume> {
        self.with(relax, |state| match *state {
            State::Out(resume) if resume.pending.waits_for_answer() => Tried::No,
            State::Out(resume) => Tried::Done(resume),
            State::In => Tried::Wait,
            State::Claimed(_) | State::Gone => Tried::No,
        })
    }

    /// Undoes [`claim`](Self::claim).
    pub(crate) fn unclaim(&self, relax: impl FnMut()) {
        self.with(relax, |state| {
            if let State::Claimed(resume) = *state {
                *state = State::Out(resume);
            }
        });
    }

    /// A claimed vCPU is another VM's from now on. Returns what its next entry needs.
    pub(crate) fn give(&self, relax: impl FnMut()) -> Resume {
        self.with(relax, |state| {
            match core::mem::replace(state, State::Gone) {
                State::Claimed(resume) | State::Out(resume) => resume,
                State::In | State::Gone => Resume::default(),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resume(pending: Pending) -> Resume {
        Resume {
            pending,
            ..Resume::default()
        }
    }

    #[test]
    fn a_vcpu_is_claimed_only_between_two_runs_and_then_does_not_run() {
        let seat = Seat::new(resume(Pending::Halt));
        let nop = || ();
        assert!(matches!(seat.sit(nop), Tried::Done(_)));
        assert!(matches!(seat.claim(nop), Tried::Wait));
        seat.stand(nop, resume(Pending::Success));
        assert!(matches!(seat.claim(nop), Tried::Done(())));
        assert!(matches!(seat.sit(nop), Tried::Wait));
        seat.unclaim(nop);
        let Tried::Done(found) = seat.sit(nop) else {
            panic!("it is out")
        };
        assert_eq!(found.pending, Pending::Success);
        seat.stand(nop, found);
        assert!(matches!(seat.claim(nop), Tried::Done(())));
        assert_eq!(seat.give(nop).pending, Pending::Success);
        assert!(matches!(seat.sit(nop), Tried::No));
        assert!(matches!(seat.claim(nop), Tried::No));
    }

    #[test]
    fn an_exit_that_waits_for_its_answer_keeps_the_vcpu() {
        let nop = || ();
        for (pending, stays) in [
            (Pending::Nothing, false),
            (Pending::Success, false),
            (Pending::Halt, false),
            (Pending::ShutDown, false),
            (Pending::Read, true),
            (Pending::Hypercall, true),
            (Pending::MapGpaHypercall, true),
            (Pending::MsrRead, true),
            (Pending::MsrWrite, true),
        ] {
            let seat = Seat::new(resume(pending));
            assert_eq!(matches!(seat.look(nop), Tried::No), stays, "{pending:?}");
            assert_eq!(matches!(seat.claim(nop), Tried::No), stays, "{pending:?}");
        }
    }
}
