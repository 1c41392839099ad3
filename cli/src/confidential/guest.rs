//! Guest programs in confidential VMs.
//!
//! A built-in guest knows nothing of private and shared memory. This wrapper does for it what the
//! early code of a real confidential guest does: it accepts each page before its first use, clears
//! the page if the processor does not, and accesses devices through shared addresses.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::guest::{Action, GuestFault, GuestProgram, Outcome};
use kvm_ops::{Gfn, Gpa, Level, PAGE_SIZE, Privacy, SharedMask};

static ZEROS: [u8; 4096] = [0; 4096];

/// A guest's record of its memory, shared by its vCPUs.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    /// The ranges that have memory.
    ranges: Vec<Range<u64>>,
    /// One of the launch pages, which is always ready.
    launched: u64,
    frames: Mutex<BTreeMap<u64, Frame>>,
}

/// The state of a frame. A frame that is not listed has not been touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frame {
    /// A vCPU is accepting and clearing the frame.
    Preparing,
    /// Private and accepted, but not yet cleared.
    Accepted,
    /// Private, and in use.
    Ready,
    /// Shared with the host.
    Shared,
}

impl GuestMemory {
    /// Creates a record of memory in `ranges`, in which the pages `launched` are ready for use.
    pub(crate) fn new(ranges: Vec<Range<u64>>, launched: impl Iterator<Item = u64>) -> Self {
        let frames: BTreeMap<_, _> = launched
            .map(|gpa| (gpa / PAGE_SIZE, Frame::Ready))
            .collect();
        Self {
            ranges,
            launched: frames
                .keys()
                .next_back()
                .map_or(0, |frame| frame * PAGE_SIZE),
            frames: Mutex::new(frames),
        }
    }

    fn frames(&self) -> MutexGuard<'_, BTreeMap<u64, Frame>> {
        // Nothing panics under the lock.
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_private(&self, frame: u64) -> bool {
        let gpa = frame.saturating_mul(PAGE_SIZE);
        let is_memory = self.ranges.iter().any(|range| range.contains(&gpa));
        is_memory && self.frames().get(&frame) != Some(&Frame::Shared)
    }

    fn set(&self, frame: u64, to: Option<Frame>) {
        match to {
            Some(to) => self.frames().insert(frame, to),
            None => self.frames().remove(&frame),
        };
    }
}

/// A program whose addresses carry no mask bit.
pub(crate) struct InConfidence {
    program: Box<dyn GuestProgram>,
    memory: Arc<GuestMemory>,
    mask: SharedMask,
    doing: Doing,
    /// The data of the current write: the platform borrows it.
    buffer: Vec<u8>,
}

/// The action whose outcome comes next.
enum Doing {
    /// The program's own action.
    Wanted,
    /// The acceptance of a frame that an access needs.
    Accepting(u64, Access),
    /// The clearing of a frame that an access needs.
    Clearing(u64, Access),
    /// An unrelated read, while another vCPU prepares a frame that an access needs.
    Waiting(Access),
    /// A conversion between private and shared.
    Converting(Range<u64>, Privacy),
}

/// A pending memory access. The data of a write is in the buffer.
#[derive(Clone, Copy)]
struct Access {
    gpa: u64,
    len: usize,
    write: bool,
}

impl Access {
    /// Returns the frames of the access. An access that spans more frames than any valid one yields
    /// none.
    fn frames(self) -> impl Iterator<Item = u64> {
        let last = self.gpa.saturating_add((self.len as u64).saturating_sub(1));
        (self.gpa / PAGE_SIZE..=last / PAGE_SIZE).take(2)
    }
}

/// The missing preparation of a frame.
enum Need {
    Acceptance,
    Clearing,
    /// Another vCPU is preparing the frame.
    Patience,
}

/// An action that borrows nothing.
enum Next {
    Access(Access),
    Convert(Gpa, u64, Privacy),
    /// A write to a port; its data is in the buffer.
    Out(u16),
    Other(Action<'static>),
}

impl InConfidence {
    /// Wraps a program for a vCPU of a VM with this memory.
    pub(crate) fn new(program: Box<dyn GuestProgram>, memory: Arc<GuestMemory>) -> Self {
        Self {
            program,
            memory,
            mask: SharedMask::NONE,
            doing: Doing::Wanted,
            buffer: Vec::new(),
        }
    }

