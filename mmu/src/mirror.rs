//! The tree, and what threads do to it at once: mapping and looking up.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::ptr::NonNull;

use kvm_ops_core::Field;

use crate::arena::Arena;
use crate::entry::{EMPTY, FROZEN, Frozen, decode};
use crate::node::{Dir, Leaf, Node, below, index};
use crate::sync::{AtomicU64, Ordering};
use crate::{Error, Gfn, Level, MirrorHooks, Page, PortId, PrivateSpte, Result};

/// The result of [`Mirror::map`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// The page is mapped now.
    New,
    /// Another thread is at this entry, at a table above it, or taking memory for a table. Try again.
    Retry,
    /// The entry is not empty: it maps a page already (a spurious fault), the page is blocked, or a
    /// table is there although a 2 MiB page was wanted. No hook was called and no page taken. A
    /// blocked entry needs [`Mirror::unblock`], or a second call of the `zap` that stopped half way.
    Occupied(Lookup),
}

/// The entry that decides about a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The level where the walk ended.
    pub level: Level,
    /// The entry, never [`PrivateSpte::Table`]. An entry that a thread is just filling is absent.
    pub entry: PrivateSpte,
}

/// The mirror of a Secure-EPT: a copy in host memory of what the firmware's tables say.
///
/// Faults take `&self`, many at once; operations that must be alone take `&mut self`. There is no lock
/// inside: put it into a [`ReaderLock`](crate::ReaderLock). The root has no page here,
/// because the firmware makes it with the VM (TDH.MNG.ADDCX).
///
/// The mirror owns the pages that its entries name, all from one port. Dropping it calls no hook and
/// loses the pages: [`drain`](Self::drain) it first.
pub struct Mirror {
    pub(crate) root: Box<Dir>,
    pub(crate) top: Level,
    frames: u64,
    /// The source of its pages.
    pub(crate) port: PortId,
    pub(crate) arena: Arena,
    /// Leaves below blocked tables, by their first frame: the remains of a promotion that could
    /// neither be finished nor undone. No walk goes there.
    pub(crate) aside: Vec<(u64, NonNull<Leaf>)>,
    /// Something was blocked since the last flush.
    pub(crate) unflushed: bool,
}

// SAFETY: every pointer in it goes to a node that it owns itself, and nodes are bound to no thread.
unsafe impl Send for Mirror {}
// SAFETY: under `&self` nodes are only read and changed through atomics, and `aside` is only read.
unsafe impl Sync for Mirror {}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror")
            .field("root", &self.top)
            .field("unflushed", &self.unflushed)
            .finish_non_exhaustive()
    }
}

impl Mirror {
    /// A mirror whose root entries are of level `root`: [`Level::Size512G`] for 4-level tables
    /// (48 bits), [`Level::Size256T`] for 5-level ones (57 bits). Its pages are those of `port`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another level.
    pub fn new(root: Level, port: PortId) -> Result<Self> {
        if root < Level::Size512G {
            return Err(Error::Invalid(Field::Level, root as u64));
        }
        Ok(Self::empty(root, port))
    }

    pub(crate) fn empty(top: Level, port: PortId) -> Self {
        Self {
            root: Box::new(Dir::new()),
            top,
            frames: top.frames() << 9,
            port,
            arena: Arena::new(),
            aside: Vec::new(),
            unflushed: false,
        }
    }

    /// The source of its pages.
    pub const fn port(&self) -> PortId {
        self.port
    }

    /// The level of the root's entries.
    pub fn root_level(&self) -> Level {
        self.top
    }

    /// The number of frames that it covers; larger frame numbers are refused.
    pub const fn frames(&self) -> u64 {
        self.frames
    }

