//! Private and shared frames.

use core::fmt;
use core::ops::Range;

use kvm_ops_core::Field;
use rangemap::RangeSet;

use crate::{Error, Gfn, Privacy, Result};

/// The private or shared attribute of every frame (KVM_SET_MEMORY_ATTRIBUTES, MapGPA).
///
/// A frame that was never set has the default that the map was made with. A TD's memory begins
/// private: its image is added as private pages, and what is to be shared the guest asks for
/// (`TDG.VP.VMCALL<MapGPA>`). KVM's default is the other: no attribute means shared.
///
/// Kept are runs of frames that differ from the default, merged where they touch: a guest with few
/// shared windows costs a few entries, however large it is.
#[derive(Clone, PartialEq, Eq)]
pub struct Attributes {
    default: Privacy,
    other: RangeSet<u64>,
}

impl Attributes {
    /// Every frame has the attribute `default`.
    pub fn new(default: Privacy) -> Self {
        Self {
            default,
            other: RangeSet::new(),
        }
    }

    /// The attribute of a frame.
    pub fn get(&self, gfn: Gfn) -> Privacy {
        if self.other.contains(&gfn.get()) {
            opposite(self.default)
        } else {
            self.default
        }
    }

    /// Gives `pages` frames from `first` on the attribute `to`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no pages, or a range that ends beyond the last frame number.
    pub fn set(&mut self, first: Gfn, pages: u64, to: Privacy) -> Result<()> {
        let range = range(first, pages)?;
        if to == self.default {
            self.other.remove(range);
        } else {
            self.other.insert(range);
        }
        Ok(())
    }

    /// The runs of equal attribute that make up a range, in order: first frame, pages, attribute.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn runs(
        &self,
        first: Gfn,
        pages: u64,
    ) -> Result<impl Iterator<Item = (Gfn, u64, Privacy)> + '_> {
        let range = range(first, pages)?;
        let end = range.end;
        let mut at = range.start;
        let mut others = self.other.overlapping(range).peekable();
        Ok(core::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let start = at;
            let privacy = match others.peek() {
                Some(run) if run.start <= at => {
                    at = run.end.min(end);
                    others.next();
                    opposite(self.default)
                }
                Some(run) => {
                    at = run.start;
                    self.default
                }
                None => {
                    at = end;
                    self.default
                }
            };
            Some((Gfn::new(start), at - start, privacy))
        }))
    }

    /// Returns whether the whole range has the attribute `privacy`.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn all(&self, first: Gfn, pages: u64, privacy: Privacy) -> Result<bool> {
        Ok(self.runs(first, pages)?.all(|run| run.2 == privacy))
    }

    /// The runs that differ from the default, in order: first frame and pages.
    pub fn exceptions(&self) -> impl Iterator<Item = (Gfn, u64)> + '_ {
        self.other
            .iter()
            .map(|run| (Gfn::new(run.start), run.end - run.start))
    }
}

impl Default for Attributes {
    /// Every frame is private, as a TD begins.
    fn default() -> Self {
        Self::new(Privacy::Private)
    }
}

impl fmt::Debug for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} but for ", self.default)?;
        f.debug_list().entries(self.exceptions()).finish()
    }
}

const fn opposite(privacy: Privacy) -> Privacy {
    match privacy {
        Privacy::Private => Privacy::Shared,
        Privacy::Shared => Privacy::Private,
    }
}

fn range(first: Gfn, pages: u64) -> Result<Range<u64>> {
    if pages == 0 {
        return Err(Error::Invalid(Field::Size, 0));
    }
    match first.get().checked_add(pages) {
        Some(end) => Ok(first.get()..end),
        None => Err(Error::Invalid(Field::Gfn, first.get())),
    }
}