    /// Returns the address with the mask bit that this guest must set.
    fn address(&self, gpa: u64) -> Gpa {
        let frame = Gfn::new(gpa / PAGE_SIZE);
        let privacy = if self.memory.is_private(frame.get()) {
            Privacy::Private
        } else {
            Privacy::Shared
        };
        let base = self.mask.join(frame, privacy).map(Gpa::get);
        // The platform refuses an address that does not exist.
        Gpa::new(base.map_or(gpa, |base| base | (gpa % PAGE_SIZE)))
    }

    /// Returns true if the guest must clear new private memory itself. A TD's page is zero after
    /// its acceptance; an SEV guest's page holds the old contents, decrypted with the new key.
    fn clears(&self) -> bool {
        let private = self.mask.join(Gfn::new(0), Privacy::Private);
        private.is_some_and(|gpa| gpa.get() != 0)
    }

    fn access(&mut self, access: Access) -> Action<'_> {
        let needed = access.frames().find_map(|frame| {
            if !self.memory.is_private(frame) {
                return None;
            }
            let mut frames = self.memory.frames();
            match frames.get(&frame) {
                Some(Frame::Ready | Frame::Shared) => None,
                Some(Frame::Preparing) => Some((frame, Need::Patience)),
                Some(Frame::Accepted) => {
                    frames.insert(frame, Frame::Preparing);
                    Some((frame, Need::Clearing))
                }
                None => {
                    frames.insert(frame, Frame::Preparing);
                    Some((frame, Need::Acceptance))
                }
            }
        });
        match needed {
            None => self.issue(access),
            Some((frame, Need::Clearing)) => self.accepted(frame, access),
            Some((frame, Need::Acceptance)) => {
                self.doing = Doing::Accepting(frame, access);
                Action::Accept {
                    gpa: Gpa::new(frame * PAGE_SIZE),
                    level: Level::Size4K,
                }
            }
            Some((_, Need::Patience)) => {
                self.doing = Doing::Waiting(access);
                let gpa = self.address(self.memory.launched);
                Action::Read { gpa, len: 1 }
            }
        }
    }

    /// Performs the access: all its frames are ready.
    fn issue(&mut self, access: Access) -> Action<'_> {
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

    fn ready(&mut self, frame: u64, access: Access) -> Action<'_> {
        self.memory.set(frame, Some(Frame::Ready));
        self.access(access)
    }

    fn accepted(&mut self, frame: u64, access: Access) -> Action<'_> {
        if !self.clears() {
            return self.ready(frame, access);
        }
        self.doing = Doing::Clearing(frame, access);
        let gpa = self.address(frame * PAGE_SIZE);
        let data = &ZEROS;
        Action::Write { gpa, data }
    }

    /// Asks the program for its next action.
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
            // Built-in guests do nothing else.
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

    fn converted(&self, frames: Range<u64>, to: Privacy) {
        // A page made private again is accepted already; in a TD it is also zero.
        let private = match self.clears() {
            true => Frame::Accepted,
            false => Frame::Ready,
        };
        for frame in frames {
            self.memory.set(
                frame,
                match to {
                    Privacy::Shared => Some(Frame::Shared),
                    Privacy::Private => Some(private),
                },
            );
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
            Doing::Waiting(access) => self.access(access),
            Doing::Converting(frames, to) => {
                if last == Outcome::Done {
                    self.converted(frames, to);
                }
                self.ask(last)
            }
            Doing::Accepting(frame, access) => match last {
                // SEV and SEV-ES guests have no acceptance, so there is nothing to do first.
                Outcome::Done | Outcome::Fault(GuestFault::NotOffered) => {
                    self.accepted(frame, access)
                }
                fault => self.failed(frame, fault),
            },
            Doing::Clearing(frame, access) => match last {
                Outcome::Done => self.ready(frame, access),
                fault => self.failed(frame, fault),
            },
        }
    }
}

impl InConfidence {
    /// Reports a frame that cannot be had to the program, as the outcome of its action.
    fn failed(&mut self, frame: u64, outcome: Outcome<'_>) -> Action<'_> {
        self.memory.set(frame, None);
        self.ask(outcome)
    }
}

#[cfg(test)]
mod tests;
