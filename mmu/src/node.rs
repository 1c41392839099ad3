//! The nodes of the tree.
//!
//! A directory mirrors a table above the last level, a leaf one of the last. Each entry is a word
//! ([`entry`](crate::entry)); a directory holds beside it the pointer to the node below. A walk
//! reads the pointers alone: one load a level.
//!
//! Invariants that the unsafe code of this crate relies on:
//! 1. The pointer of an entry is null unless the entry is a table, or a table that a thread is just
//!    adding. It points to a directory where the entry's level is above 2 MiB, and to a leaf where
//!    it is 2 MiB.
//! 2. It points to a node of the mirror's own arena, which no other entry points to.
//! 3. A node goes back to the arena only under `&mut Mirror`, after its entry's pointer was nulled.

use core::ptr::NonNull;

use crate::Level;
use crate::sync::{AtomicPtr, AtomicU64, Ordering};

/// Entries in a table. The model checker is spared the 510 that no model uses.
pub(crate) const ENTRIES: usize = if cfg!(loom) { 2 } else { 512 };

/// A table of the last level.
#[repr(C, align(64))]
pub(crate) struct Leaf {
    pub(crate) words: [AtomicU64; ENTRIES],
}

/// A table of any other level.
#[repr(C, align(64))]
pub(crate) struct Dir {
    below: [AtomicPtr<Dir>; ENTRIES],
    pub(crate) words: [AtomicU64; ENTRIES],
}

/// The node below an entry.
#[derive(Clone, Copy)]
pub(crate) enum Node<'a> {
    Dir(&'a Dir),
    Leaf(&'a Leaf),
}

/// The node below an entry, as the arena made it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owned {
    Dir(NonNull<Dir>),
    Leaf(NonNull<Leaf>),
}

impl Owned {
    fn erased(self) -> *mut Dir {
        match self {
            Owned::Dir(p) => p.as_ptr(),
            Owned::Leaf(p) => p.as_ptr().cast(),
        }
    }
}

/// The index of the entry in a table of `level` that covers a frame.
#[inline]
pub(crate) const fn index(gfn: u64, level: Level) -> usize {
    (gfn >> (9 * level as u32)) as usize & (ENTRIES - 1)
}

/// The level below.
#[inline]
pub(crate) const fn below(level: Level) -> Level {
    match level {
        Level::Size4K | Level::Size2M => Level::Size4K,
        Level::Size1G => Level::Size2M,
        Level::Size512G => Level::Size1G,
        Level::Size256T => Level::Size512G,
    }
}

impl Leaf {
    /// Returns whether it is empty; for exclusive callers.
    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|w| w.load(Ordering::Relaxed) == 0)
    }
}

impl Dir {
    /// The node below entry `i`, if the entry is a table.
    ///
    /// # Safety
    /// `level` is this directory's; the mirror is borrowed for `'a`.
    #[inline]
    pub(crate) unsafe fn below<'a>(&'a self, i: usize, level: Level) -> Option<Node<'a>> {
        // SAFETY: the caller's.
        let node = unsafe { self.owned(i, level) }?;
        // SAFETY: by invariants 1 and 2 it is a live node of that type, and by 3 it stays so while
        // the mirror is borrowed. Acquire, in `owned`, orders what was written into it before it was linked.
        // Shared references to nodes coexist, since nodes are made of atomics; `&mut` to a node is
        // made only under `&mut Mirror`, for a node that no reference is left to.
        Some(unsafe {
            match node {
                Owned::Dir(p) => Node::Dir(p.as_ref()),
                Owned::Leaf(p) => Node::Leaf(p.as_ref()),
            }
        })
    }

    /// The same as a pointer.
    ///
    /// # Safety
    /// `level` is this directory's.
    #[inline]
    pub(crate) unsafe fn owned(&self, i: usize, level: Level) -> Option<Owned> {
        let p = NonNull::new(self.below[i].load(Ordering::Acquire))?;
        Some(if level == Level::Size2M {
            Owned::Leaf(p.cast())
        } else {
            Owned::Dir(p)
        })
    }

    /// Returns whether a node is below entry `i`.
    #[inline]
    pub(crate) fn has_below(&self, i: usize) -> bool {
        !self.below[i].load(Ordering::Acquire).is_null()
    }

    /// Links a node below entry `i`. The caller holds the entry frozen, or the mirror exclusively,
    /// and hands over a node of the right type that nothing points to.
    #[inline]
    pub(crate) fn link(&self, i: usize, node: Owned) {
        self.below[i].store(node.erased(), Ordering::Release);
    }

    /// Takes the node below entry `i` out of the tree, for exclusive callers.
    ///
    /// # Safety
    /// `level` is this directory's.
    pub(crate) unsafe fn unlink(&self, i: usize, level: Level) -> Option<Owned> {
        // SAFETY: the caller's.
        let node = unsafe { self.owned(i, level) };
        self.below[i].store(core::ptr::null_mut(), Ordering::Relaxed);
        node
    }

    /// Returns whether it is empty; for exclusive callers.
    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|w| w.load(Ordering::Relaxed) == 0)
    }
}

#[cfg(loom)]
impl Leaf {
    pub(crate) fn new() -> Self {
        Self {
            words: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Dir {
    pub(crate) fn new() -> Self {
        Self {
            below: core::array::from_fn(|_| AtomicPtr::new(core::ptr::null_mut())),
            words: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}
