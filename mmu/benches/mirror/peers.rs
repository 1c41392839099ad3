//! The peers: each maps frames to pages.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;
use std::hint::black_box;
use std::sync::LazyLock;

use dashmap::DashMap;
use kvm_ops_mmu::{
    EmptyTables, Error, Gfn, Level, Mirror, MirrorHooks, Page, Pfn, PortId, PrivateSpte, Result,
    SpteChange,
};
use memory_addr::{PhysAddr, VirtAddr as Va};
use page_table_entry::MappingFlags;
use page_table_entry::x86_64::X64PTE;
use page_table_multiarch::{PageSize, PageTable64, PagingHandler, PagingMetaData};
use rangemap::RangeMap;
use rustc_hash::FxBuildHasher;
use x86_64::structures::paging::mapper::{Mapper, OffsetPageTable};
use x86_64::structures::paging::{
    FrameAllocator, Page as X64Page, PageTable, PageTableFlags, PhysFrame, Size4KiB,
};
use x86_64::{PhysAddr as Pa, VirtAddr};

/// One way to hold a mapping of 4 KiB frames.
pub trait Peer {
    fn new(frames: u64) -> Self;
    fn map(&mut self, gfn: u64, page: u64);
    fn get(&self, gfn: u64) -> u64;
    /// Removes frames 0 to `frames`, all mapped, and hands each page back.
    fn zap(&mut self, frames: u64);

    fn map_in_order(&mut self, frames: u64) {
        (0..frames).for_each(|gfn| self.map(gfn, gfn));
    }

    /// The fastest way to the same: what a VM's memory is built with.
    fn build(&mut self, frames: u64) {
        self.map_in_order(frames);
    }

    fn get_in_order(&self, frames: u64) -> u64 {
        (0..frames).fold(0, |sum, gfn| sum ^ self.get(gfn))
    }
}

/// Hooks that cost nothing, so that the mirror alone is measured.
pub struct Quiet;

// SAFETY: no memory is behind the numbers of pages.
unsafe impl MirrorHooks for Quiet {
    #[inline]
    fn set_private_spte(&self, _: &SpteChange) -> Result<()> {
        Ok(())
    }
    #[inline]
    fn flush_private_tlb(&self) -> Result<()> {
        Ok(())
    }
    fn alloc_table(&self) -> Result<Page> {
        Ok(page(*PORT, 1))
    }
    #[inline]
    fn free_page(&self, page: Page) {
        black_box(page.into_raw());
    }
    fn leak(&self, _: Page, _: Error) {}
}

/// The source of pages of every mirror.
pub static PORT: LazyLock<PortId> = LazyLock::new(PortId::new);

/// The owner of a page that only has a number.
#[inline]
pub fn page(port: PortId, pfn: u64) -> Page {
    // SAFETY: no memory is behind the number.
    unsafe { Page::from_raw(Pfn::new(pfn), Level::Size4K, port) }
}

pub fn mirror(root: Level) -> Mirror {
    Mirror::new(root, *PORT).unwrap()
}

/// The mirror with 4 or 5 levels, every entry frozen and published as a fault does.
pub struct Ours<const FIVE: bool>(pub Mirror);

#[inline]
fn number(entry: PrivateSpte) -> u64 {
    match entry {
        PrivateSpte::Mapped(page) => page.get(),
        _ => 0,
    }
}

impl<const FIVE: bool> Peer for Ours<FIVE> {
    fn new(_: u64) -> Self {
        let root = if FIVE {
            Level::Size256T
        } else {
            Level::Size512G
        };
        Self(mirror(root))
    }
    #[inline]
    fn map(&mut self, gfn: u64, pfn: u64) {
        let page = || Ok(page(self.0.port(), pfn));
        let done = self.0.map(&Quiet, Gfn::new(gfn), Level::Size4K, page);
        black_box(done.is_ok());
    }
    #[inline]
    fn get(&self, gfn: u64) -> u64 {
        number(self.0.lookup(Gfn::new(gfn)).entry)
    }
    fn zap(&mut self, frames: u64) {
        let zapped = self.0.zap(&Quiet, Gfn::new(0), frames, EmptyTables::Keep);
        assert_eq!(zapped.unwrap().pages, frames);
    }
    fn build(&mut self, frames: u64) {
        let port = self.0.port();
        let page_of = |gfn: Gfn| Ok(page(port, gfn.get()));
        let done = self.0.map_range(&Quiet, Gfn::new(0), frames, page_of);
        assert_eq!(done, Ok(frames));
    }
}

/// The same through a cursor, where frames come in order.
pub struct Cursor(Ours<false>);

