//! Conversions between private and shared.

use super::msr::{self, ResponseError};
use super::{Cause, ConvertError, Progress, Reply, Unchanged, Validate};
use crate::{Flush, GpaRange, PageSize, Privacy, RangeError};

/// The kind of guest, which decides the protocol towards the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// SEV or SEV-ES: the C-bit decides alone, and KVM_HC_MAP_GPA_RANGE informs the host so that
    /// it knows what it can send when the guest migrates.
    Legacy,
    /// SNP: page state change and PVALIDATE.
    Snp,
}

/// The number of KVM_HC_MAP_GPA_RANGE (Linux `include/uapi/linux/kvm_para.h`).
pub const MAP_GPA_RANGE: u64 = 12;

/// The arguments of KVM_HC_MAP_GPA_RANGE: address, 4 KiB pages, attributes (bits 3 to 0 page size,
/// here always 4 KiB; bit 4 private).
pub const fn map_gpa_range(range: GpaRange, to: Privacy) -> [u64; 4] {
    let attributes = match to {
        Privacy::Private => 1 << 4,
        Privacy::Shared => 0,
    };
    let pages = range.bytes() / PageSize::Size4K.bytes();
    [range.start(), pages, attributes, 0]
}

/// A conversion of a range to private or to shared.
///
/// | guest | to | steps |
/// |---|---|---|
/// | SNP | shared | flush, PVALIDATE (clear) every page, page state change of every page |
/// | SNP | private | flush, page state change of every page, PVALIDATE (set) every page |
/// | SEV, SEV-ES | either | flush, KVM_HC_MAP_GPA_RANGE |
///
/// PVALIDATE needs a page that is assigned to the guest, so it comes before the change to shared and
/// after the one to private. The contents of pages after a conversion are undefined in every case, and of
/// the host's choosing where there is no SNP: write before you read.
///
/// Page states are changed one 4 KiB page at a time by the MSR protocol, which works from the first
/// instruction on. **The buffer in the GHCB page, with up to 253 entries in an exit, is not
/// offered.**
#[derive(Clone, Debug)]
pub struct Convert {
    range: GpaRange,
    to: Privacy,
    kind: Kind,
    coherent: bool,
    validate: Validate,
    /// The part that the host has not confirmed.
    unconfirmed: GpaRange,
    at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Start,
    Flushing,
    Validating,
    Asking,
    Done,
    Failed(Cause),
}

impl Convert {
    /// To make `range` what `to` says.
    ///
    /// # Errors
    /// The range ends above 2^52.
    pub fn new(range: GpaRange, to: Privacy, kind: Kind) -> Result<Self, RangeError> {
        Ok(Self {
            range,
            to,
            kind,
            coherent: false,
            validate: Validate::new(range, to == Privacy::Private)?,
            unconfirmed: range,
            at: At::Start,
        })
    }

    /// Says that the processor keeps private and shared aliases coherent in its caches
    /// (SME_COHERENT, CPUID 8000001Fh, EAX bit 10). The default is that it does not.
    #[must_use]
    pub const fn coherent(mut self, coherent: bool) -> Self {
        self.coherent = coherent;
        self
    }

    /// With another answer to PVALIDATE's carry flag.
    #[must_use]
    pub fn unchanged(mut self, unchanged: Unchanged) -> Self {
        self.validate = self.validate.unchanged(unchanged);
        self
    }

    /// The range that is converted: what a [`Progress::Flush`] is about.
    pub const fn range(&self) -> GpaRange {
        self.range
    }

    /// The next step. `last` is what came of the last one; `None` at first, after a flush, and where
    /// a step was not executed.
    pub fn next(&mut self, last: Option<Reply>) -> Progress {
        match self.at {
            At::Start => {
                self.at = At::Flushing;
                Progress::Flush(Flush::sev(self.coherent))
            }
            At::Flushing => {
                let first = match (self.kind, self.to) {
                    (Kind::Snp, Privacy::Shared) => At::Validating,
                    _ => At::Asking,
                };
                self.go(first)
            }
            At::Validating => match (self.validate.next(last), self.to) {
                (Progress::Done, Privacy::Shared) => self.go(At::Asking),
                // Cleared is not shared: nothing is done yet.
                (Progress::Failed(error), Privacy::Shared) => self.fail(error.cause),
                (step, _) => step,
            },
            At::Asking => match last.map_or(Ok(()), |answer| self.confirm(answer)) {
                Ok(()) if !self.unconfirmed.is_empty() => self.request(),
                Ok(()) if self.kind == Kind::Snp && self.to == Privacy::Private => {
                    self.go(At::Validating)
                }
                Ok(()) => self.go(At::Done),
                Err(cause) => self.fail(cause),
            },
            At::Done => Progress::Done,
            At::Failed(cause) => self.fail(cause),
        }
    }

    fn go(&mut self, at: At) -> Progress {
        self.at = at;
        self.next(None)
    }

    fn fail(&mut self, cause: Cause) -> Progress {
        self.at = At::Failed(cause);
        // Assigned is not validated: of a range to become private nothing is done yet.
        let rest = match self.to {
            Privacy::Shared => self.unconfirmed,
            Privacy::Private => self.range,
        };
        Progress::Failed(ConvertError { rest, cause })
    }

    fn request(&self) -> Progress {
        match self.kind {
            Kind::Legacy => Progress::Hypercall(MAP_GPA_RANGE, map_gpa_range(self.range, self.to)),
            Kind::Snp => {
                Progress::GhcbMsr(msr::page_state_request(self.unconfirmed.start(), self.to))
            }
        }
    }

    fn confirm(&mut self, answer: Reply) -> Result<(), Cause> {
        match (self.kind, answer) {
            (Kind::Legacy, Reply::Hypercall(0)) => {
                self.unconfirmed = self.unconfirmed.without(self.unconfirmed.bytes());
                Ok(())
            }
            (Kind::Legacy, Reply::Hypercall(answer)) => Err(Cause::Hypercall(answer as i64)),
            (Kind::Snp, Reply::GhcbMsr(response)) => match msr::page_state(response) {
                Ok(()) => {
                    self.unconfirmed = self.unconfirmed.without(PageSize::Size4K.bytes());
                    Ok(())
                }
                Err(ResponseError::Refused(error)) => Err(Cause::PageState(error)),
                Err(_) => Err(Cause::Response(response)),
            },
            _ => Err(Cause::OutOfStep),
        }
    }
}
