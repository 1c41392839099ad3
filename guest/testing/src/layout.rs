//! The pages with which a guest starts.

use kvm_ops_guest::{GpaRange, PageSize};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

const PAGE: u64 = PageSize::Size4K.bytes();

/// A page of the launch.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) gpa: u64,
    pub(crate) bytes: Box<[u8; PAGE as usize]>,
    pub(crate) is_measured: bool,
}

/// A part of the layout.
#[derive(Clone, Debug)]
enum Part {
    /// Accepted from the start, with contents.
    Launched(Page),
    Pending(PageSize),
    Shared,
    Reserved,
}

/// The pages with which a guest starts, by address.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    parts: BTreeMap<u64, Part>,
    error: Option<LayoutError>,
}

impl Layout {
    /// Contents of whole pages, the last one filled up with zeros, at `gpa`.
    pub(crate) fn launch(&mut self, gpa: u64, contents: &[u8], is_measured: bool) {
        let bytes = (contents.len() as u64).next_multiple_of(PAGE);
        let Some(range) = self.checked(gpa..gpa.saturating_add(bytes), PAGE) else {
            return;
        };
        let pages = contents.chunks(PAGE as usize);
        for (gpa, chunk) in (range.start()..range.end())
            .step_by(PAGE as usize)
            .zip(pages)
        {
            let mut bytes = Box::new([0; PAGE as usize]);
            bytes[..chunk.len()].copy_from_slice(chunk);
            let page = Page {
                gpa,
                bytes,
                is_measured,
            };
            self.insert(gpa, PAGE, Part::Launched(page));
        }
    }

    /// Pages of zeros that the guest has from the start.
    pub(crate) fn accepted(&mut self, range: Range<u64>) {
        let Some(range) = self.checked(range, PAGE) else {
            return;
        };
        for gpa in (range.start()..range.end()).step_by(PAGE as usize) {
            let page = Page {
                gpa,
                bytes: Box::new([0; PAGE as usize]),
                is_measured: false,
            };
            self.insert(gpa, PAGE, Part::Launched(page));
        }
    }

    /// Pages that the guest has to accept.
    pub(crate) fn pending_pages(&mut self, range: Range<u64>, size: PageSize) {
        let Some(range) = self.checked(range, size.bytes()) else {
            return;
        };
        for gpa in (range.start()..range.end()).step_by(size.bytes() as usize) {
            self.insert(gpa, size.bytes(), Part::Pending(size));
        }
    }

    /// Pages that are shared from the start.
    pub(crate) fn share(&mut self, range: Range<u64>) {
        let Some(range) = self.checked(range, PAGE) else {
            return;
        };
        for gpa in (range.start()..range.end()).step_by(PAGE as usize) {
            self.insert(gpa, PAGE, Part::Shared);
        }
    }

    /// Keeps a page out of the other parts: the machine fills it.
    pub(crate) fn reserve(&mut self, gpa: u64) {
        let page = gpa..gpa.saturating_add(PAGE);
        if self.checked(page, PAGE).is_some() {
            self.insert(gpa, PAGE, Part::Reserved);
        }
    }

    /// Fails if a range was no range, two overlap, or one lies outside of memory.
    pub(crate) fn check(&self, ram: u64) -> Result<(), LayoutError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let last = self.parts.last_key_value();
        match last.map(|(gpa, part)| (*gpa, gpa + part.bytes())) {
            Some((gpa, end)) if end > ram => Err(LayoutError::NoMemory { gpa, ram }),
            _ => Ok(()),
        }
    }

    pub(crate) fn launched(&self) -> impl Iterator<Item = &Page> {
        self.parts.values().filter_map(|part| match part {
            Part::Launched(page) => Some(page),
            Part::Pending(_) | Part::Shared | Part::Reserved => None,
        })
    }

    pub(crate) fn pending(&self) -> impl Iterator<Item = (u64, PageSize)> {
        self.parts.iter().filter_map(|(gpa, part)| match part {
            Part::Pending(size) => Some((*gpa, *size)),
            Part::Launched(_) | Part::Shared | Part::Reserved => None,
        })
    }

    pub(crate) fn shared(&self) -> impl Iterator<Item = u64> {
        self.parts.iter().filter_map(|(gpa, part)| match part {
            Part::Shared => Some(*gpa),
            Part::Launched(_) | Part::Pending(_) | Part::Reserved => None,
        })
    }

    /// The range, unless it is none; the first error is kept.
    fn checked(&mut self, range: Range<u64>, unit: u64) -> Option<GpaRange> {
        let bytes = range.end.saturating_sub(range.start);
        match GpaRange::new(range.start, bytes) {
            Ok(pages) if pages.start().is_multiple_of(unit) && bytes.is_multiple_of(unit) => {
                Some(pages)
            }
            _ => {
                let error = LayoutError::Range { range, unit };
                self.error.get_or_insert(error);
                None
            }
        }
    }

    fn insert(&mut self, gpa: u64, bytes: u64, part: Part) {
        let before = self.parts.range(..gpa.saturating_add(bytes)).next_back();
        if before.is_some_and(|(at, before)| at + before.bytes() > gpa) {
            self.error.get_or_insert(LayoutError::Twice { gpa });
            return;
        }
        self.parts.insert(gpa, part);
    }
}

impl Part {
    fn bytes(&self) -> u64 {
        match self {
            Self::Launched(_) | Self::Shared | Self::Reserved => PAGE,
            Self::Pending(size) => size.bytes(),
        }
    }
}

/// Why a layout cannot be.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// A part is empty, or not made of pages of its size.
    Range {
        /// The part.
        range: Range<u64>,
        /// The size of its pages in bytes.
        unit: u64,
    },
    /// Two parts overlap.
    Twice {
        /// A page that is in both.
        gpa: u64,
    },
    /// A part lies above memory.
    NoMemory {
        /// A page of it.
        gpa: u64,
        /// The size of memory in bytes.
        ram: u64,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range { range, unit } => {
                let Range { start, end } = range;
                write!(
                    f,
                    "{start:#x}..{end:#x} is not made of pages of {unit:#x} bytes"
                )
            }
            Self::Twice { gpa } => write!(f, "page {gpa:#x} is in the layout twice"),
            Self::NoMemory { gpa, ram } => {
                write!(f, "page {gpa:#x} is beyond the end of memory at {ram:#x}")
            }
        }
    }
}

impl std::error::Error for LayoutError {}
