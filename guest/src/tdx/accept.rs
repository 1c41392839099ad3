//! TDG.MEM.PAGE.ACCEPT: takes pages into use that the host gave.

use super::convert::{Limits, Progress};
use super::{Cause, CompletionStatus, ConvertError, Gpaw, Regs, leaf};
use crate::pages::Pages;
use crate::{GpaRange, PageSize, RangeError};

/// RCX of TDG.MEM.PAGE.ACCEPT: level in bits 2 to 0, page in bits 51 to 12. It is not an address.
///
/// The level goes beside the address here and nowhere else, so that no variable ever holds an
/// address with a level in it. `gpa` is private, aligned to `size`.
pub const fn accept_operand(gpa: u64, size: PageSize) -> u64 {
    let level = size as u64;
    let page = gpa & 0x000F_FFFF_FFFF_F000;
    page | level
}

/// The treatment of a page that is in use as private already.
///
/// Accepting zeroes a page, and the TDX module does it once for each page that the host gives. So a
/// guest that accepts a page which it **has** loses what it holds, and a host can bring that about:
/// it takes an accepted page away, gives a new one at the same address, and waits for the guest to
/// accept "again". The guest then goes on with zeros where its data was (a key, a flag, a counter)
/// without any fault. Only the guest's own knowledge of what it has accepted stops this, which is
/// why an unexpected PAGE_ALREADY_ACCEPTED is an error: the guest's knowledge is wrong. It means
/// that an earlier conversion to shared never happened, or that two parts of the guest believe that
/// the page is theirs. The page then also holds old contents, not the zeros that its new user
/// counts on.
///
/// The status has bit 63 clear. Code that only looks at that bit takes it for success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AlreadyAccepted {
    /// Stop with [`Cause::AlreadyAccepted`].
    #[default]
    Refuse,
    /// Leave the page as it is, with its contents, and go on. For a guest that cannot know, such as
    /// a kernel started by firmware that accepted an unknown part of memory; it must not count on
    /// zeros.
    Keep,
}

/// Accepts every page of a range once, in the largest sizes.
///
/// At each address 1 GiB, 2 MiB and 4 KiB are tried in this order, those that are aligned there
/// and fit in what remains. The module refuses a size the host did not map (PAGE_SIZE_MISMATCH), and
/// the next smaller one is tried. 1 GiB depends on the module: version 1.5 knows 4 KiB and 2 MiB
/// only, and answers OPERAND_INVALID. This is remembered, and costs one TDCALL in a range.
///
/// A page that the host did not give makes the TDCALL exit to the host, which may give it and
/// enter again: the guest sees nothing of it. A host that does not keeps the vCPU from running, which
/// it always can.
#[derive(Clone, Debug)]
pub struct Accept {
    pages: Pages,
    already: AlreadyAccepted,
    limits: Limits,
    busy: u32,
    failed: Option<Cause>,
}

impl Accept {
    /// To accept `range`.
    ///
    /// # Errors
    /// The range reaches the shared bit.
    pub fn new(range: GpaRange, gpaw: Gpaw) -> Result<Self, RangeError> {
        let range = gpaw.check(range)?;
        Ok(Self {
            pages: Pages::new(range, PageSize::Size1G),
            already: AlreadyAccepted::default(),
            limits: Limits::DEFAULT,
            busy: 0,
            failed: None,
        })
    }

    /// With sizes up to `largest` only.
    #[must_use]
    pub fn largest(mut self, largest: PageSize) -> Self {
        self.pages = Pages::new(self.pages.rest(), largest);
        self
    }

    /// With another answer to PAGE_ALREADY_ACCEPTED.
    #[must_use]
    pub const fn already_accepted(mut self, already: AlreadyAccepted) -> Self {
        self.already = already;
        self
    }

    /// With other limits.
    #[must_use]
    pub const fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The part that is not accepted yet.
    pub const fn rest(&self) -> GpaRange {
        self.pages.rest()
    }

    /// The next step; never [`Progress::Flush`]. `last` is what the last call brought back, `None`
    /// where it was not executed.
    pub fn next(&mut self, last: Option<&Regs>) -> Progress {
        if let (Some(regs), None, false) = (last, self.failed, self.pages.is_done()) {
            self.failed = self.answer(CompletionStatus(regs.rax)).err();
        }
        match self.failed {
            Some(cause) => Progress::Failed(ConvertError {
                rest: self.pages.rest(),
                cause,
            }),
            None if self.pages.is_done() => Progress::Done,
            None => Progress::Call(Regs {
                rax: leaf::MEM_PAGE_ACCEPT,
                rcx: accept_operand(self.pages.gpa(), self.pages.size()),
                ..Regs::default()
            }),
        }
    }

    fn answer(&mut self, status: CompletionStatus) -> Result<(), Cause> {
        match (status.code(), self.already) {
            (CompletionStatus::SUCCESS, _)
            | (CompletionStatus::PAGE_ALREADY_ACCEPTED, AlreadyAccepted::Keep) => {
                self.busy = 0;
                self.pages.advance();
                Ok(())
            }
            (CompletionStatus::PAGE_ALREADY_ACCEPTED, AlreadyAccepted::Refuse) => {
                Err(Cause::AlreadyAccepted {
                    size: self.pages.size(),
                })
            }
            (CompletionStatus::PAGE_SIZE_MISMATCH, _) => {
                self.pages.shrink().ok_or(Cause::Module(status))
            }
            (CompletionStatus::OPERAND_INVALID, _) if self.pages.size() == PageSize::Size1G => {
                self.pages.limit(PageSize::Size2M);
                self.pages.shrink().ok_or(Cause::Module(status))
            }
            (CompletionStatus::OPERAND_BUSY, _) => self.stalled(status),
            _ => Err(Cause::Module(status)),
        }
    }

    fn stalled(&mut self, status: CompletionStatus) -> Result<(), Cause> {
        self.busy += 1;
        if self.busy >= self.limits.busy {
            return Err(Cause::Busy {
                tries: self.busy,
                status,
            });
        }
        Ok(())
    }
}
