//! MapGPA of TDG.VP.VMCALL: asks the host to map a range as private or as shared.

use super::convert::{Limits, Progress};
use super::{Cause, CompletionStatus, ConvertError, Gpaw, Regs, VmcallStatus};
use crate::{GpaRange, Privacy, RangeError};

/// The MapGPA loop (GHCI, "MapGPA of TDG.VP.VMCALL").
///
/// A host may answer RETRY with, in R11, the address to go on from: KVM does when an interrupt
/// comes between two of its 2 MiB pieces. That address comes from the host, so it is taken only
/// if it is a page of what remains, with the shared bit as it was in R12; and only so many RETRYs in
/// a row may bring no progress.
///
/// MapGPA alone makes nothing private: the pages that come must be accepted. See
/// [`Convert`](super::Convert).
#[derive(Clone, Debug)]
pub struct MapGpa {
    rest: GpaRange,
    to: Privacy,
    gpaw: Gpaw,
    limits: Limits,
    stalled: u32,
    failed: Option<Cause>,
}

impl MapGpa {
    /// The sub-function's number.
    pub const FUNCTION: u64 = 0x1_0001;

    /// To map `range` as `to`.
    ///
    /// # Errors
    /// The range reaches the shared bit.
    pub const fn new(range: GpaRange, to: Privacy, gpaw: Gpaw) -> Result<Self, RangeError> {
        match gpaw.check(range) {
            Ok(rest) => Ok(Self {
                rest,
                to,
                gpaw,
                limits: Limits::DEFAULT,
                stalled: 0,
                failed: None,
            }),
            Err(error) => Err(error),
        }
    }

    /// With other limits.
    #[must_use]
    pub const fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The part that the host has not confirmed yet.
    pub const fn rest(&self) -> GpaRange {
        self.rest
    }

    /// The next step; never [`Progress::Flush`]. `last` is what the last call brought back, `None`
    /// where it was not executed.
    pub fn next(&mut self, last: Option<&Regs>) -> Progress {
        if let (Some(regs), None, false) = (last, self.failed, self.rest.is_empty()) {
            self.failed = self.answer(regs).err();
        }
        match self.failed {
            Some(cause) => Progress::Failed(ConvertError {
                rest: self.rest,
                cause,
            }),
            None if self.rest.is_empty() => Progress::Done,
            None => Progress::Call(self.call()),
        }
    }

    /// Start and end both carry the mask bit, or neither; the length is computed before it is put
    /// on, so that no arithmetic is done on addresses with bits that are not address.
    fn call(&self) -> Regs {
        let bytes = self.rest.bytes();
        let start = self.gpaw.join(self.rest.start(), self.to);
        Regs::vmcall(Self::FUNCTION, [start, bytes, 0, 0])
    }

    fn answer(&mut self, regs: &Regs) -> Result<(), Cause> {
        let status = CompletionStatus(regs.rax);
        if !status.is_success() {
            return Err(Cause::Module(status));
        }
        match VmcallStatus(regs.r10) {
            VmcallStatus::SUCCESS => {
                self.rest = self.rest.without(self.rest.bytes());
                Ok(())
            }
            VmcallStatus::RETRY => self.retry(regs.r11),
            status => Err(Cause::Host {
                status,
                at: regs.r11,
            }),
        }
    }

    fn retry(&mut self, answer: u64) -> Result<(), Cause> {
        let start = self.gpaw.join(self.rest.start(), self.to);
        let done = match answer.checked_sub(start) {
            Some(done) if done < self.rest.bytes() && done % 4096 == 0 => done,
            _ => return Err(Cause::RetryOutside { answer }),
        };
        if done > 0 {
            self.stalled = 0;
            self.rest = self.rest.without(done);
            return Ok(());
        }
        self.stalled += 1;
        if self.stalled >= self.limits.stalled_retries {
            return Err(Cause::NoProgress {
                tries: self.stalled,
            });
        }
        Ok(())
    }
}
