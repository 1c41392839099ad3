//! Nodes cut from chunks of zeroed memory.
//!
//! Nodes in chunks are reached through few TLB entries and are touched first by their first entry.
//! One allocation for each node measures up to four times slower when a guest's memory is built.

use alloc::alloc::{alloc_zeroed, dealloc};
use alloc::vec::Vec;
use core::alloc::Layout;
use core::mem::size_of;
use core::ptr::NonNull;

use crate::node::{Dir, Leaf, Owned};
use crate::{Error, Level, Result};

/// The unit and the alignment of chunks: a leaf.
const UNIT: usize = size_of::<Leaf>();
const DIR_UNITS: usize = size_of::<Dir>() / UNIT;
const _: () = assert!(size_of::<Dir>() == DIR_UNITS * UNIT);
const _: () = assert!(size_of::<[Leaf; 2]>() == 2 * UNIT);

/// Units of the first chunk: a guest of few pages.
const FIRST: usize = 16;
/// Units of the largest: as large as a huge page of the host.
const LARGEST: usize = 512;

pub(crate) struct Nodes {
    chunks: Vec<(NonNull<u8>, Layout)>,
    /// The uncut rest of the last chunk, `left` units.
    next: NonNull<u8>,
    left: usize,
    /// Nodes that came back, empty.
    leaves: Vec<NonNull<Leaf>>,
    dirs: Vec<NonNull<Dir>>,
    /// Nodes cut so far. Both lists have room for as many, so that giving back allocates nothing.
    cut: usize,
    reserved: usize,
}

impl Nodes {
    pub(crate) fn new() -> Self {
        Self {
            chunks: Vec::new(),
            next: NonNull::dangling(),
            left: 0,
            leaves: Vec::new(),
            dirs: Vec::new(),
            cut: 0,
            reserved: 0,
        }
    }

    pub(crate) fn take(&mut self, level: Level) -> Result<Owned> {
        if level == Level::Size2M {
            if let Some(leaf) = self.leaves.pop() {
                return Ok(Owned::Leaf(leaf));
            }
            // Zeroed memory is an empty leaf: its words are integers, and 0 is `EMPTY`.
            Ok(Owned::Leaf(self.cut(1)?.cast()))
        } else {
            if let Some(dir) = self.dirs.pop() {
                return Ok(Owned::Dir(dir));
            }
            // Likewise an empty directory: its pointers are null.
            Ok(Owned::Dir(self.cut(DIR_UNITS)?.cast()))
        }
    }

    pub(crate) fn free(&mut self, node: Owned) {
        match node {
            Owned::Leaf(leaf) => self.leaves.push(leaf),
            Owned::Dir(dir) => self.dirs.push(dir),
        }
    }

    pub(crate) fn reserved(&self) -> usize {
        self.reserved
    }

    /// The next `units` units.
    fn cut(&mut self, units: usize) -> Result<NonNull<u8>> {
        // Room for this node and for what may be left of a chunk.
        self.room(DIR_UNITS)?;
        if self.left < units {
            while self.left > 0 {
                let leaf = self.advance(1).cast();
                self.leaves.push(leaf);
            }
            self.grow()?;
        }
        Ok(self.advance(units))
    }

    fn room(&mut self, more: usize) -> Result<()> {
        let want = self.cut + more;
        let grow = |len: usize| want.saturating_sub(len);
        let (leaves, dirs) = (grow(self.leaves.len()), grow(self.dirs.len()));
        self.leaves
            .try_reserve(leaves)
            .and_then(|()| self.dirs.try_reserve(dirs))
            .map_err(|_| Error::NoMemory)
    }

    fn advance(&mut self, units: usize) -> NonNull<u8> {
        let at = self.next;
        self.left -= units;
        self.cut += 1;
        // SAFETY: `units` were left of the chunk, so this stays inside it or one past its end.
        self.next = unsafe { at.add(units * UNIT) };
        at
    }

    fn grow(&mut self) -> Result<()> {
        let units = (self.reserved / UNIT).clamp(FIRST, LARGEST);
        self.chunks.try_reserve(1).map_err(|_| Error::NoMemory)?;
        // Not asked for with the alignment of a unit, because an allocator may then write the
        // zeros that fresh pages have anyway (std's does), which touches the chunk twice.
        let layout =
            Layout::from_size_align((units + 1) * UNIT, 16).map_err(|_| Error::NoMemory)?;
        // SAFETY: the layout's size is not zero.
        let Some(chunk) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            return Err(Error::NoMemory);
        };
        self.chunks.push((chunk, layout));
        self.reserved += layout.size();
        let skip = chunk.addr().get().next_multiple_of(UNIT) - chunk.addr().get();
        // SAFETY: at most one unit is skipped of the `units + 1`.
        self.next = unsafe { chunk.add(skip) };
        self.left = units;
        Ok(())
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for &(chunk, layout) in &self.chunks {
            // SAFETY: allocated with this layout in `grow`, freed nowhere else. The owner
            // has given up the pointers to its nodes.
            unsafe { dealloc(chunk.as_ptr(), layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use std::collections::HashSet;

    #[test]
    fn nodes_are_empty_aligned_apart_and_used_again() {
        let mut nodes = Nodes::new();
        let mut units = HashSet::new();
        let mut taken = Vec::new();
        let nodes_wanted = if cfg!(miri) { 60 } else { 3000 };
        for i in 0..nodes_wanted {
            let level = if i % 7 == 3 {
                Level::Size1G
            } else {
                Level::Size2M
            };
            let node = nodes.take(level).unwrap();
            let (at, size) = match node {
                Owned::Leaf(p) => {
                    // SAFETY: a live node of `nodes`.
                    assert!(unsafe { p.as_ref() }.is_empty());
                    (p.addr().get(), 1)
                }
                Owned::Dir(p) => {
                    // SAFETY: as above.
                    assert!(unsafe { p.as_ref() }.is_empty());
                    (p.addr().get(), DIR_UNITS)
                }
            };
            assert_eq!(at % UNIT, 0);
            for unit in 0..size {
                assert!(units.insert(at + unit * UNIT), "handed out twice");
            }
            taken.push(node);
        }
        let reserved = nodes.reserved();
        assert!(reserved >= units.len() * UNIT && reserved <= 3 * units.len() * UNIT);
        let count = taken.len();
        taken.into_iter().for_each(|node| nodes.free(node));
        for i in 0..count {
            let level = if i % 7 == 3 {
                Level::Size1G
            } else {
                Level::Size2M
            };
            nodes.take(level).unwrap();
        }
        assert_eq!(nodes.reserved(), reserved, "nothing new was allocated");
    }
}
