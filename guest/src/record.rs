//! The guest's own record of what is private.

use crate::{GpaRange, PageSize, Privacy};
use core::fmt;

const PAGE: u64 = PageSize::Size4K.bytes();

/// The pages that the guest holds as private: one bit for each 4 KiB.
///
/// This is what neither the TDX module nor the RMP can know, and what stops the two attacks on a
/// guest that accepts (or validates) a page it has: the host takes the page away and gives
/// another, and a guest that accepts again goes on with zeros ([`tdx::AlreadyAccepted`]) or with a
/// page that the host can swap at will ([`sev::Unchanged`]). With a record, [`claim`](Self::claim)
/// comes before every acceptance and refuses the second, and the #VE or #VC handler asks
/// [`is_private`](Self::is_private): yes means an attack.
///
/// The bits live in memory of the caller, which must itself be private, of course.
///
/// ```
/// use kvm_ops_guest::{GpaRange, Privacy, Record, RecordError};
/// let mut bits = [0; 4];
/// let mut record = Record::new(&mut bits, 0x10_0000).unwrap();
/// let page = GpaRange::pages(0x10_0000, 1)?;
/// record.claim(page).unwrap();
/// let again = RecordError::Already { gpa: 0x10_0000, is: Privacy::Private };
/// assert_eq!(record.claim(page), Err(again));
/// # Ok::<(), kvm_ops_guest::RangeError>(())
/// ```
///
/// [`tdx::AlreadyAccepted`]: crate::tdx::AlreadyAccepted
/// [`sev::Unchanged`]: crate::sev::Unchanged
#[derive(Debug)]
pub struct Record<'a> {
    bits: &'a mut [u64],
    start: u64,
}

impl<'a> Record<'a> {
    /// A record of 64 pages for each of `bits`, from the page `start` on, as `bits` has them: bit 0
    /// of the first is the first page, and set means private. `None` if `start` is no page, or the
    /// last page ends above 64 bits.
    pub fn new(bits: &'a mut [u64], start: u64) -> Option<Self> {
        let bytes = (bits.len() as u64).checked_mul(64 * PAGE)?;
        start.checked_add(bytes)?;
        start.is_multiple_of(PAGE).then_some(Self { bits, start })
    }

    /// Notes that the guest is about to accept or validate `range`.
    ///
    /// # Errors
    /// A page is private already, or not covered; then nothing is noted.
    pub fn claim(&mut self, range: GpaRange) -> Result<(), RecordError> {
        self.turn(range, Privacy::Private)
    }

    /// Notes that the guest is about to make `range` shared, or gave it back to the host.
    ///
    /// # Errors
    /// A page is not private, or not covered; then nothing is noted.
    pub fn release(&mut self, range: GpaRange) -> Result<(), RecordError> {
        self.turn(range, Privacy::Shared)
    }

    /// Returns whether the guest holds the page of this address as private.
    pub fn is_private(&self, gpa: u64) -> bool {
        self.place(gpa)
            .and_then(|(word, bit)| Some(self.bits.get(word)? & bit != 0))
            .unwrap_or(false)
    }

    fn place(&self, gpa: u64) -> Option<(usize, u64)> {
        let page = gpa.checked_sub(self.start)? / PAGE;
        let word = usize::try_from(page / 64).ok()?;
        Some((word, 1 << (page % 64)))
    }

    fn turn(&mut self, range: GpaRange, to: Privacy) -> Result<(), RecordError> {
        let pages = || (range.start()..range.end()).step_by(PAGE as usize);
        for gpa in pages() {
            let covered = self.place(gpa).filter(|(word, _)| *word < self.bits.len());
            if covered.is_none() {
                return Err(RecordError::Outside { gpa });
            }
            if self.is_private(gpa) == (to == Privacy::Private) {
                return Err(RecordError::Already { gpa, is: to });
            }
        }
        for gpa in pages() {
            if let Some((word, bit)) = self.place(gpa)
                && let Some(word) = self.bits.get_mut(word)
            {
                *word ^= bit;
            }
        }
        Ok(())
    }
}

/// Why a record does not change.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordError {
    /// A page is what it should become.
    Already {
        /// The page.
        gpa: u64,
        /// The record of the page.
        is: Privacy,
    },
    /// The record does not cover a page.
    Outside {
        /// The page.
        gpa: u64,
    },
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Already { gpa, is } => {
                let is = match is {
                    Privacy::Private => "private",
                    Privacy::Shared => "shared",
                };
                write!(f, "page {gpa:#x} is {is} already")
            }
            Self::Outside { gpa } => write!(f, "page {gpa:#x} is not in the record"),
        }
    }
}

impl core::error::Error for RecordError {}
