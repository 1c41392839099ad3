//! The exclusive side: blocking, unblocking and removing ranges.

use kvm_ops_core::Field;

use crate::entry::{EMPTY, encode};
use crate::mirror::Mirror;
use crate::node::{Node, Owned};
use crate::owner::change_of;
use crate::sync::Ordering;
use crate::visit::{Entry, Frames};
use crate::{Error, Gfn, Level, MirrorHooks, Page, Pfn, PrivateSpte, Result};

/// The treatment of tables that [`Mirror::zap`] leaves empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmptyTables {
    /// They stay: the next fault needs no SEPT.ADD. Linux does so while a TD lives.
    Keep,
    /// They are unlinked and freed, which costs one more flush for each level that has any,
    /// because the firmware takes back a table only when it is empty, blocked and flushed.
    Free,
}

/// The result of [`Mirror::zap`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zapped {
    /// Guest pages removed, of any size.
    pub pages: u64,
    /// Tables removed.
    pub tables: u64,
}

impl Mirror {
    /// Removes every page of a range: blocks all, flushes once, removes all.
    ///
    /// For n pages these are n calls to block, one flush and n to remove; nothing at all where
    /// nothing is mapped. Freeing t empty tables of one level costs t, one and t more. A 2 MiB page
    /// that only part of the range covers is [demoted](Self::demote) first.
    ///
    /// # Errors
    /// The error of a hook. Each entry then is what the firmware has: those before the one that
    /// failed are changed, it and those after it are not. Call it again to go on (what is blocked
    /// is not blocked twice), or [`unblock`](Self::unblock) to undo. After [`Removal::Dirty`](crate::Removal::Dirty) the page is leaked and
    /// its error returned. [`Error::Invalid`] for a range that ends beyond the mirror.
    pub fn zap(
        &mut self,
        hooks: &impl MirrorHooks,
        first: Gfn,
        pages: u64,
        empty: EmptyTables,
    ) -> Result<Zapped> {
        let mut zapped = Zapped::default();
        let range = self.range(first, pages)?;
        if pages == 0 {
            return Ok(zapped);
        }
        self.demote_edges(hooks, range)?;
        self.put_back(hooks, range)?;
        self.block_pages(hooks, range)?;
        self.remove(hooks, range, Level::Size4K, &mut zapped)?;
        if empty == EmptyTables::Free {
            self.free_empty(hooks, range, &mut zapped)?;
        }
        Ok(zapped)
    }

    /// Blocks every page of a range and flushes, so that no vCPU reaches them. Returns how many it
    /// blocked. A 2 MiB page that only part of the range covers is demoted first.
    ///
    /// # Errors
    /// As [`zap`](Self::zap).
    pub fn block(&mut self, hooks: &impl MirrorHooks, first: Gfn, pages: u64) -> Result<u64> {
        let range = self.range(first, pages)?;
        if pages == 0 {
            return Ok(0);
        }
        self.demote_edges(hooks, range)?;
        let blocked = self.block_pages(hooks, range)?;
        self.flush(hooks)?;
        Ok(blocked)
    }

