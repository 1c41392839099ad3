//! Walks over ranges.

use crate::entry::decode;
use crate::mirror::Mirror;
use crate::node::{Dir, ENTRIES, Leaf, Node, below};
use crate::owner::change_of;
use crate::sync::{AtomicU64, Ordering};
use crate::{Gfn, Level, PrivateSpte, Result, SpteChange};

/// An entry that is not empty.
pub(crate) struct Entry<'a> {
    pub(crate) word: &'a AtomicU64,
    pub(crate) gfn: u64,
    pub(crate) level: Level,
    pub(crate) entry: PrivateSpte,
}

impl<'a> Entry<'a> {
    pub(crate) fn of(word: &'a AtomicU64, gfn: u64, level: Level) -> Self {
        Self {
            word,
            gfn,
            level,
            entry: decode(word.load(Ordering::Acquire)),
        }
    }

    /// The change of this entry to `new`.
    #[inline]
    pub(crate) fn to(&self, new: PrivateSpte) -> SpteChange {
        change_of(Gfn::new(self.gfn), self.level, self.entry, new)
    }
}

/// Frames `first` to `end`, the latter excluded.
#[derive(Clone, Copy)]
pub(crate) struct Frames {
    pub(crate) first: u64,
    pub(crate) end: u64,
}

impl Frames {
    /// The indices of the entries in a table at `base` and of level `at` that have a frame of the range.
    #[inline]
    fn entries(self, base: u64, at: Level) -> core::ops::Range<usize> {
        let size = at.frames();
        let lo = self.first.saturating_sub(base) / size;
        let hi = self.end.saturating_sub(base).div_ceil(size);
        lo as usize..(hi.min(ENTRIES as u64) as usize)
    }
}

impl Mirror {
    /// Calls `f` for every entry of level `floor` or above that touches the range and is a page or
    /// a blocked table, in the order of frames. Entries below a blocked table are not visited.
    #[inline]
    pub(crate) fn visit(
        &self,
        range: Frames,
        floor: Level,
        f: &mut impl FnMut(Entry<'_>) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: `top` is the level of the root.
        unsafe { visit_dir(&self.root, self.top, 0, range, floor, f) }
    }

    /// Calls `f` for every directory whose entries are of level `at` and the index of each of its
    /// linked entries that touches the range, with the entry's first frame.
    pub(crate) fn visit_tables(
        &self,
        range: Frames,
        at: Level,
        f: &mut impl FnMut(&Dir, usize, u64) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: `top` is the level of the root.
        unsafe { tables_of(&self.root, self.top, 0, range, at, f) }
    }
}

/// # Safety
/// `at` is the level of `dir`.
unsafe fn visit_dir(
    dir: &Dir,
    at: Level,
    base: u64,
    range: Frames,
    floor: Level,
    f: &mut impl FnMut(Entry<'_>) -> Result<()>,
) -> Result<()> {
    for i in range.entries(base, at) {
        let gfn = base + i as u64 * at.frames();
        // SAFETY: the caller's. Nodes freed by `f` are not visited again: `f` is called for
        // entries without a node.
        match unsafe { dir.below(i, at) } {
            Some(_) if at <= floor => {}
            // SAFETY: one level further down.
            Some(Node::Dir(next)) => unsafe { visit_dir(next, below(at), gfn, range, floor, f) }?,
            Some(Node::Leaf(leaf)) => visit_leaf(leaf, gfn, range, f)?,
            None => visit_word(&dir.words[i], gfn, at, f)?,
        }
    }
    Ok(())
}

#[inline]
pub(crate) fn visit_leaf(
    leaf: &Leaf,
    base: u64,
    range: Frames,
    f: &mut impl FnMut(Entry<'_>) -> Result<()>,
) -> Result<()> {
    for i in range.entries(base, Level::Size4K) {
        visit_word(&leaf.words[i], base + i as u64, Level::Size4K, f)?;
    }
    Ok(())
}

#[inline]
fn visit_word(
    word: &AtomicU64,
    gfn: u64,
    level: Level,
    f: &mut impl FnMut(Entry<'_>) -> Result<()>,
) -> Result<()> {
    match decode(word.load(Ordering::Acquire)) {
        // The callers read the pointer of a table and visit its node.
        PrivateSpte::Absent | PrivateSpte::Table(_) => Ok(()),
        entry => f(Entry {
            word,
            gfn,
            level,
            entry,
        }),
    }
}

/// # Safety
/// `at` is the level of `dir`.
unsafe fn tables_of(
    dir: &Dir,
    at: Level,
    base: u64,
    range: Frames,
    wanted: Level,
    f: &mut impl FnMut(&Dir, usize, u64) -> Result<()>,
) -> Result<()> {
    for i in range.entries(base, at) {
        let gfn = base + i as u64 * at.frames();
        if at == wanted {
            if dir.has_below(i) {
                f(dir, i, gfn)?;
            }
            continue;
        }
        // SAFETY: the caller's; `f` takes away nodes below `wanted`, never one on the way to it.
        if let Some(Node::Dir(next)) = unsafe { dir.below(i, at) } {
            // SAFETY: one level further down.
            unsafe { tables_of(next, below(at), gfn, range, wanted, f) }?;
        }
    }
    Ok(())
}
