//! The books of the pages that are out of memory: a slot for each, and the pages of records, level by level.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use kvm_ops::{Error, Gfn, Level, Page, Result, VcpuId};

use super::{Suspended, SwapSlot};

/// Records in a page of records, and the bytes of each.
const RECORDS: usize = 64;
const RECORD: u64 = 64;

/// Where a page of the guest belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At this frame.
    Memory(Gfn),
    /// The register state of a vCPU, made by the host.
    Vcpu(VcpuId),
}

/// A page of the guest that is out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) place: Place,
    pub(crate) level: Level,
    /// Firmware holds it for register state. The guest may make some in its memory.
    pub(crate) is_vmsa: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Used(Leaf),
    /// The contents were given up, but firmware frees a record only for a page that comes.
    Dead,
}

/// A page of records.
#[derive(Debug)]
pub(super) enum Table {
    Here(Page),
    Away,
}

/// Slots, and the pages with their records. Record n of level k + 1 is that of page n of level k; the last level has one page,
/// whose record is in the context once the page leaves.
#[derive(Debug, Default)]
pub(crate) struct SwapSpace {
    slots: Vec<Slot>,
    free: BTreeSet<u32>,
    /// Slots that are used.
    used: usize,
    by_gfn: BTreeMap<u64, u32>,
    tables: Vec<Vec<Table>>,
    suspended: bool,
}

impl SwapSpace {
    /// Books of a guest that is out of memory with its records; the leaves are in the order of their slots.
    pub(crate) fn of_arrival(leaves: &[Option<Leaf>]) -> Self {
        let mut space = Self {
            suspended: true,
            ..Self::default()
        };
        for (slot, leaf) in (0..).zip(leaves) {
            match leaf {
                Some(leaf) => space.fill(slot, *leaf),
                None => space.slots.push(Slot::Dead),
            }
        }
        let mut pages = leaves.len().div_ceil(RECORDS);
        while pages > 0 {
            space.tables.push((0..pages).map(|_| Table::Away).collect());
            pages = match pages {
                1 => 0,
                _ => pages.div_ceil(RECORDS),
            };
        }
        space
    }