impl Peer for Cursor {
    fn new(frames: u64) -> Self {
        Self(Ours::new(frames))
    }
    fn map(&mut self, gfn: u64, page: u64) {
        self.0.map(gfn, page);
    }
    fn get(&self, gfn: u64) -> u64 {
        self.0.get(gfn)
    }
    fn zap(&mut self, frames: u64) {
        self.0.zap(frames);
    }
    fn map_in_order(&mut self, frames: u64) {
        let port = self.0.0.port();
        let mut cursor = self.0.0.cursor();
        for gfn in 0..frames {
            let page = || Ok(page(port, gfn));
            let done = cursor.map(&Quiet, Gfn::new(gfn), Level::Size4K, page);
            black_box(done.is_ok());
        }
    }
    fn build(&mut self, frames: u64) {
        self.0.build(frames);
    }
    fn get_in_order(&self, frames: u64) -> u64 {
        let mut cursor = self.0.0.cursor();
        (0..frames).fold(0, |sum, gfn| {
            sum ^ number(cursor.lookup(Gfn::new(gfn)).entry)
        })
    }
}

/// Table pages for the page-table crates, cut from chunks that grow as the mirror's do.
#[derive(Default)]
pub struct Pool {
    chunks: Vec<(*mut u8, Layout)>,
    next: usize,
    left: usize,
    reserved: usize,
}

impl Pool {
    fn take(&mut self) -> u64 {
        if self.left == 0 {
            self.left = self.reserved.clamp(16, 512);
            self.reserved += self.left;
            let layout = Layout::from_size_align((self.left + 1) * 4096, 16).unwrap();
            // SAFETY: the size is not zero.
            let chunk = unsafe { alloc_zeroed(layout) };
            self.chunks.push((chunk, layout));
            self.next = chunk.expose_provenance().next_multiple_of(4096);
        }
        self.left -= 1;
        self.next += 4096;
        self.next as u64 - 4096
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (chunk, layout) in self.chunks.drain(..) {
            // SAFETY: from `take`, with that layout.
            unsafe { dealloc(chunk, layout) };
        }
    }
}

// SAFETY: the pool owns its chunks.
unsafe impl Send for Pool {}

// SAFETY: each frame is handed out once.
unsafe impl FrameAllocator<Size4KiB> for Pool {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        Some(PhysFrame::containing_address(Pa::new(self.take())))
    }
}

/// x86_64's mapper; physical addresses are this program's own.
pub struct Offset {
    table: OffsetPageTable<'static>,
    pool: Pool,
}

impl Peer for Offset {
    fn new(_: u64) -> Self {
        let mut pool = Pool::default();
        let root = std::ptr::with_exposed_provenance_mut::<PageTable>(pool.take() as usize);
        // SAFETY: a zeroed page of the pool, which lives as long as the mapper; offset 0 is right.
        let table = unsafe { OffsetPageTable::new(&mut *root, VirtAddr::new(0)) };
        Self { table, pool }
    }
    #[inline]
    fn map(&mut self, gfn: u64, page: u64) {
        let at: X64Page<Size4KiB> = X64Page::containing_address(VirtAddr::new(gfn << 12));
        let frame = PhysFrame::containing_address(Pa::new(page << 12));
        let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
        // SAFETY: no processor uses these tables.
        let done = unsafe { self.table.map_to(at, frame, flags, &mut self.pool) };
        black_box(done.map(|flush| flush.ignore()).is_ok());
    }
    #[inline]
    fn get(&self, gfn: u64) -> u64 {
        let at: X64Page<Size4KiB> = X64Page::containing_address(VirtAddr::new(gfn << 12));
        self.table
            .translate_page(at)
            .map_or(0, |frame| frame.start_address().as_u64() >> 12)
    }
    fn zap(&mut self, frames: u64) {
        for gfn in 0..frames {
            let at: X64Page<Size4KiB> = X64Page::containing_address(VirtAddr::new(gfn << 12));
            if let Ok((frame, flush)) = self.table.unmap(at) {
                flush.ignore();
                black_box(frame);
            }
        }
    }
}

pub struct NoTlb;

impl PagingMetaData for NoTlb {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;
    type VirtAddr = Va;
    fn flush_tlb(_: Option<Va>) {}
}

thread_local! {
    static FRAMES: RefCell<Pool> = RefCell::default();
}

pub struct Frames;

impl PagingHandler for Frames {
    fn alloc_frames(_: usize, _: usize) -> Option<PhysAddr> {
        Some(PhysAddr::from(
            FRAMES.with_borrow_mut(|pool| pool.take()) as usize
        ))
    }
    fn dealloc_frames(_: PhysAddr, _: usize) {}
    fn phys_to_virt(paddr: PhysAddr) -> Va {
        Va::from(paddr.as_usize())
    }
}

/// page_table_multiarch's tables; a pass of many frames shares one of its cursors.
pub struct Multiarch(PageTable64<NoTlb, X64PTE, Frames>, Emptied);

/// Frees the pages after the tables that are declared before it.
struct Emptied;

impl Drop for Emptied {
    fn drop(&mut self) {
        FRAMES.with_borrow_mut(|pool| *pool = Pool::default());
    }
}

