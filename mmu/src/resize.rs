//! Splitting a 2 MiB page into 4 KiB ones, and joining them.

use core::ptr::NonNull;

use kvm_ops_core::Field;

use crate::entry::{EMPTY, decode, encode, mapped};
use crate::mirror::Mirror;
use crate::node::{Dir, ENTRIES, Leaf, Node, Owned, below, index};
use crate::range::{change, remove_one};
use crate::sync::Ordering;
use crate::visit::{Entry, Frames};
use crate::{Error, Gfn, Level, MirrorHooks, Pfn, PrivateSpte, Result};

impl Mirror {
    /// Splits the 2 MiB page that covers a frame into 512 pages of 4 KiB: block, flush, demote. All
    /// 512 are mapped then, also if the page was blocked before.
    ///
    /// # Errors
    /// [`Error::NotFound`] if no 2 MiB page covers it. Else what a hook answered: the page is then
    /// as before, or, if it could not be unblocked, blocked; call it again, or
    /// [`unblock`](Self::unblock).
    pub fn demote(&mut self, hooks: &impl MirrorHooks, gfn: Gfn) -> Result<()> {
        let base = gfn.get() & !(Level::Size2M.frames() - 1);
        let not_found = Error::NotFound(Field::Gfn, gfn.get());
        if gfn.get() >= self.frames() {
            return Err(not_found);
        }
        let entry = match self.dir_at(base, Level::Size2M) {
            Some((dir, i)) => decode(dir.words[i].load(Ordering::Relaxed)),
            None => return Err(not_found),
        };
        let (PrivateSpte::Mapped(page) | PrivateSpte::Blocked(page)) = entry else {
            return Err(not_found);
        };
        // Take the memory before blocking anything: it may run short.
        let node = self.arena.take(Level::Size2M)?;
        let result = hooks
            .alloc_table()
            .and_then(|table| self.check_page(hooks, table, Level::Size4K))
            .and_then(|table| {
                match self.split(hooks, base, page, table.pfn(), node) {
                    // The entry owns it.
                    Ok(()) => drop(table.into_raw()),
                    Err(error) => {
                        hooks.free_page(table);
                        return Err(error);
                    }
                }
                Ok(())
            });
        if result.is_err() {
            self.give_back_full(node);
        }
        result
    }

    fn split(
        &mut self,
        hooks: &impl MirrorHooks,
        base: u64,
        page: Pfn,
        table: Pfn,
        node: Owned,
    ) -> Result<()> {
        let Owned::Leaf(leaf) = node else {
            return Err(Error::Invalid(Field::Level, 0));
        };
        let mut slot = self.slot_2m(base)?;
        let was_mapped = slot.entry == PrivateSpte::Mapped(page);
        if was_mapped {
            change(hooks, &slot, PrivateSpte::Blocked(page))?;
            self.unflushed = true;
        }
        self.flush(hooks)?;
        slot = self.slot_2m(base)?;
        // SAFETY: the node is fresh from the arena: not linked, and no other reference to it exists.
        let words = unsafe { &leaf.as_ref().words };
        for (i, word) in words.iter().enumerate() {
            word.store(mapped(page.get() + i as u64), Ordering::Relaxed);
        }
        let new = PrivateSpte::Table(table);
        if let Err(error) = hooks.set_private_spte(&slot.to(new)) {
            if was_mapped {
                // A page that cannot be split can be used whole. If not even that, it stays blocked.
                let _ = change(hooks, &slot, PrivateSpte::Mapped(page));
            }
            return Err(error);
        }
        slot.word.store(encode(new), Ordering::Relaxed);
        if let Some((dir, i)) = self.dir_at(base, Level::Size2M) {
            dir.link(i, node);
        }
        Ok(())
    }

