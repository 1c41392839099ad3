//! Guest programs in confidential VMs.
//!
//! A built-in guest knows nothing of private and shared memory. What the early code of a real
//! confidential guest does for the rest of it, this wrapper does for a program: it accepts each page
//! before its first use, and touches what is no memory (devices) through shared addresses.

use std::collections::BTreeSet;
use std::ops::Range;

use kvm_ops::guest::{Action, GuestFault, GuestProgram, Outcome};
use kvm_ops::{Gfn, Gpa, Level, PAGE_SIZE, Privacy, SharedMask};

/// TDX_PAGE_ALREADY_ACCEPTED, without details: the page was there from the launch, or another vCPU
/// was faster.
const ALREADY_ACCEPTED: u64 = 0x0b0a << 32;

/// A program whose addresses carry no mask bit.
pub(crate) struct InConfidence {
    program: Box<dyn GuestProgram>,
    /// Where there is memory.
    memory: Vec<Range<u64>>,
    mask: SharedMask,
    /// Frames that this vCPU may use as private ones.
    accepted: BTreeSet<u64>,
    /// Frames that the program has shared.
    shared: BTreeSet<u64>,
    doing: Doing,
    /// What is being written: the platform borrows it.
    buffer: Vec<u8>,
}

/// What the next outcome is the outcome of.
enum Doing {
    /// What the program wanted.
    Wanted,
    /// The acceptance of a frame that an access needs.
    Accepting(u64, Access),
    /// A conversion.
    Converting(Range<u64>, Privacy),
}

/// A memory access that is not done yet; what a write writes is in the buffer.
#[derive(Clone, Copy)]
struct Access {
    gpa: u64,
    len: usize,
    write: bool,
}

impl Access {
    fn frames(self) -> Range<u64> {
        let last = self.gpa.saturating_add((self.len as u64).saturating_sub(1));
        self.gpa / PAGE_SIZE..last / PAGE_SIZE + 1
    }
}

/// An action without a borrow.
enum Next {
    Access(Access),
    Convert(Gpa, u64, Privacy),
    /// Any other; a port's data is in the buffer.
    Out(u16),
    Other(Action<'static>),
}

impl InConfidence {
    /// Wraps a program for a VM with memory in these ranges.
    pub(crate) fn new(program: Box<dyn GuestProgram>, memory: Vec<Range<u64>>) -> Self {
        Self {
            program,
            memory,
            mask: SharedMask::NONE,
            accepted: BTreeSet::new(),
            shared: BTreeSet::new(),
            doing: Doing::Wanted,
            buffer: Vec::new(),
        }
    }

    fn is_private(&self, frame: u64) -> bool {
        let gpa = frame.saturating_mul(PAGE_SIZE);
        self.memory.iter().any(|range| range.contains(&gpa)) && !self.shared.contains(&frame)
    }

    /// The address as this guest must use it.
    fn address(&self, gpa: u64) -> Gpa {
        let frame = Gfn::new(gpa / PAGE_SIZE);
        let privacy = if self.is_private(frame.get()) {
            Privacy::Private
        } else {
            Privacy::Shared
        };
        let base = self.mask.join(frame, privacy).map(Gpa::get);
        // An address that does not exist is left for the platform to refuse.
        Gpa::new(base.map_or(gpa, |base| base | (gpa % PAGE_SIZE)))
    }

    fn access(&mut self, access: Access) -> Action<'_> {
        let needed = |frame: &u64| self.is_private(*frame) && !self.accepted.contains(frame);
        // More frames than an access can have are none that it may touch.
        if let Some(frame) = access.frames().take(2).find(needed) {
            self.doing = Doing::Accepting(frame, access);
            return Action::Accept {
                gpa: Gpa::new(frame * PAGE_SIZE),
                level: Level::Size4K,
            };
        }
        self.doing = Doing::Wanted;
        let gpa = self.address(access.gpa);
        if access.write {
            let data = &self.buffer;
            Action::Write { gpa, data }
        } else {
            let len = access.len;
            Action::Read { gpa, len }
        }
    }