    /// Maps a page, as a fault does: adds the missing tables, then the page that `page` supplies.
    ///
    /// `page` is called only while this thread holds the empty entry, so one walk decides whether a
    /// page is needed. It must not call the mirror. The page is 4 KiB or 2 MiB; TDH.MEM.PAGE.AUG
    /// has no other size.
    ///
    /// ```compile_fail,E0382
    /// # use kvm_ops_mmu::{Gfn, Level, Mirror, MirrorHooks, Page};
    /// # use kvm_ops_core::PagePort;
    /// fn free_a_mapped_page(mirror: &Mirror, hooks: &impl MirrorHooks, port: &impl PagePort, page: Page) {
    ///     let _ = mirror.map(hooks, Gfn::new(1), Level::Size4K, || Ok(page));
    ///     let _ = port.free(page); // the mirror owns it
    /// }
    /// ```
    ///
    /// # Errors
    /// The error of `page` or of a hook. The entry is then empty as before, and the page and a table
    /// page taken for it went back through [`free_page`](MirrorHooks::free_page). Tables added above
    /// stay. [`Error::Invalid`] for a level of 1 GiB or more, a frame that is beyond the mirror's or not
    /// aligned to the level, and a page of another level or port. [`Error::NoMemory`] if the mirror
    /// cannot grow.
    #[inline]
    pub fn map(
        &self,
        hooks: &impl MirrorHooks,
        gfn: Gfn,
        level: Level,
        page: impl FnOnce() -> Result<Page>,
    ) -> Result<Mapped> {
        self.check(gfn, level)?;
        if level == Level::Size4K
            && let Ok(leaf) = self.walk(gfn.get())
        {
            return self.set_leaf(hooks, leaf, gfn, page);
        }
        self.map_slowly(hooks, gfn, level, page)
    }

    /// [`map`](Self::map) where a table is missing, or not the last level is wanted.
    #[cold]
    fn map_slowly(
        &self,
        hooks: &impl MirrorHooks,
        gfn: Gfn,
        level: Level,
        page: impl FnOnce() -> Result<Page>,
    ) -> Result<Mapped> {
        let mut dir: &Dir = &self.root;
        let mut at = self.top;
        while at > level {
            let i = index(gfn.get(), at);
            // SAFETY: `at` is the level of `dir`, which the loop keeps.
            let node = match unsafe { dir.below(i, at) } {
                Some(node) => node,
                None => match self.add_table(hooks, dir, at, gfn)? {
                    Ok(node) => node,
                    Err(outcome) => return Ok(outcome),
                },
            };
            match node {
                Node::Dir(next) => dir = next,
                Node::Leaf(leaf) => return self.set_leaf(hooks, leaf, gfn, page),
            }
            at = below(at);
        }
        self.set(hooks, &dir.words[index(gfn.get(), at)], gfn, level, page)
    }

    #[inline]
    fn check(&self, gfn: Gfn, level: Level) -> Result<()> {
        if level > Level::Size2M {
            return Err(Error::Invalid(Field::Level, level as u64));
        }
        if gfn.get() >= self.frames || !gfn.is_aligned(level) {
            return Err(Error::Invalid(Field::Gfn, gfn.get()));
        }
        Ok(())
    }