    /// What lies in each slot; `None` where the contents were given up.
    pub(crate) fn leaves(&self) -> impl Iterator<Item = Option<Leaf>> + '_ {
        self.slots.iter().map(|slot| match slot {
            Slot::Used(leaf) => Some(*leaf),
            Slot::Free | Slot::Dead => None,
        })
    }

    /// The names of all pages that are out, those of records last, with their sizes.
    pub(crate) fn names(&self) -> Vec<(SwapSlot, Level)> {
        let leaves = self.used().into_iter();
        let leaves = leaves.map(|(slot, leaf)| (leaf_slot(slot), leaf.level));
        let tables = (0..).zip(&self.tables).flat_map(|(level, tables)| {
            (0..tables.len()).map(move |index| (table_slot(level, index), Level::Size4K))
        });
        leaves.chain(tables).collect()
    }

    /// The slots that are in use.
    pub(super) fn used(&self) -> Vec<(u32, Leaf)> {
        let used = |(slot, leaf): (u32, Option<Leaf>)| leaf.map(|leaf| (slot, leaf));
        (0..).zip(self.leaves()).filter_map(used).collect()
    }

    pub(crate) fn is_suspended(&self) -> bool {
        self.suspended
    }

    pub(super) fn set_suspended(&mut self, suspended: bool) {
        self.suspended = suspended;
    }

    /// True if nothing is out.
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.tables.is_empty()
    }

    pub(crate) fn totals(&self) -> Suspended {
        let leaves = self.leaves().flatten();
        Suspended {
            pages: leaves.map(|leaf| leaf.level.frames()).sum(),
            records: self.tables.iter().map(|level| level.len() as u64).sum(),
        }
    }

    /// The slot for the next page that leaves.
    pub(super) fn next_slot(&self) -> Result<u32> {
        match self.free.first() {
            Some(slot) => Ok(*slot),
            None => u32::try_from(self.slots.len()).map_err(|_| Error::NoMemory),
        }
    }

    /// A page left.
    pub(super) fn fill(&mut self, slot: u32, leaf: Leaf) {
        if let Place::Memory(gfn) = leaf.place {
            self.by_gfn.insert(gfn.get(), slot);
        }
        self.used += 1;
        match self.slots.get_mut(slot as usize) {
            Some(place) => *place = Slot::Used(leaf),
            None => self.slots.push(Slot::Used(leaf)),
        }
        self.free.remove(&slot);
    }

    /// The page is back.
    pub(super) fn release(&mut self, slot: u32) {
        self.empty(slot, Slot::Free);
        self.free.insert(slot);
    }

    fn empty(&mut self, slot: u32, empty: Slot) {
        let Some(place) = self.slots.get_mut(slot as usize) else {
            return;
        };
        if let Slot::Used(leaf) = core::mem::replace(place, empty) {
            self.used -= 1;
            if let Place::Memory(gfn) = leaf.place {
                self.by_gfn.remove(&gfn.get());
            }
        }
    }

    /// The slot of the page that covers a frame, its first frame and its size.
    pub(crate) fn at(&self, gfn: Gfn) -> Option<(u32, Gfn, Level)> {
        let (first, slot) = self.by_gfn.range(..=gfn.get()).next_back()?;
        let level = self.leaf(*slot)?.level;
        (gfn.get() - first < level.frames()).then_some((*slot, Gfn::new(*first), level))
    }

    /// The page of a slot.
    pub(super) fn leaf(&self, slot: u32) -> Option<Leaf> {
        match self.slots.get(slot as usize)? {
            Slot::Used(leaf) => Some(*leaf),
            Slot::Free | Slot::Dead => None,
        }
    }

    /// The pages that are out and touch a range, lowest first.
    pub(crate) fn touching(&self, first: Gfn, pages: u64) -> Vec<(u32, Gfn, Level)> {
        let from = self.at(first).map_or(first, |(_, gfn, _)| gfn);
        let end = first.get().saturating_add(pages);
        let slots = self.by_gfn.range(from.get()..end.max(from.get()));
        slots
            .filter_map(|(gfn, slot)| Some((*slot, Gfn::new(*gfn), self.leaf(*slot)?.level)))
            .collect()
    }

    /// Gives the pages up that are out and lie in a range.
    ///
    /// # Errors
    /// [`Error::Busy`] for a large page that is only partly in it. Nothing changed.
    pub(crate) fn give_up(&mut self, first: Gfn, pages: u64) -> Result<()> {
        let end = first.get().saturating_add(pages);
        let gone = self.touching(first, pages);
        let is_inside = |(_, gfn, level): &(u32, Gfn, Level)| {
            *gfn >= first && gfn.get() + level.frames() <= end
        };
        if !gone.iter().all(is_inside) {
            return Err(Error::Busy);
        }
        gone.iter()
            .for_each(|(slot, ..)| self.empty(*slot, Slot::Dead));
        Ok(())
    }

    /// True if no frame and no vCPU has two slots.
    pub(crate) fn names_each_once(&self) -> bool {
        let mut vcpus = BTreeSet::new();
        let mut in_memory = 0;
        for leaf in self.leaves().flatten() {
            match leaf.place {
                Place::Memory(_) => in_memory += 1,
                Place::Vcpu(vcpu) if !vcpus.insert(vcpu) => return false,
                Place::Vcpu(_) => {}
            }
        }
        let mut end = 0;
        let mut follows = |(gfn, slot): (&u64, &u32)| {
            let frames = self.leaf(*slot).map_or(0, |leaf| leaf.level.frames());
            *gfn >= core::mem::replace(&mut end, gfn.saturating_add(frames))
        };
        in_memory == self.by_gfn.len() && self.by_gfn.iter().all(&mut follows)
    }

    // --- Pages of records ---

    /// The number of pages that a level has.
    pub(super) fn tables(&self, level: usize) -> usize {
        self.tables.get(level).map_or(0, Vec::len)
    }

    /// The number of levels.
    pub(super) fn levels(&self) -> usize {
        self.tables.len()
    }

    pub(super) fn table(&self, level: usize, index: usize) -> Option<&Table> {
        self.tables.get(level)?.get(index)
    }

    /// A new page of records at the end of a level.
    pub(super) fn push_table(&mut self, level: usize, page: Page) {
        if self.tables.len() <= level {
            self.tables.resize_with(level + 1, Vec::new);
        }
        self.tables[level].push(Table::Here(page));
    }

    /// Puts a page of records in the place of what is there, and returns that.
    pub(super) fn set_table(&mut self, level: usize, index: usize, table: Table) -> Option<Page> {
        let place = self.tables.get_mut(level)?.get_mut(index)?;
        match core::mem::replace(place, table) {
            Table::Here(page) => Some(page),
            Table::Away => None,
        }
    }

    /// True if a level lacks the page of records for a page of the level below.
    pub(super) fn lacks_table(&self, level: usize, index: u32) -> bool {
        self.tables(level) <= index as usize / RECORDS
    }

    /// The address of the record of slot `index`, or of page `index` of records of the level below.
    ///
    /// # Errors
    /// [`Error::Busy`] if the page of records is not in memory.
    pub(super) fn record(&self, level: usize, index: u32) -> Result<u64> {
        let index = index as usize;
        match self.table(level, index / RECORDS) {
            Some(Table::Here(page)) => Ok(page.hpa().get() + (index % RECORDS) as u64 * RECORD),
            Some(Table::Away) | None => Err(Error::Busy),
        }
    }

    /// Takes the pages of records of this level and those above that are in memory.
    pub(super) fn take_tables(&mut self, from: usize) -> Vec<Page> {
        let taken = self.tables.drain(from.min(self.tables.len())..);
        let pages = taken.flatten().filter_map(|table| match table {
            Table::Here(page) => Some(page),
            Table::Away => None,
        });
        pages.collect()
    }

    /// Forgets everything, and returns the pages of records that are in memory: at the end of the guest, and when nothing is out.
    pub(crate) fn clear(&mut self) -> Vec<Page> {
        let pages = self.take_tables(0);
        *self = Self {
            suspended: self.suspended,
            ..Self::default()
        };
        pages
    }

    /// True if no page of the guest is out, whatever records there are.
    pub(super) fn has_no_leaf(&self) -> bool {
        self.used == 0
    }
}