impl Multiarch {
    const FLAGS: MappingFlags = MappingFlags::READ.union(MappingFlags::WRITE);
}

impl Peer for Multiarch {
    fn new(_: u64) -> Self {
        Self(PageTable64::try_new().unwrap(), Emptied)
    }
    #[inline]
    fn map(&mut self, gfn: u64, page: u64) {
        let (at, page) = ((gfn as usize) << 12, (page as usize) << 12);
        let done = self
            .0
            .cursor()
            .map(at.into(), page.into(), PageSize::Size4K, Self::FLAGS);
        black_box(done.is_ok());
    }
    #[inline]
    fn get(&self, gfn: u64) -> u64 {
        self.0
            .query(((gfn as usize) << 12).into())
            .map_or(0, |found| found.0.as_usize() as u64 >> 12)
    }
    fn map_in_order(&mut self, frames: u64) {
        let mut cursor = self.0.cursor();
        for at in (0..frames as usize).map(|gfn| gfn << 12) {
            let done = cursor.map(at.into(), at.into(), PageSize::Size4K, Self::FLAGS);
            black_box(done.is_ok());
        }
    }
    fn build(&mut self, frames: u64) {
        let identity = |at: Va| PhysAddr::from(at.as_usize());
        let bytes = (frames as usize) << 12;
        let mut cursor = self.0.cursor();
        let done = cursor.map_region(0.into(), identity, bytes, Self::FLAGS, false);
        black_box(done.is_ok());
    }
    fn zap(&mut self, frames: u64) {
        let mut cursor = self.0.cursor();
        for at in (0..frames as usize).map(|gfn| gfn << 12) {
            black_box(cursor.unmap(at.into()).is_ok());
        }
    }
}

pub struct Hash<S>(pub HashMap<u64, u64, S>);
pub type Fx = Hash<FxBuildHasher>;
pub type Sip = Hash<std::hash::RandomState>;

impl<S: BuildHasher + Default> Peer for Hash<S> {
    fn new(_: u64) -> Self {
        Self(HashMap::default())
    }
    #[inline]
    fn map(&mut self, gfn: u64, page: u64) {
        self.0.insert(gfn, page);
    }
    fn build(&mut self, frames: u64) {
        self.0.reserve(frames as usize);
        self.map_in_order(frames);
    }
    #[inline]
    fn get(&self, gfn: u64) -> u64 {
        self.0.get(&gfn).copied().unwrap_or(0)
    }
    fn zap(&mut self, frames: u64) {
        for gfn in 0..frames {
            black_box(self.0.remove(&gfn));
        }
    }
}

pub struct Dash(pub DashMap<u64, u64>);

impl Peer for Dash {
    fn new(_: u64) -> Self {
        Self(DashMap::new())
    }
    #[inline]
    fn map(&mut self, gfn: u64, page: u64) {
        self.0.insert(gfn, page);
    }
    #[inline]
    fn get(&self, gfn: u64) -> u64 {
        self.0.get(&gfn).map_or(0, |page| *page)
    }
    fn zap(&mut self, frames: u64) {
        for gfn in 0..frames {
            black_box(self.0.remove(&gfn));
        }
    }
}

pub struct BTree(BTreeMap<u64, u64>);

impl Peer for BTree {
    fn new(_: u64) -> Self {
        Self(BTreeMap::new())
    }
    #[inline]
    fn map(&mut self, gfn: u64, page: u64) {
        self.0.insert(gfn, page);
    }
    fn build(&mut self, frames: u64) {
        self.0 = (0..frames).map(|gfn| (gfn, gfn)).collect();
    }
    #[inline]
    fn get(&self, gfn: u64) -> u64 {
        self.0.get(&gfn).copied().unwrap_or(0)
    }
    fn get_in_order(&self, _: u64) -> u64 {
        self.0.values().fold(0, |sum, page| sum ^ page)
    }
    fn zap(&mut self, _: u64) {
        while let Some(page) = self.0.pop_first() {
            black_box(page);
        }
    }
}

/// rangemap, with the distance from frame to page as the value: pages in order are one entry.
pub struct Ranges(RangeMap<u64, u64>);

impl Peer for Ranges {
    fn new(_: u64) -> Self {
        Self(RangeMap::new())
    }
    #[inline]
    fn map(&mut self, gfn: u64, page: u64) {
        self.0.insert(gfn..gfn + 1, page.wrapping_sub(gfn));
    }
    fn build(&mut self, frames: u64) {
        self.0.insert(0..frames, 0);
    }
    #[inline]
    fn get(&self, gfn: u64) -> u64 {
        self.0.get(&gfn).map_or(0, |far| gfn.wrapping_add(*far))
    }
    fn zap(&mut self, frames: u64) {
        // Each page goes back to the host.
        for (range, far) in self.0.iter() {
            for gfn in range.clone() {
                black_box(gfn.wrapping_add(*far));
            }
        }
        self.0.remove(0..frames);
    }
}