    /// Adds the table below the entry of `dir` that covers `gfn`.
    fn add_table<'a>(
        &'a self,
        hooks: &impl MirrorHooks,
        dir: &'a Dir,
        at: Level,
        gfn: Gfn,
    ) -> Result<Result<Node<'a>, Mapped>> {
        let i = index(gfn.get(), at);
        let word = &dir.words[i];
        let Some(frozen) = Frozen::take(word) else {
            let seen = word.load(Ordering::Acquire);
            // SAFETY: `at` is the level of `dir`. A table's pointer is stored before its word.
            if let Some(node) = unsafe { dir.below(i, at) } {
                return Ok(Ok(node));
            }
            return Ok(Err(occupied(seen, at)));
        };
        let Some(node) = self.arena.try_take(at)? else {
            return Ok(Err(Mapped::Retry));
        };
        let first = Gfn::new(gfn.get() & !(at.frames() - 1));
        let size = Level::Size4K;
        let word = hooks
            .alloc_table()
            .and_then(|table| self.add(hooks, (first, at), (table, size), PrivateSpte::Table))
            .inspect_err(|_| self.arena.give_back(node))?;
        // The pointer first: a thread that sees the word can go down.
        dir.link(i, node);
        frozen.publish(word);
        // SAFETY: `at` is the level of `dir`.
        Ok(unsafe { dir.below(i, at) }.ok_or(Mapped::Retry))
    }

    /// The entry that decides about a frame. No hook is called: this is what the mirror is for.
    ///
    /// A frame beyond the mirror's is absent.
    #[inline]
    pub fn lookup(&self, gfn: Gfn) -> Lookup {
        if gfn.get() < self.frames
            && let Ok(leaf) = self.walk(gfn.get())
        {
            return lookup_leaf(leaf, gfn);
        }
        self.lookup_above(gfn)
    }

    /// [`lookup`](Self::lookup) where the walk ends above the last level.
    #[cold]
    fn lookup_above(&self, gfn: Gfn) -> Lookup {
        if gfn.get() >= self.frames {
            return Lookup {
                level: self.top,
                entry: PrivateSpte::Absent,
            };
        }
        loop {
            match self.walk(gfn.get()) {
                Ok(leaf) => return lookup_leaf(leaf, gfn),
                Err((dir, level)) => {
                    let word = &dir.words[index(gfn.get(), level)];
                    match decode(word.load(Ordering::Acquire)) {
                        // Added since its pointer was read: the way is there now.
                        PrivateSpte::Table(_) => {}
                        entry => return Lookup { level, entry },
                    }
                }
            }
        }
    }

    /// The leaf that covers a frame, or the directory where the walk to it ends. The frame is one of
    /// the mirror's.
    ///
    /// Written out level by level: as a loop over levels it takes half as long again.
    #[inline(always)]
    pub(crate) fn walk(&self, gfn: u64) -> Result<&Leaf, (&Dir, Level)> {
        let mut dir: &Dir = &self.root;
        if self.top == Level::Size256T {
            // SAFETY: `top` is the root's level.
            dir = unsafe { step(dir, gfn, Level::Size256T) }?;
        }
        // SAFETY: the root's level, or the one below it.
        dir = unsafe { step(dir, gfn, Level::Size512G) }?;
        // SAFETY: one below.
        dir = unsafe { step(dir, gfn, Level::Size1G) }?;
        // SAFETY: one below.
        match unsafe { dir.below(index(gfn, Level::Size2M), Level::Size2M) } {
            Some(Node::Leaf(leaf)) => Ok(leaf),
            _ => Err((dir, Level::Size2M)),
        }
    }

    #[inline]
    pub(crate) fn set_leaf(
        &self,
        hooks: &impl MirrorHooks,
        leaf: &Leaf,
        gfn: Gfn,
        page: impl FnOnce() -> Result<Page>,
    ) -> Result<Mapped> {
        let word = &leaf.words[index(gfn.get(), Level::Size4K)];
        self.set(hooks, word, gfn, Level::Size4K, page)
    }

    /// Freezes the entry, takes the page, calls the hook, then publishes or restores.
    #[inline]
    fn set(
        &self,
        hooks: &impl MirrorHooks,
        word: &AtomicU64,
        gfn: Gfn,
        level: Level,
        page: impl FnOnce() -> Result<Page>,
    ) -> Result<Mapped> {
        let mut seen = word.load(Ordering::Acquire);
        if seen == EMPTY {
            if let Some(frozen) = Frozen::take(word) {
                let page = (page()?, level);
                frozen.publish(self.add(hooks, (gfn, level), page, PrivateSpte::Mapped)?);
                return Ok(Mapped::New);
            }
            seen = word.load(Ordering::Acquire);
        }
        Ok(occupied(seen, level))
    }
}

/// One level down, or where the walk ends.
///
/// # Safety
/// `level` is the level of `dir`, which is borrowed from the mirror.
#[inline(always)]
unsafe fn step(dir: &Dir, gfn: u64, level: Level) -> Result<&Dir, (&Dir, Level)> {
    // SAFETY: the caller's.
    match unsafe { dir.below(index(gfn, level), level) } {
        Some(Node::Dir(next)) => Ok(next),
        _ => Err((dir, level)),
    }
}

#[inline]
pub(crate) fn lookup_leaf(leaf: &Leaf, gfn: Gfn) -> Lookup {
    let word = leaf.words[index(gfn.get(), Level::Size4K)].load(Ordering::Acquire);
    Lookup {
        level: Level::Size4K,
        entry: decode(word),
    }
}

/// The answer for an entry in which something else was seen.
fn occupied(seen: u64, level: Level) -> Mapped {
    match seen {
        EMPTY | FROZEN => Mapped::Retry,
        _ => Mapped::Occupied(Lookup {
            level,
            entry: decode(seen),
        }),
    }
}