    /// Unblocks every blocked page and table of a range, after a flush where one is due. Returns how
    /// many pages. A blocked 2 MiB page is unblocked whole if any of it is in the range.
    ///
    /// # Errors
    /// As [`zap`](Self::zap). [`Error::NoMemory`] if the mirror cannot grow.
    pub fn unblock(&mut self, hooks: &impl MirrorHooks, first: Gfn, pages: u64) -> Result<u64> {
        let range = self.range(first, pages)?;
        if pages == 0 {
            return Ok(0);
        }
        self.flush(hooks)?;
        self.put_back(hooks, range)?;
        let mut unblocked = 0;
        self.visit(range, Level::Size4K, &mut |slot: Entry<'_>| {
            if let PrivateSpte::Blocked(page) = slot.entry {
                change(hooks, &slot, PrivateSpte::Mapped(page))?;
                unblocked += 1;
            }
            Ok(())
        })?;
        self.unblock_tables(hooks, range)?;
        Ok(unblocked)
    }

    /// Flushes if something was blocked since the last flush.
    pub(crate) fn flush(&mut self, hooks: &impl MirrorHooks) -> Result<()> {
        if self.unflushed {
            hooks.flush_private_tlb()?;
            self.unflushed = false;
        }
        Ok(())
    }

    pub(crate) fn range(&self, first: Gfn, pages: u64) -> Result<Frames> {
        let first = first.get();
        match first.checked_add(pages) {
            Some(end) if end <= self.frames() => Ok(Frames { first, end }),
            _ if first >= self.frames() => Err(Error::Invalid(Field::Gfn, first)),
            _ => Err(Error::Invalid(Field::Size, pages)),
        }
    }

    fn demote_edges(&mut self, hooks: &impl MirrorHooks, range: Frames) -> Result<()> {
        for edge in [range.first, range.end] {
            let gfn = Gfn::new(edge);
            if !gfn.is_aligned(Level::Size2M) {
                let found = self.lookup(gfn);
                if let PrivateSpte::Mapped(_) | PrivateSpte::Blocked(_) = found.entry
                    && found.level == Level::Size2M
                {
                    self.demote(hooks, gfn)?;
                }
            }
        }
        Ok(())
    }

    fn block_pages(&mut self, hooks: &impl MirrorHooks, range: Frames) -> Result<u64> {
        let mut blocked = 0;
        let result = self.visit(range, Level::Size4K, &mut |slot: Entry<'_>| {
            if let PrivateSpte::Mapped(page) = slot.entry {
                change(hooks, &slot, PrivateSpte::Blocked(page))?;
                blocked += 1;
            }
            Ok(())
        });
        self.unflushed |= blocked > 0;
        result.map(|()| blocked)
    }

    /// Flushes, then removes what is blocked in the range at `floor` and above.
    fn remove(
        &mut self,
        hooks: &impl MirrorHooks,
        range: Frames,
        floor: Level,
        zapped: &mut Zapped,
    ) -> Result<()> {
        // Entries blocked before the last flush need no other one.
        self.flush(hooks)?;
        self.visit(range, floor, &mut |slot: Entry<'_>| match slot.entry {
            PrivateSpte::Blocked(page) => {
                let page = (page, slot.level);
                hooks.free_page(remove_one(self, hooks, &slot, PrivateSpte::Absent, page)?);
                zapped.pages += 1;
                Ok(())
            }
            PrivateSpte::BlockedTable(table) => {
                let table = (table, Level::Size4K);
                hooks.free_page(remove_one(self, hooks, &slot, PrivateSpte::Absent, table)?);
                zapped.tables += 1;
                Ok(())
            }
            _ => Ok(()),
        })
    }

    /// Frees the empty tables of the range, from the bottom up: a table can be empty only when
    /// those below it are gone.
    fn free_empty(
        &mut self,
        hooks: &impl MirrorHooks,
        range: Frames,
        zapped: &mut Zapped,
    ) -> Result<()> {
        let mut at = Some(Level::Size2M);
        while let Some(level) = at.filter(|level| *level <= self.top) {
            let mut blocked = false;
            let result = self.visit_tables(range, level, &mut |dir, i, gfn| {
                // SAFETY: `visit_tables` gives directories of that level.
                let empty = match unsafe { dir.below(i, level) } {
                    Some(Node::Leaf(leaf)) => leaf.is_empty(),
                    Some(Node::Dir(dir)) => dir.is_empty(),
                    None => false,
                };
                let slot = Entry::of(&dir.words[i], gfn, level);
                let PrivateSpte::Table(table) = slot.entry else {
                    return Ok(());
                };
                if !empty {
                    return Ok(());
                }
                change(hooks, &slot, PrivateSpte::BlockedTable(table))?;
                blocked = true;
                // SAFETY: as above.
                if let Some(node) = unsafe { dir.unlink(i, level) } {
                    self.arena.give_back(node);
                }
                Ok(())
            });
            self.unflushed |= blocked;
            result?;
            if blocked {
                self.remove(hooks, range, level, zapped)?;
            }
            at = level.parent();
        }
        Ok(())
    }

    /// Tables that a zap blocked and could not remove become tables again, empty.
    fn unblock_tables(&mut self, hooks: &impl MirrorHooks, range: Frames) -> Result<()> {
        // The walk ends at blocked tables, so the words can be found before they are changed.
        let mut blocked = alloc::vec::Vec::new();
        self.visit(range, Level::Size2M, &mut |slot: Entry<'_>| {
            if let PrivateSpte::BlockedTable(table) = slot.entry {
                blocked.try_reserve(1).map_err(|_| Error::NoMemory)?;
                blocked.push((slot.gfn, slot.level, table));
            }
            Ok(())
        })?;
        for (gfn, level, table) in blocked {
            let node = self.arena.take(level)?;
            if let Err(error) = self.relink(hooks, gfn, level, table, node) {
                self.arena.give_back(node);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Makes the blocked table of an entry a table again, with `node` below it.
    pub(crate) fn relink(
        &self,
        hooks: &impl MirrorHooks,
        gfn: u64,
        level: Level,
        table: Pfn,
        node: Owned,
    ) -> Result<()> {
        let (old, new) = (PrivateSpte::BlockedTable(table), PrivateSpte::Table(table));
        hooks.set_private_spte(&change_of(Gfn::new(gfn), level, old, new))?;
        if let Some((dir, i)) = self.dir_at(gfn, level) {
            dir.link(i, node);
            dir.words[i].store(encode(new), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Calls the hook, then changes the entry.
#[inline]
pub(crate) fn change(hooks: &impl MirrorHooks, slot: &Entry<'_>, new: PrivateSpte) -> Result<()> {
    hooks.set_private_spte(&slot.to(new))?;
    slot.word.store(encode(new), Ordering::Relaxed);
    Ok(())
}

/// Calls the hook that takes `page` out of the entry, then changes the entry.
pub(crate) fn remove_one(
    mirror: &Mirror,
    hooks: &impl MirrorHooks,
    entry: &Entry<'_>,
    new: PrivateSpte,
    page: (Pfn, Level),
) -> Result<Page> {
    let store = || entry.word.store(encode(new), Ordering::Relaxed);
    mirror.remove_page(hooks, &entry.to(new), page, store)
}

const _: () = assert!(EMPTY == encode(PrivateSpte::Absent));