    /// Joins the 512 pages around a frame into one of 2 MiB: block the table, flush, promote.
    ///
    /// They must all be mapped, to a naturally aligned run of host pages in order.
    ///
    /// # Errors
    /// [`Error::NotFound`] if that is not so. Else what a hook answered: the pages are then mapped as
    /// before, or, if the table could not be unblocked, it is blocked; call it again, or
    /// [`unblock`](Self::unblock). After [`Removal::Dirty`](crate::Removal::Dirty) the page is promoted, its table leaked
    /// and the error returned.
    pub fn promote(&mut self, hooks: &impl MirrorHooks, gfn: Gfn) -> Result<()> {
        let first = gfn.get() & !(Level::Size2M.frames() - 1);
        let not_found = Error::NotFound(Field::Gfn, gfn.get());
        if gfn.get() >= self.frames() {
            return Err(not_found);
        }
        let end = first + Level::Size2M.frames();
        self.put_back(hooks, Frames { first, end })?;
        let Some((dir, i)) = self.dir_at(first, Level::Size2M) else {
            return Err(not_found);
        };
        // SAFETY: `dir_at` gives a directory of that level.
        let leaf = match unsafe { dir.owned(i, Level::Size2M) } {
            Some(Owned::Leaf(leaf)) => leaf,
            _ => return Err(not_found),
        };
        // SAFETY: a linked node.
        let page = joined(unsafe { leaf.as_ref() }).ok_or(not_found)?;
        let slot = self.slot_2m(first)?;
        let PrivateSpte::Table(table) = slot.entry else {
            return Err(not_found);
        };
        self.aside.try_reserve(1).map_err(|_| Error::NoMemory)?;
        let slot = self.slot_2m(first)?;
        change(hooks, &slot, PrivateSpte::BlockedTable(table))?;
        if let Some((dir, i)) = self.dir_at(first, Level::Size2M) {
            // SAFETY: `dir_at` gives a directory of that level.
            unsafe { dir.unlink(i, Level::Size2M) };
        }
        self.aside.push((first, leaf));
        self.unflushed = true;
        self.flush(hooks)?;

        let slot = self.slot_2m(first)?;
        let new = PrivateSpte::Mapped(page);
        let result = remove_one(self, hooks, &slot, new, (table, Level::Size4K));
        let promoted = slot.word.load(Ordering::Relaxed) == mapped(page.get());
        if promoted {
            self.aside.pop();
            self.give_back_full(Owned::Leaf(leaf));
        } else {
            // Pages that cannot be joined can be used apart. If not even that, they stay aside.
            let _ = self.put_back(hooks, Frames { first, end });
        }
        result.map(|table| hooks.free_page(table))
    }

    /// Unblocks the tables of the range whose leaves are aside, and links these again.
    pub(crate) fn put_back(&mut self, hooks: &impl MirrorHooks, range: Frames) -> Result<()> {
        let mut k = 0;
        while k < self.aside.len() {
            let (gfn, leaf) = self.aside[k];
            if gfn >= range.end || gfn + Level::Size2M.frames() <= range.first {
                k += 1;
                continue;
            }
            self.flush(hooks)?;
            let slot = self.slot_2m(gfn)?;
            let PrivateSpte::BlockedTable(table) = slot.entry else {
                return Err(Error::NotFound(Field::Gfn, gfn));
            };
            self.relink(hooks, gfn, Level::Size2M, table, Owned::Leaf(leaf))?;
            self.aside.swap_remove(k);
        }
        Ok(())
    }

    /// Gives back a leaf that may hold words.
    fn give_back_full(&mut self, node: Owned) {
        if let Owned::Leaf(leaf) = node {
            clear(leaf);
        }
        self.arena.give_back(node);
    }

    /// The directory and index of the entry of that level, if its directory is linked.
    pub(crate) fn dir_at(&self, gfn: u64, level: Level) -> Option<(&Dir, usize)> {
        let mut dir: &Dir = &self.root;
        let mut at = self.top;
        while at > level {
            // SAFETY: `at` is the level of `dir`, which the loop keeps.
            match unsafe { dir.below(index(gfn, at), at) }? {
                Node::Dir(next) => dir = next,
                Node::Leaf(_) => return None,
            }
            at = below(at);
        }
        Some((dir, index(gfn, at)))
    }

    fn slot_2m(&self, gfn: u64) -> Result<Entry<'_>> {
        let (dir, i) = self
            .dir_at(gfn, Level::Size2M)
            .ok_or(Error::NotFound(Field::Gfn, gfn))?;
        Ok(Entry::of(&dir.words[i], gfn, Level::Size2M))
    }
}

fn clear(leaf: NonNull<Leaf>) {
    // SAFETY: a live node of the caller's arena, which the caller has to itself.
    for word in unsafe { &leaf.as_ref().words } {
        word.store(EMPTY, Ordering::Relaxed);
    }
}

/// The 2 MiB page that the entries of a leaf make up.
fn joined(leaf: &Leaf) -> Option<Pfn> {
    let PrivateSpte::Mapped(page) = decode(leaf.words[0].load(Ordering::Relaxed)) else {
        return None;
    };
    let in_order = (0..ENTRIES)
        .all(|i| leaf.words[i].load(Ordering::Relaxed) == mapped(page.get() + i as u64));
    (in_order && page.is_aligned(Level::Size2M)).then_some(page)
}