    /// Asks the program.
    fn ask(&mut self, last: Outcome<'_>) -> Action<'_> {
        let buffer = &mut self.buffer;
        let mut keep = |data: &[u8]| {
            buffer.clear();
            buffer.extend_from_slice(data);
            data.len()
        };
        let next = match self.program.step(last) {
            Action::Read { gpa, len } => Next::Access(Access {
                gpa: gpa.get(),
                len,
                write: false,
            }),
            Action::Write { gpa, data } => Next::Access(Access {
                gpa: gpa.get(),
                len: keep(data),
                write: true,
            }),
            Action::Out { port, data } => {
                keep(data);
                Next::Out(port)
            }
            Action::Share { gpa, pages } => Next::Convert(gpa, pages, Privacy::Shared),
            Action::Unshare { gpa, pages } => Next::Convert(gpa, pages, Privacy::Private),
            Action::In { port, size } => Next::Other(Action::In { port, size }),
            Action::Hypercall { nr, args } => Next::Other(Action::Hypercall { nr, args }),
            Action::Tdcall { leaf, args } => Next::Other(Action::Tdcall { leaf, args }),
            Action::Halt => Next::Other(Action::Halt),
            // What no built-in guest does.
            _ => Next::Other(Action::Shutdown),
        };
        match next {
            Next::Access(access) => self.access(access),
            Next::Out(port) => {
                self.doing = Doing::Wanted;
                let data = &self.buffer;
                Action::Out { port, data }
            }
            Next::Convert(gpa, pages, to) => {
                let first = gpa.get() / PAGE_SIZE;
                self.doing = Doing::Converting(first..first.saturating_add(pages), to);
                match to {
                    Privacy::Shared => Action::Share { gpa, pages },
                    Privacy::Private => Action::Unshare { gpa, pages },
                }
            }
            Next::Other(action) => {
                self.doing = Doing::Wanted;
                action
            }
        }
    }

    fn converted(&mut self, frames: Range<u64>, to: Privacy) {
        for frame in frames {
            match to {
                Privacy::Shared => {
                    self.accepted.remove(&frame);
                    self.shared.insert(frame);
                }
                // Taking pages back accepts them.
                Privacy::Private => {
                    self.shared.remove(&frame);
                    self.accepted.insert(frame);
                }
            }
        }
    }
}

impl GuestProgram for InConfidence {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        if let Outcome::Start { mask, .. } = last {
            self.mask = mask;
        }
        match std::mem::replace(&mut self.doing, Doing::Wanted) {
            Doing::Wanted => self.ask(last),
            Doing::Converting(frames, to) => {
                if last == Outcome::Done {
                    self.converted(frames, to);
                }
                self.ask(last)
            }
            Doing::Accepting(frame, access) => match last {
                // A guest without acceptance (SEV, SEV-ES) has nothing to do before it.
                Outcome::Done | Outcome::Fault(GuestFault::NotOffered) => {
                    self.accepted.insert(frame);
                    self.access(access)
                }
                Outcome::Fault(GuestFault::Refused(status))
                    if status & !0xffff_ffff == ALREADY_ACCEPTED =>
                {
                    self.accepted.insert(frame);
                    self.access(access)
                }
                Outcome::Fault(_) => self.ask(last),
                // An interrupt came first; the acceptance is issued again.
                _ => self.access(access),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::VcpuId;
    use kvm_ops::guest::Script;

    const BIT: u64 = 1 << 47;

    fn started(script: Script) -> InConfidence {
        InConfidence::new(Box::new(script), std::iter::once(0..0x10_0000).collect())
    }

    fn start() -> Outcome<'static> {
        Outcome::Start {
            vcpu: VcpuId(0),
            mask: SharedMask::shared_bit(47).unwrap(),
        }
    }

    fn accept(gpa: u64) -> Action<'static> {
        Action::Accept {
            gpa: Gpa::new(gpa),
            level: Level::Size4K,
        }
    }

    #[test]
    fn a_page_is_accepted_once_before_its_first_use_and_an_access_may_have_two() {
        let at = Gpa::new(0x1ffe);
        let mut guest = started(Script::new().write(at, b"1234").read(at, 4));
        assert_eq!(guest.step(start()), accept(0x1000));
        let already = Outcome::Fault(GuestFault::Refused(ALREADY_ACCEPTED | 1));
        assert_eq!(guest.step(already), accept(0x2000));
        let data = b"1234";
        assert_eq!(guest.step(Outcome::Done), Action::Write { gpa: at, data });
        assert_eq!(guest.step(Outcome::Done), Action::Read { gpa: at, len: 4 });
        assert_eq!(guest.step(Outcome::Data(data)), Action::Shutdown);
    }

    #[test]
    fn an_acceptance_that_fails_is_the_programs_fault_to_deal_with() {
        let mut guest = started(Script::new().read(Gpa::new(0x1000), 1).halt());
        assert_eq!(guest.step(start()), accept(0x1000));
        let fault = Outcome::Fault(GuestFault::Refused(7 << 32));
        assert_eq!(guest.step(fault), Action::Halt);
    }

    #[test]
    fn devices_are_touched_through_shared_addresses() {
        let mut guest = started(Script::new().read(Gpa::new(0xe000_0004), 4));
        let gpa = Gpa::new(BIT | 0xe000_0004);
        assert_eq!(guest.step(start()), Action::Read { gpa, len: 4 });
    }

    #[test]
    fn what_was_converted_is_touched_as_what_it_became() {
        let at = Gpa::new(0x5008);
        let page = Gpa::new(0x5000);
        let mut guest = started(
            Script::new()
                .share(page, 1)
                .read(at, 1)
                .unshare(page, 1)
                .read(at, 1),
        );
        assert_eq!(
            guest.step(start()),
            Action::Share {
                gpa: page,
                pages: 1
            }
        );
        let gpa = Gpa::new(BIT | 0x5008);
        assert_eq!(guest.step(Outcome::Done), Action::Read { gpa, len: 1 });
        let unshare = Action::Unshare {
            gpa: page,
            pages: 1,
        };
        assert_eq!(guest.step(Outcome::Data(&[0])), unshare);
        assert_eq!(guest.step(Outcome::Done), Action::Read { gpa: at, len: 1 });
    }

    #[test]
    fn a_conversion_that_failed_changed_nothing() {
        let page = Gpa::new(0x5000);
        let mut guest = started(Script::new().share(page, 1).read(page, 1));
        assert_eq!(
            guest.step(start()),
            Action::Share {
                gpa: page,
                pages: 1
            }
        );
        assert_eq!(
            guest.step(Outcome::Fault(GuestFault::Refused(1))),
            accept(0x5000)
        );
    }
}
