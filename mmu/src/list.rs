//! The contents of the mirror, for reports and for the teardown.

use crate::entry::{EMPTY, decode};
use crate::mirror::Mirror;
use crate::node::{Dir, ENTRIES, Leaf, Node, below};
use crate::sync::Ordering;
use crate::{Gfn, Level, Page, PrivateSpte};

/// The kind of a page that [`Mirror::drain`] lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// A page of the guest.
    Page,
    /// A page of the Secure-EPT.
    Table,
}

/// Counts of the mirror's contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// 4 KiB pages, blocked ones among them.
    pub pages_4k: u64,
    /// 2 MiB pages, blocked ones among them.
    pub pages_2m: u64,
    /// Pages that are blocked.
    pub blocked: u64,
    /// Pages of the Secure-EPT, without the root.
    pub tables: u64,
    /// Bytes of host memory that the mirror took for its nodes.
    pub bytes: u64,
}

impl Mirror {
    /// Hands out every page that the firmware holds for this guest, each once: guest pages, blocked or
    /// not, and pages of the Secure-EPT after the pages that they map. The root's page is not among
    /// them. The mirror is empty afterwards.
    ///
    /// It is the teardown's list: once the key is released the Secure-EPT cannot be read any more
    /// (TDH.MEM.SEPT.RD answers TDX_TD_KEYS_NOT_CONFIGURED).
    pub fn drain(&mut self, mut f: impl FnMut(Page, PageKind)) {
        // The root goes with the arena that its pointers lead into.
        let empty = Self::empty(self.top, self.port);
        let old = core::mem::replace(self, empty);
        old.list(&mut |_, level, entry, after| {
            let (page, size, kind) = match entry {
                PrivateSpte::Mapped(p) | PrivateSpte::Blocked(p) => (p, level, PageKind::Page),
                PrivateSpte::Table(p) | PrivateSpte::BlockedTable(p) if after => {
                    (p, Level::Size4K, PageKind::Table)
                }
                _ => return,
            };
            // SAFETY: `list` shows each entry once (a table once `after`), and `old` is dropped.
            f(unsafe { old.take_page(page, size) }, kind);
        });
    }

    /// Calls `f` for every entry that is not empty, in the order of frames, tables before what is
    /// below them. Entries that other threads add meanwhile may be missed.
    pub fn for_each(&self, mut f: impl FnMut(Gfn, Level, PrivateSpte)) {
        self.list(&mut |gfn, level, entry, after| {
            if !after {
                f(gfn, level, entry);
            }
        });
    }

    /// True if the mirror maps nothing, not even tables. The cost does not depend on its contents.
    pub fn is_empty(&self) -> bool {
        self.root.is_empty()
    }

    /// Counts what is there.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats {
            bytes: (self.arena.reserved() + size_of::<Dir>()) as u64,
            ..Stats::default()
        };
        self.for_each(|_, level, entry| match entry {
            PrivateSpte::Table(_) | PrivateSpte::BlockedTable(_) => stats.tables += 1,
            _ => {
                stats.blocked += u64::from(matches!(entry, PrivateSpte::Blocked(_)));
                if level == Level::Size4K {
                    stats.pages_4k += 1;
                } else {
                    stats.pages_2m += 1;
                }
            }
        });
        stats
    }

    /// Every entry; tables twice, before and `after` what is below.
    fn list(&self, f: &mut impl FnMut(Gfn, Level, PrivateSpte, bool)) {
        // SAFETY: `top` is the level of the root.
        unsafe { self.list_dir(&self.root, self.top, 0, f) };
    }

    /// # Safety
    /// `at` is the level of `dir`.
    unsafe fn list_dir(
        &self,
        dir: &Dir,
        at: Level,
        base: u64,
        f: &mut impl FnMut(Gfn, Level, PrivateSpte, bool),
    ) {
        for i in 0..ENTRIES {
            let entry = decode(dir.words[i].load(Ordering::Acquire));
            if entry == PrivateSpte::Absent {
                continue;
            }
            let first = base + i as u64 * at.frames();
            let gfn = Gfn::new(first);
            f(gfn, at, entry, false);
            // SAFETY: the caller's.
            match unsafe { dir.below(i, at) } {
                // SAFETY: one level further down.
                Some(Node::Dir(next)) => unsafe { self.list_dir(next, below(at), first, f) },
                Some(Node::Leaf(leaf)) => list_leaf(leaf, first, f),
                None => {
                    for (gfn, leaf) in &self.aside {
                        if at == Level::Size2M && *gfn == first {
                            // SAFETY: a node of this mirror that is out of the tree and changed
                            // only under `&mut self`.
                            list_leaf(unsafe { leaf.as_ref() }, first, f);
                        }
                    }
                }
            }
            if let PrivateSpte::Table(_) | PrivateSpte::BlockedTable(_) = entry {
                f(gfn, at, entry, true);
            }
        }
    }
}

fn list_leaf(leaf: &Leaf, base: u64, f: &mut impl FnMut(Gfn, Level, PrivateSpte, bool)) {
    for (i, word) in leaf.words.iter().enumerate() {
        let word = word.load(Ordering::Acquire);
        let entry = decode(word);
        if word != EMPTY && entry != PrivateSpte::Absent {
            f(Gfn::new(base + i as u64), Level::Size4K, entry, false);
        }
    }
}