/// The name of a page of the guest.
pub(super) fn leaf_slot(index: u32) -> SwapSlot {
    SwapSlot { level: 0, index }
}

/// The name of a page of records.
pub(super) fn table_slot(level: usize, index: usize) -> SwapSlot {
    SwapSlot {
        // 2^32 slots have 6 levels.
        level: level as u8 + 1,
        index: index as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    fn leaf(gfn: u64, level: Level) -> Leaf {
        Leaf {
            place: Place::Memory(Gfn::new(gfn)),
            level,
            is_vmsa: false,
        }
    }

    #[test]
    fn an_arrival_has_a_record_for_every_page_but_the_last() {
        for (leaves, levels) in [
            (0, vec![]),
            (1, vec![1]),
            (64, vec![1]),
            (65, vec![2, 1]),
            (4096, vec![64, 1]),
            (4097, vec![65, 2, 1]),
        ] {
            let list: Vec<_> = (0..leaves).map(|n| Some(leaf(n, Level::Size4K))).collect();
            let space = SwapSpace::of_arrival(&list);
            let tables: Vec<_> = (0..space.levels())
                .map(|level| space.tables(level))
                .collect();
            assert_eq!(tables, levels, "{leaves}");
            assert_eq!(space.leaves().collect::<Vec<_>>(), list);
            let totals = space.totals();
            assert_eq!(totals.pages, leaves);
            assert_eq!(totals.records, levels.iter().sum::<usize>() as u64);
        }
    }

    proptest! {
        /// Pages leave, come back and are given up: the space knows each frame as a plain map does, and gives no slot twice.
        #[test]
        fn the_books_are_those_of_a_map(steps in prop::collection::vec((0..3u8, 0..40u64), 1..200)) {
            let mut space = SwapSpace::default();
            let mut model = BTreeMap::new();
            for (what, gfn) in steps {
                match what {
                    0 if space.at(Gfn::new(gfn)).is_none() => {
                        let slot = space.next_slot().unwrap();
                        prop_assert!(!model.values().any(|used| *used == slot));
                        space.fill(slot, leaf(gfn, Level::Size4K));
                        model.insert(gfn, slot);
                    }
                    1 => {
                        if let Some(slot) = model.remove(&gfn) {
                            space.release(slot);
                        }
                    }
                    _ => {
                        space.give_up(Gfn::new(gfn), 3).unwrap();
                        model.retain(|at, _| !(gfn..gfn + 3).contains(at));
                    }
                }
                let known: Vec<_> = space.touching(Gfn::new(0), 100).into_iter()
                    .map(|(slot, gfn, _)| (gfn.get(), slot)).collect();
                prop_assert_eq!(&known, &model.clone().into_iter().collect::<Vec<_>>());
                prop_assert_eq!(space.has_no_leaf(), model.is_empty());
            }
        }
    }

    #[test]
    fn a_large_page_covers_its_frames_and_is_given_up_as_a_whole() {
        let mut space = SwapSpace::default();
        space.fill(0, leaf(512, Level::Size2M));
        assert_eq!(space.at(Gfn::new(511)), None);
        assert_eq!(
            space.at(Gfn::new(1023)),
            Some((0, Gfn::new(512), Level::Size2M))
        );
        assert_eq!(space.at(Gfn::new(1024)), None);
        assert_eq!(space.touching(Gfn::new(600), 1).len(), 1);
        assert_eq!(space.give_up(Gfn::new(512), 511), Err(Error::Busy));
        assert_eq!(space.give_up(Gfn::new(512), 512), Ok(()));
        assert!(space.has_no_leaf() && space.next_slot() == Ok(1));
    }
}
