//! PVALIDATE over a range.

use super::{Cause, ConvertError, Progress, Pvalidate, Reply, RmpCode, Validated};
use crate::pages::Pages;
use crate::{GpaRange, PageSize, RangeError};

/// The C-bit is 47 or above on every processor with SEV; addresses end below 2^52.
const LIMIT: u64 = 1 << 52;

/// The treatment of a PVALIDATE that changed nothing (its carry flag).
///
/// A guest validates each page exactly once while it is private: only then does an address always
/// lead to the same memory. A host can assign a *second* page at an address that the guest has
/// validated. The guest gets #VC at its next access, as if it had never validated; when it then
/// validates "again", both pages are valid at that address, and the host can switch between them
/// for ever: it replays old contents whenever it likes, and no instruction tells. Only the
/// guest's own record of what it has validated stops this. The carry flag is the one sign that the
/// record is wrong, and so an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Unchanged {
    /// Stop with [`Cause::Unchanged`].
    #[default]
    Refuse,
    /// Go on. For a guest that cannot know, such as a kernel after a firmware that left no record.
    Allow,
}

/// Sets or clears *validated* of every page of a range, once, in the largest sizes.
///
/// 2 MiB is tried where it applies; FAIL_SIZEMISMATCH says that the host assigned 4 KiB pages there.
/// The other mismatch, a 4 KiB operand on a page that the host assigned as 2 MiB, exits to the host,
/// which splits its page; a guest does not see it.
///
/// PVALIDATE leaves contents alone: after it a page holds whatever its ciphertext decrypts to.
/// The user of the page writes it first.
#[derive(Clone, Debug)]
pub struct Validate {
    pages: Pages,
    validate: bool,
    unchanged: Unchanged,
    failed: Option<Cause>,
}

impl Validate {
    /// To set (or clear) *validated* in `range`.
    ///
    /// # Errors
    /// The range ends above 2^52.
    pub fn new(range: GpaRange, validate: bool) -> Result<Self, RangeError> {
        Ok(Self {
            pages: Pages::new(range.below(LIMIT)?, PageSize::Size2M),
            validate,
            unchanged: Unchanged::default(),
            failed: None,
        })
    }

    /// With another answer to the carry flag.
    #[must_use]
    pub const fn unchanged(mut self, unchanged: Unchanged) -> Self {
        self.unchanged = unchanged;
        self
    }

    /// The next step: [`Progress::Pvalidate`], [`Progress::Done`] or [`Progress::Failed`].
    pub fn next(&mut self, last: Option<Reply>) -> Progress {
        if let (Some(answer), None, false) = (last, self.failed, self.pages.is_done()) {
            self.failed = self.answer(answer).err();
        }
        match self.failed {
            Some(cause) => Progress::Failed(ConvertError {
                rest: self.pages.rest(),
                cause,
            }),
            None if self.pages.is_done() => Progress::Done,
            None => Progress::Pvalidate(Pvalidate {
                gpa: self.pages.gpa(),
                size: self.pages.size(),
                validate: self.validate,
            }),
        }
    }

    fn answer(&mut self, answer: Reply) -> Result<(), Cause> {
        let Reply::Pvalidate(Validated { code, unchanged }) = answer else {
            return Err(Cause::OutOfStep);
        };
        let size = self.pages.size();
        match (code, self.unchanged) {
            (RmpCode::SUCCESS, Unchanged::Refuse) if unchanged => Err(Cause::Unchanged { size }),
            (RmpCode::SUCCESS, _) => {
                self.pages.advance();
                Ok(())
            }
            (RmpCode::FAIL_SIZEMISMATCH, _) => self.pages.shrink().ok_or(Cause::Rmp { code, size }),
            _ => Err(Cause::Rmp { code, size }),
        }
    }
}
