//! System memory with its RMP, in regions of 2 MiB that each have one lock.

use super::entry::{PageSize, PageState, RmpEntry};
use super::open::OpenPage;
use super::turn::GuestTurn;
use crate::cipher::{BLOCK, MemoryKey};
use crate::sync::{Guard, Lock};
use kvm_ops_turns::Turn;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) const PAGE: usize = 0x1000;
pub(crate) const PAGES: usize = 512;
pub(crate) type Page = [u8; PAGE];

/// Entries of a region. All of them in hypervisor state is kept as no table, so that a machine
/// costs what it uses.
enum Entries {
    Hypervisor,
    Large(RmpEntry),
    Small(Box<[RmpEntry; PAGES]>),
}

/// 2 MiB of memory and the RMP entries that cover it.
pub(crate) struct Region {
    entries: Entries,
    pages: BTreeMap<u16, Box<Page>>,
    /// Pages that are not in `pages`, because processors have them open.
    open: BTreeMap<u16, Arc<OpenPage>>,
}

impl Region {
    fn new() -> Self {
        Self {
            entries: Entries::Hypervisor,
            pages: BTreeMap::new(),
            open: BTreeMap::new(),
        }
    }

    /// Opens a page for the guest that has the turn. `None` while another guest's processors have it.
    pub(super) fn open(
        &mut self,
        index: usize,
        spa: u64,
        turn: &GuestTurn,
    ) -> Option<Arc<OpenPage>> {
        let number = index as u16;
        if let Some(open) = self.open.get(&number) {
            let turns = open.turns();
            if Arc::ptr_eq(turns, turn.turn.turns()) {
                return Some(Arc::clone(open));
            }
            // Two that have turns must not wait for each other.
            let _other = turns.clone().try_take()?;
            self.close(number, spa);
        }
        let open = Arc::new(OpenPage::of(&self.page(index), spa, turn));
        self.pages.remove(&number);
        self.open.insert(number, Arc::clone(&open));
        Some(open)
    }

    /// Closes a page, in a turn alone at its guest's pages.
    fn close(&mut self, number: u16, spa: u64) {
        if let Some(open) = self.open.remove(&number) {
            self.pages.insert(number, open.close(spa));
        }
    }

    /// The entry that governs a page. For a page inside a 2 MiB entry that is the large entry with
    /// the guest address of the page itself.
    pub(crate) fn entry(&self, index: usize) -> RmpEntry {
        match &self.entries {
            Entries::Hypervisor => RmpEntry::default(),
            Entries::Large(entry) => RmpEntry {
                gpa: entry.gpa + (index * PAGE) as u64,
                ..*entry
            },
            Entries::Small(entries) => entries[index % PAGES],
        }
    }

    pub(crate) fn is_large(&self) -> bool {
        matches!(self.entries, Entries::Large(_))
    }

    /// Returns true if all 512 pages are in hypervisor state.
    pub(crate) fn is_hypervisor(&self) -> bool {
        match &self.entries {
            Entries::Hypervisor => true,
            Entries::Large(_) => false,
            Entries::Small(e) => e.iter().all(|e| e.state == PageState::Hypervisor),
        }
    }

    /// Replaces the entry of one page. Must not be used on a page inside a large entry.
    pub(crate) fn set_small(&mut self, index: usize, entry: RmpEntry) {
        if matches!(self.entries, Entries::Hypervisor) {
            self.entries = Entries::Small(Box::new([RmpEntry::default(); PAGES]));
        }
        if let Entries::Small(entries) = &mut self.entries {
            entries[index % PAGES] = RmpEntry {
                size: PageSize::Size4K,
                ..entry
            };
        }
    }

    /// Makes the region one large page, or all hypervisor pages.
    pub(crate) fn set_large(&mut self, entry: RmpEntry) {
        self.entries = match entry.state {
            PageState::Hypervisor => Entries::Hypervisor,
            _ => Entries::Large(RmpEntry {
                size: PageSize::Size2M,
                ..entry
            }),
        };
    }

    /// Replaces the entry that governs a page, whatever its size.
    pub(crate) fn update(&mut self, index: usize, change: impl FnOnce(&mut RmpEntry)) {
        match &mut self.entries {
            Entries::Large(entry) => change(entry),
            _ => {
                let mut entry = self.entry(index);
                change(&mut entry);
                self.set_small(index, entry);
            }
        }
    }

    /// Splits a large entry into 512 small ones.
    pub(crate) fn smash(&mut self) {
        if self.is_large() {
            let mut small = Box::new([RmpEntry::default(); PAGES]);
            for (index, entry) in small.iter_mut().enumerate() {
                *entry = RmpEntry {
                    size: PageSize::Size4K,
                    ..self.entry(index)
                };
            }
            self.entries = Entries::Small(small);
        }
    }

    /// Forgets every entry but the fixed ones.
    pub(crate) fn clear_rmp(&mut self) {
        let fixed = |e: &RmpEntry| e.state == PageState::HvFixed;
        match &mut self.entries {
            Entries::Small(entries) if entries.iter().any(fixed) => {
                for entry in entries.iter_mut().filter(|e| !fixed(e)) {
                    *entry = RmpEntry::default();
                }
            }
            Entries::Large(entry) if fixed(entry) => {}
            other => *other = Entries::Hypervisor,
        }
    }

    /// Reads bytes as they are stored.
    pub(crate) fn read(&self, index: usize, offset: usize, out: &mut [u8]) {
        match self.pages.get(&(index as u16)) {
            Some(page) => out.copy_from_slice(&page[offset..offset + out.len()]),
            None => out.fill(0),
        }
    }

    pub(crate) fn write(&mut self, index: usize, offset: usize, data: &[u8]) {
        let page = self
            .pages
            .entry(index as u16)
            .or_insert_with(|| Box::new([0; PAGE]));
        page[offset..offset + data.len()].copy_from_slice(data);
    }

