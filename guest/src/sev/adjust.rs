//! RMPADJUST over a range: what lower privilege levels may do.

use super::{Cause, ConvertError, Progress, Reply, RmpCode, Rmpadjust};
use crate::pages::Pages;
use crate::{GpaRange, PageSize, RangeError};

/// A VM privilege level. 0 may do everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Vmpl {
    /// 1.
    One = 1,
    /// 2.
    Two = 2,
    /// 3, the lowest.
    Three = 3,
}

/// The permissions of a VMPL on a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Read.
    pub const READ: Self = Self(1);
    /// Write.
    pub const WRITE: Self = Self(2);
    /// Execute in user mode.
    pub const EXECUTE_USER: Self = Self(4);
    /// Execute in supervisor mode.
    pub const EXECUTE_SUPERVISOR: Self = Self(8);
    /// Everything.
    pub const ALL: Self = Self(15);

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits.
    pub const fn bits(self) -> u8 {
        self.0
    }
}

/// Sets the permissions of a lower VMPL for every page of a validated range.
///
/// PVALIDATE takes all permissions of lower VMPLs away, so this comes after every validation, also
/// of a page that was private before.
#[derive(Clone, Debug)]
pub struct Adjust {
    pages: Pages,
    target: Vmpl,
    permissions: Permissions,
    failed: Option<Cause>,
}

impl Adjust {
    /// To let `target` do `permissions` in `range`, and nothing else.
    ///
    /// # Errors
    /// The range ends above 2^52.
    pub fn new(
        range: GpaRange,
        target: Vmpl,
        permissions: Permissions,
    ) -> Result<Self, RangeError> {
        Ok(Self {
            pages: Pages::new(range.below(1 << 52)?, PageSize::Size2M),
            target,
            permissions,
            failed: None,
        })
    }

    /// The next step: [`Progress::Rmpadjust`], [`Progress::Done`] or [`Progress::Failed`].
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
            None => Progress::Rmpadjust(Rmpadjust {
                gpa: self.pages.gpa(),
                size: self.pages.size(),
                target: self.target,
                permissions: self.permissions,
                vmsa: false,
            }),
        }
    }

    fn answer(&mut self, answer: Reply) -> Result<(), Cause> {
        let Reply::Rmpadjust(code) = answer else {
            return Err(Cause::OutOfStep);
        };
        let size = self.pages.size();
        match code {
            RmpCode::SUCCESS => {
                self.pages.advance();
                Ok(())
            }
            RmpCode::FAIL_SIZEMISMATCH => self.pages.shrink().ok_or(Cause::Rmp { code, size }),
            _ => Err(Cause::Rmp { code, size }),
        }
    }
}
