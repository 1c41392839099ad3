//! Going through a range in the largest pages that apply.

use crate::{GpaRange, PageSize};

/// The rest of a range, and the page at its start that is tried now.
///
/// Every page size is tried where it is aligned and fits; a size that is refused at one place is
/// tried again at the next.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    rest: GpaRange,
    size: PageSize,
    largest: PageSize,
}

impl Pages {
    pub(crate) fn new(range: GpaRange, largest: PageSize) -> Self {
        let mut pages = Self {
            rest: range,
            size: PageSize::Size4K,
            largest,
        };
        pages.choose(largest);
        pages
    }

    pub(crate) const fn rest(&self) -> GpaRange {
        self.rest
    }

    pub(crate) const fn is_done(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) const fn gpa(&self) -> u64 {
        self.rest.start()
    }

    pub(crate) const fn size(&self) -> PageSize {
        self.size
    }

    /// The page is done.
    pub(crate) fn advance(&mut self) {
        self.rest = self.rest.without(self.size.bytes());
        self.choose(self.largest);
    }

    /// The page is too large: the next smaller size. `None` below 4 KiB.
    #[must_use]
    pub(crate) fn shrink(&mut self) -> Option<()> {
        let smaller = self.size.smaller()?;
        self.choose(smaller);
        Some(())
    }

    /// No sizes above `largest`, from the next page on.
    pub(crate) fn limit(&mut self, largest: PageSize) {
        self.largest = largest;
    }

    fn choose(&mut self, limit: PageSize) {
        if let Some(size) = self.rest.largest_page(limit) {
            self.size = size;
        }
    }
}
