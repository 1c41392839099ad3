//! Conversions between private and shared: flush, MapGPA, accept.

use super::{Accept, AlreadyAccepted, ConvertError, Gpaw, MapGpa, Regs};
use crate::{Flush, GpaRange, PageSize, Privacy, RangeError};

/// The next request of a state machine, or its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Flush this of the machine's range, then ask for the next step with `None`.
    Flush(Flush),
    /// Execute TDCALL with these registers, then ask for the next step with what came back. If the
    /// instruction was not executed (an exception came first), ask with `None` and get it again.
    Call(Regs),
    /// It is done.
    Done,
    /// It is over before its end.
    Failed(ConvertError),
}

/// Bounds on the retries of a host and on the waits for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The number of times in a row that the host may answer RETRY without progress; at least 1.
    pub stalled_retries: u32,
    /// The number of times in a row that a lock of the TDX module may be busy; at least 1. The module itself
    /// ends the vCPU's entry when a guest insists for a second, so that this is a last resort.
    pub busy: u32,
}

impl Limits {
    /// The default of all state machines.
    pub const DEFAULT: Self = Self {
        stalled_retries: 16,
        busy: 1 << 24,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// A conversion of a range to private or to shared.
///
/// | to | steps |
/// |---|---|
/// | shared | flush caches and TLBs, MapGPA until the host confirmed all |
/// | private | flush TLBs, MapGPA until the host confirmed all, accept every page |
///
/// A private page cannot be had by MapGPA alone: a host that confirms without doing it is found out
/// by the TDX module when the page is accepted. A shared page is the host's to play with, so there is
/// nothing to check.
///
/// ```
/// use kvm_ops_guest::tdx::{Convert, Gpaw, Regs, Progress};
/// use kvm_ops_guest::{Flush, GpaRange, Privacy};
///
/// let range = GpaRange::pages(0x7000, 1)?;
/// let mut convert = Convert::new(range, Privacy::Shared, Gpaw::Bits48)?;
/// assert_eq!(convert.next(None), Progress::Flush(Flush { caches: true, tlb: true }));
/// let Progress::Call(mut regs) = convert.next(None) else { panic!() };
/// assert_eq!((regs.r11, regs.r12, regs.r13), (0x10001, 1 << 47 | 0x7000, 0x1000));
/// regs.r10 = 0; // the host's answer
/// assert_eq!(convert.next(Some(&regs)), Progress::Done);
/// # Ok::<(), kvm_ops_guest::RangeError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Convert {
    range: GpaRange,
    to: Privacy,
    map: MapGpa,
    accept: Accept,
    at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Start,
    Flushing,
    Mapping,
    Accepting,
}

impl Convert {
    /// To make `range` what `to` says.
    ///
    /// # Errors
    /// The range reaches the shared bit.
    pub fn new(range: GpaRange, to: Privacy, gpaw: Gpaw) -> Result<Self, RangeError> {
        Ok(Self {
            range,
            to,
            map: MapGpa::new(range, to, gpaw)?,
            accept: Accept::new(range, gpaw)?,
            at: At::Start,
        })
    }

    /// With other limits.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.map = self.map.limits(limits);
        self.accept = self.accept.limits(limits);
        self
    }

    /// With sizes up to `largest` only when accepting.
    #[must_use]
    pub fn largest(mut self, largest: PageSize) -> Self {
        self.accept = self.accept.largest(largest);
        self
    }

    /// With another answer to PAGE_ALREADY_ACCEPTED.
    #[must_use]
    pub fn already_accepted(mut self, already: AlreadyAccepted) -> Self {
        self.accept = self.accept.already_accepted(already);
        self
    }

    /// The range that is converted: what a [`Progress::Flush`] is about.
    pub const fn range(&self) -> GpaRange {
        self.range
    }

    /// The next step. `last` is what the last [`Progress::Call`] brought back; `None` at first, after a
    /// flush, and where the call was not executed.
    pub fn next(&mut self, last: Option<&Regs>) -> Progress {
        match self.at {
            At::Start => {
                self.at = At::Flushing;
                Progress::Flush(Flush::tdx(self.to))
            }
            At::Flushing => {
                self.at = At::Mapping;
                self.map.next(None)
            }
            At::Mapping => match (self.map.next(last), self.to) {
                (Progress::Done, Privacy::Private) => {
                    self.at = At::Accepting;
                    self.accept.next(None)
                }
                // Mapped is not accepted: of a range to become private nothing is done yet.
                (Progress::Failed(error), Privacy::Private) => Progress::Failed(ConvertError {
                    rest: self.range,
                    ..error
                }),
                (step, _) => step,
            },
            At::Accepting => self.accept.next(last),
        }
    }
}
