//! Building a guest's memory at the speed of first touch, and walking along it.

use kvm_ops_core::Field;

use crate::entry::decode;
use crate::mirror::{Lookup, Mapped, Mirror, lookup_leaf};
use crate::node::{ENTRIES, Leaf, index};
use crate::sync::Ordering;
use crate::{Error, Gfn, Level, MirrorHooks, Page, PrivateSpte, Result};

impl Mirror {
    /// Maps 4 KiB pages at every frame of a range that has none, alone: no entry is frozen, and each
    /// table is walked to once. Returns how many.
    ///
    /// `page_of` gives the page for a frame; it is not asked for frames that are mapped already.
    ///
    /// # Errors
    /// The error of `page_of` or of a hook: the pages before stay mapped, and the last one went back
    /// through [`free_page`](MirrorHooks::free_page). [`Error::Exists`] at a blocked page or table. [`Error::Invalid`] for a
    /// range that ends beyond the mirror, and a page whose address does not fit 64 bits.
    pub fn map_range(
        &mut self,
        hooks: &impl MirrorHooks,
        first: Gfn,
        pages: u64,
        mut page_of: impl FnMut(Gfn) -> Result<Page>,
    ) -> Result<u64> {
        let range = self.range(first, pages)?;
        let mut at = range.first;
        let mut done = 0;
        while at < range.end {
            let end = range
                .end
                .min((at | (Level::Size2M.frames() - 1)).saturating_add(1));
            if let Ok(leaf) = self.walk(at) {
                done += self.fill(hooks, leaf, (at, end), &mut page_of)?;
                at = end;
                continue;
            }
            // No leaf: the first page brings the tables with it.
            match self.lookup(Gfn::new(at)) {
                Lookup {
                    entry: PrivateSpte::Absent,
                    ..
                } => {
                    let gfn = Gfn::new(at);
                    let mapped = self.map(hooks, gfn, Level::Size4K, || page_of(gfn))?;
                    done += u64::from(mapped == Mapped::New);
                    at += 1;
                }
                Lookup {
                    entry: PrivateSpte::Mapped(_),
                    ..
                } => at = end,
                _ => return Err(Error::Exists(Field::Gfn, at)),
            }
        }
        Ok(done)
    }

    /// Fills the empty entries for frames `at` to `end` of one leaf.
    #[inline]
    fn fill(
        &self,
        hooks: &impl MirrorHooks,
        leaf: &Leaf,
        (at, end): (u64, u64),
        page_of: &mut impl FnMut(Gfn) -> Result<Page>,
    ) -> Result<u64> {
        let lo = index(at, Level::Size4K);
        let words = &leaf.words[lo..ENTRIES.min(lo + (end - at) as usize)];
        let mut there = 0;
        for (i, word) in words.iter().enumerate() {
            let gfn = at + i as u64;
            match decode(word.load(Ordering::Relaxed)) {
                PrivateSpte::Absent => {
                    let gfn = Gfn::new(gfn);
                    let page = (page_of(gfn)?, Level::Size4K);
                    let added = self.add(hooks, (gfn, Level::Size4K), page, PrivateSpte::Mapped)?;
                    word.store(added, Ordering::Relaxed);
                }
                PrivateSpte::Mapped(_) => there += 1,
                _ => return Err(Error::Exists(Field::Gfn, gfn)),
            }
        }
        Ok(end - at - there)
    }

    /// A walker that remembers the table it was at last: for frames that lie close together.
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor {
            mirror: self,
            base: 0,
            leaf: None,
        }
    }
}

/// A walk that goes on where it was. It borrows the mirror, so no table goes away under it.
#[derive(Clone, Copy)]
pub struct Cursor<'a> {
    mirror: &'a Mirror,
    /// The first frame of `leaf`.
    base: u64,
    leaf: Option<&'a Leaf>,
}

impl core::fmt::Debug for Cursor<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Cursor")
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

impl<'a> Cursor<'a> {
    /// As [`Mirror::lookup`].
    #[inline]
    pub fn lookup(&mut self, gfn: Gfn) -> Lookup {
        match self.leaf_of(gfn) {
            Some(leaf) => lookup_leaf(leaf, gfn),
            None => self.mirror.lookup(gfn),
        }
    }

    /// As [`Mirror::map`].
    ///
    /// # Errors
    /// As [`Mirror::map`].
    #[inline]
    pub fn map(
        &mut self,
        hooks: &impl MirrorHooks,
        gfn: Gfn,
        level: Level,
        page: impl FnOnce() -> Result<Page>,
    ) -> Result<Mapped> {
        if level == Level::Size4K
            && let Some(leaf) = self.leaf_of(gfn)
        {
            return self.mirror.set_leaf(hooks, leaf, gfn, page);
        }
        self.mirror.map(hooks, gfn, level, page)
    }

    #[inline]
    fn leaf_of(&mut self, gfn: Gfn) -> Option<&'a Leaf> {
        let base = gfn.get() & !(Level::Size2M.frames() - 1);
        if self.leaf.is_none() || base != self.base {
            self.leaf = if gfn.get() < self.mirror.frames() {
                self.mirror.walk(gfn.get()).ok()
            } else {
                None
            };
            self.base = base;
        }
        self.leaf
    }
}