    pub(crate) fn page(&self, index: usize) -> Box<Page> {
        match self.pages.get(&(index as u16)) {
            Some(page) => page.clone(),
            None => Box::new([0; PAGE]),
        }
    }

    /// Reads through a guest's key. `spa` is the address of the page.
    pub(crate) fn read_with(
        &self,
        key: &MemoryKey,
        spa: u64,
        index: usize,
        offset: usize,
        out: &mut [u8],
    ) {
        let (start, end) = blocks(offset, out.len());
        let mut buffer = [0; PAGE];
        let buffer = &mut buffer[..end - start];
        self.read(index, start, buffer);
        key.decrypt(spa + start as u64, buffer);
        out.copy_from_slice(&buffer[offset - start..][..out.len()]);
    }

    /// Writes through a guest's key; blocks that are only partly written keep the rest.
    pub(crate) fn write_with(
        &mut self,
        key: &MemoryKey,
        spa: u64,
        index: usize,
        offset: usize,
        data: &[u8],
    ) {
        let (start, end) = blocks(offset, data.len());
        let mut buffer = [0; PAGE];
        let buffer = &mut buffer[..end - start];
        if end - start != data.len() {
            self.read(index, start, buffer);
            key.decrypt(spa + start as u64, buffer);
        }
        buffer[offset - start..][..data.len()].copy_from_slice(data);
        key.encrypt(spa + start as u64, buffer);
        self.write(index, start, buffer);
    }
}

/// The whole cipher blocks around a range inside a page.
fn blocks(offset: usize, len: usize) -> (usize, usize) {
    (
        offset / BLOCK * BLOCK,
        (offset + len).div_ceil(BLOCK) * BLOCK,
    )
}

/// A place in memory: the region, the page in it, and the page's address.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    region: &'a Lock<Region>,
    pub(crate) index: usize,
    pub(crate) spa: u64,
}

impl<'a> Place<'a> {
    /// The region, to look at entries. The page may be open, so its bytes are not those of the region.
    pub(crate) fn peek(&self) -> Guard<'a, Region> {
        self.region.lock()
    }

    /// The region, to use the page or to change its entry: the page is closed.
    pub(crate) fn lock(&self) -> Guard<'a, Region> {
        let number = self.index as u16;
        self.closed(|region| region.open.contains_key(&number).then_some(number))
    }

    /// The region, to change all of its entries: every page is closed.
    pub(crate) fn lock_all(&self) -> Guard<'a, Region> {
        self.closed(|region| region.open.keys().next().copied())
    }

    /// The region, to change an entry of that size.
    pub(crate) fn lock_size(&self, size: PageSize) -> Guard<'a, Region> {
        match size {
            PageSize::Size4K => self.lock(),
            PageSize::Size2M => self.lock_all(),
        }
    }

    /// Closes the open pages that `find` finds, each in a turn alone at the guest's pages.
    fn closed(&self, find: impl Fn(&Region) -> Option<u16>) -> Guard<'a, Region> {
        let base = self.spa - (self.index * PAGE) as u64;
        let mut turn: Option<Turn> = None;
        let mut region = self.region.lock();
        while let Some(number) = find(&region) {
            let Some(turns) = region
                .open
                .get(&number)
                .map(|open| Arc::clone(open.turns()))
            else {
                continue;
            };
            if !turn.as_ref().is_some_and(|turn| turn.is_alone_at(&turns)) {
                // Before the wait: two turns at once could wait for each other.
                drop(turn.take());
                turn = turns.try_take();
            }
            if turn.is_none() {
                // With the region locked no turn is waited for.
                drop(region);
                turn = Some(turns.take());
                region = self.region.lock();
                continue;
            }
            region.close(number, base + u64::from(number) * PAGE as u64);
        }
        region
    }
}

/// All of system memory.
pub(crate) struct Memory {
    regions: Box<[Lock<Region>]>,
}

impl Memory {
    /// Memory of a whole number of regions.
    pub(crate) fn new(regions: usize) -> Self {
        Self {
            regions: (0..regions).map(|_| Lock::new(Region::new())).collect(),
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.regions.len() as u64 * PageSize::Size2M.bytes()
    }

    pub(crate) fn regions(&self) -> impl Iterator<Item = (u64, &Lock<Region>)> {
        let spa = |i| i as u64 * PageSize::Size2M.bytes();
        self.regions
            .iter()
            .enumerate()
            .map(move |(i, r)| (spa(i), r))
    }

    /// The first page of every region.
    pub(crate) fn places(&self) -> impl Iterator<Item = Place<'_>> {
        self.regions().map(|(spa, region)| Place {
            region,
            index: 0,
            spa,
        })
    }

    /// The page that holds an address, or `None` beyond the end of memory.
    pub(crate) fn place(&self, address: u64) -> Option<Place<'_>> {
        let region = usize::try_from(address / PageSize::Size2M.bytes()).ok()?;
        Some(Place {
            region: self.regions.get(region)?,
            index: address as usize / PAGE % PAGES,
            spa: address & !(PAGE as u64 - 1),
        })
    }

    /// Returns true if a range lies in memory.
    pub(crate) fn contains(&self, address: u64, len: u64) -> bool {
        address
            .checked_add(len)
            .is_some_and(|end| end <= self.len())
    }
}

/// Splits a range at page boundaries: address, offset in the page, and range in the buffer.
pub(crate) fn pieces(
    address: u64,
    len: usize,
) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = address + done as u64;
        let offset = at as usize % PAGE;
        let n = (PAGE - offset).min(len - done);
        let range = done..done + n;
        done += n;
        Some((at, offset, range))
    })
}
