//! Ranges of guest-physical memory, always whole pages, never wrapping.

use core::fmt;

/// Bytes in the smallest page.
const PAGE: u64 = 4096;

/// Whom a page belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privacy {
    /// The guest alone can read it.
    Private,
    /// Guest and host read and write it.
    Shared,
}

/// The size of a page.
///
/// The numbers are those that TDX puts in a GPA operand (TDX module ABI, "GPA and level").
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K = 0,
    /// 2 MiB.
    Size2M = 1,
    /// 1 GiB.
    Size1G = 2,
}

impl PageSize {
    /// Every size, largest first: the order in which sizes are tried.
    pub const DESCENDING: [Self; 3] = [Self::Size1G, Self::Size2M, Self::Size4K];

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        PAGE << (9 * self as u32)
    }

    /// The number of 4 KiB pages.
    pub const fn pages(self) -> u64 {
        self.bytes() / PAGE
    }

    /// The next smaller size.
    pub const fn smaller(self) -> Option<Self> {
        match self {
            Self::Size1G => Some(Self::Size2M),
            Self::Size2M => Some(Self::Size4K),
            Self::Size4K => None,
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size4K => "4k",
            Self::Size2M => "2m",
            Self::Size1G => "1g",
        })
    }
}

/// Guest-physical pages `start..end`, without the bit that tells private from shared.
///
/// ```
/// use kvm_ops_guest::{GpaRange, PageSize, RangeError};
/// let range = GpaRange::new(0x1ff000, 0x402000)?;
/// assert_eq!((range.start(), range.end()), (0x1ff000, 0x601000));
/// assert_eq!(range.largest_page(PageSize::Size1G), Some(PageSize::Size4K));
/// assert_eq!(GpaRange::new(0x800, 0x1000), Err(RangeError::Unaligned));
/// # Ok::<(), RangeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GpaRange {
    start: u64,
    end: u64,
}

impl GpaRange {
    /// `bytes` from `start` on.
    ///
    /// # Errors
    /// Not whole 4 KiB pages, nothing at all, or beyond 64 bits.
    pub const fn new(start: u64, bytes: u64) -> Result<Self, RangeError> {
        if !start.is_multiple_of(PAGE) || !bytes.is_multiple_of(PAGE) {
            return Err(RangeError::Unaligned);
        }
        if bytes == 0 {
            return Err(RangeError::Empty);
        }
        match start.checked_add(bytes) {
            Some(end) => Ok(Self { start, end }),
            None => Err(RangeError::TooHigh),
        }
    }

    /// `pages` pages of 4 KiB from `start` on.
    ///
    /// # Errors
    /// As [`GpaRange::new`].
    pub const fn pages(start: u64, pages: u64) -> Result<Self, RangeError> {
        match pages.checked_mul(PAGE) {
            Some(bytes) => Self::new(start, bytes),
            None => Err(RangeError::TooHigh),
        }
    }

    /// The first byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The byte after the last.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// The size in bytes. 0 only for the rest of a range that is done.
    pub const fn bytes(self) -> u64 {
        self.end - self.start
    }

    /// Returns whether nothing remains.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The largest page, not above `limit`, that begins at the range's start and ends inside it.
    pub fn largest_page(self, limit: PageSize) -> Option<PageSize> {
        PageSize::DESCENDING
            .into_iter()
            .find(|size| *size <= limit && self.begins_with(*size))
    }

    /// Returns whether a page of `size` begins at the range's start and ends inside it.
    pub const fn begins_with(self, size: PageSize) -> bool {
        self.start.is_multiple_of(size.bytes()) && self.bytes() >= size.bytes()
    }

    /// Fails unless the whole range lies below `limit`.
    pub(crate) const fn below(self, limit: u64) -> Result<Self, RangeError> {
        if self.end > limit {
            return Err(RangeError::TooHigh);
        }
        Ok(self)
    }

    /// The range without its first `bytes`; the caller has seen that there are so many.
    pub(crate) const fn without(self, bytes: u64) -> Self {
        let start = match self.start.checked_add(bytes) {
            Some(start) if start < self.end => start,
            _ => self.end,
        };
        Self {
            start,
            end: self.end,
        }
    }
}

impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// Why something is not a range of pages.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RangeError {
    /// It is empty.
    Empty,
    /// Its start or length is not a multiple of 4 KiB.
    Unaligned,
    /// It reaches the bit that tells private from shared, or the end of the address space.
    TooHigh,
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "range is empty",
            Self::Unaligned => "range is not made of 4k pages",
            Self::TooHigh => "range ends above the guest-physical address width",
        })
    }
}

impl core::error::Error for RangeError {}
