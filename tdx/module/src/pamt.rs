//! Physical address metadata: one entry for every 4 KiB, 2 MiB and 1 GiB unit of every TDMR.
//!
//! An entry is 16 bytes, as in hardware: one word of lock, type and owner, one of BEPOCH. The entries of an
//! untouched region are not materialised.

use crate::config::Tdmr;
use crate::lock::{AtomicU64, Guard, LockMode, Ordering, Sharex, Side};
use std::sync::OnceLock;

/// Type of a physical page: its use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PageType {
    /// Not assigned: the host's to give.
    Nda = 0,
    /// In a reserved area.
    Rsvd = 1,
    /// A TD's private page.
    Reg = 3,
    /// TD root.
    Tdr = 4,
    /// Child of a TD's or vCPU's control structure.
    Tdcx = 5,
    /// vCPU root.
    Tdvpr = 6,
    /// Secure-EPT table.
    Ept = 8,
}

impl PageType {
    fn from_bits(bits: u64) -> Self {
        match bits {
            1 => PageType::Rsvd,
            3 => PageType::Reg,
            4 => PageType::Tdr,
            5 => PageType::Tdcx,
            6 => PageType::Tdvpr,
            8 => PageType::Ept,
            _ => PageType::Nda,
        }
    }

    /// The type's name in the manuals (`PT_` prefix left out).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            PageType::Nda => "NDA",
            PageType::Rsvd => "RSVD",
            PageType::Reg => "REG",
            PageType::Tdr => "TDR",
            PageType::Tdcx => "TDCX",
            PageType::Tdvpr => "TDVPR",
            PageType::Ept => "EPT",
        }
    }
}

/// Page sizes: 4 KiB, 2 MiB, 1 GiB. The numbers are those of `TDH.PHYMEM.PAGE.RDMD` and of EPT levels.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum PageSize {
    /// 4 KiB.
    Size4K = 0,
    /// 2 MiB.
    Size2M = 1,
    /// 1 GiB.
    Size1G = 2,
}

impl PageSize {
    /// Size of a leaf at an EPT level, if there are leaves at it.
    #[must_use]
    pub const fn from_level(level: u8) -> Option<Self> {
        match level {
            0 => Some(PageSize::Size4K),
            1 => Some(PageSize::Size2M),
            2 => Some(PageSize::Size1G),
            _ => None,
        }
    }

    /// Bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// Number of 4 KiB units.
    #[must_use]
    pub const fn pages(self) -> u64 {
        1 << (self.shift() - 12)
    }

    pub(crate) const fn shift(self) -> u32 {
        12 + 9 * self as u32
    }
}

/// An entry. The payload of the lock word is type (4 bits) and owner (40 bits): the PA of the TDR over 4096,
/// but the slot of the control structure for a TDR or TDVPR page, whose owner follows from the structure.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    pub(crate) lock: Sharex,
    bepoch: AtomicU64,
}

const TYPE_BITS: u32 = 4;

impl Entry {
    fn reserved() -> Self {
        Entry {
            lock: Sharex::with_payload(PageType::Rsvd as u64),
            bepoch: AtomicU64::new(0),
        }
    }

    pub(crate) fn page_type(&self) -> PageType {
        PageType::from_bits(self.lock.payload() & ((1 << TYPE_BITS) - 1))
    }

    /// The owner field; a PA for every type but TDR and TDVPR.
    pub(crate) fn owner_pa(&self) -> u64 {
        self.lock.payload() >> TYPE_BITS << 12
    }

    /// The owner field of a TDR or TDVPR page.
    pub(crate) fn slot(&self) -> u32 {
        (self.lock.payload() >> TYPE_BITS) as u32
    }

    pub(crate) fn set(&self, page_type: PageType, owner_pa: u64) {
        self.lock
            .set_payload(owner_pa >> 12 << TYPE_BITS | page_type as u64);
    }

    pub(crate) fn set_slot(&self, page_type: PageType, slot: u32) {
        self.lock
            .set_payload(u64::from(slot) << TYPE_BITS | page_type as u64);
    }

    /// Frees the page; owner and BEPOCH stay.
    pub(crate) fn set_nda(&self) {
        self.lock
            .set_payload(self.lock.payload() >> TYPE_BITS << TYPE_BITS);
    }

    pub(crate) fn bepoch(&self) -> u64 {
        self.bepoch.load(Ordering::Acquire)
    }

    pub(crate) fn set_bepoch(&self, epoch: u64) {
        self.bepoch.store(epoch, Ordering::Release);
    }
}

#[derive(Debug, Default)]
struct Two {
    entry: Entry,
    fours: OnceLock<Box<[Entry]>>,
}

/// Padded, so that processors that work in different gigabytes do not share a cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Gig {
    entry: Entry,
    twos: OnceLock<Box<[Two]>>,
}

impl Gig {
    fn two(&self, pa: u64) -> &Two {
        let twos = self
            .twos
            .get_or_init(|| (0..512).map(|_| Two::default()).collect());
        &twos[(pa >> 21) as usize % 512]
    }
}

/// The metadata of one TDMR.
#[derive(Debug)]
pub(crate) struct TdmrPamt {
    pub(crate) tdmr: Tdmr,
    /// The TDMR's mutex.
    pub(crate) lock: Sharex,
    /// Bytes whose metadata TDH.SYS.TDMR.INIT has initialised.
    pub(crate) initialised: AtomicU64,
    gigs: Box<[Gig]>,
}

impl TdmrPamt {
    fn new(tdmr: Tdmr) -> Self {
        let gigs = (0..tdmr.range.size >> 30).map(|_| Gig::default()).collect();
        TdmrPamt {
            tdmr,
            lock: Sharex::default(),
            initialised: AtomicU64::new(0),
            gigs,
        }
    }

    fn gig(&self, pa: u64) -> &Gig {
        &self.gigs[((pa - self.tdmr.range.base) >> 30) as usize]
    }

    fn two(&self, pa: u64) -> &Two {
        self.gig(pa).two(pa)
    }

    fn fours(&self, pa: u64) -> &[Entry] {
        self.fours_of(self.two(pa), pa)
    }

    fn fours_of<'a>(&self, two: &'a Two, pa: u64) -> &'a [Entry] {
        two.fours.get_or_init(|| {
            let base = pa & !0x1F_FFFF;
            (0..512)
                .map(|i| match self.is_reserved(base + i * 4096) {
                    true => Entry::reserved(),
                    false => Entry::default(),
                })
                .collect()
        })
    }

    fn is_reserved(&self, pa: u64) -> bool {
        let offset = pa - self.tdmr.range.base;
        self.tdmr
            .reserved
            .iter()
            .any(|r| offset >= r.base && offset < r.end())
    }

    fn entry(&self, pa: u64, size: PageSize) -> &Entry {
        match size {
            PageSize::Size4K => &self.fours(pa)[(pa >> 12) as usize % 512],
            PageSize::Size2M => &self.two(pa).entry,
            PageSize::Size1G => &self.gig(pa).entry,
        }
    }

    /// Visits every unit in use, ascending; reserved ones are not in use.
    pub(crate) fn for_each_used(&self, mut f: impl FnMut(u64, PageSize, &Entry)) {
        let in_use = |e: &Entry| !matches!(e.page_type(), PageType::Nda | PageType::Rsvd);
        for (g, gig) in self.gigs.iter().enumerate() {
            let gig_pa = self.tdmr.range.base + ((g as u64) << 30);
            if in_use(&gig.entry) {
                f(gig_pa, PageSize::Size1G, &gig.entry);
            }
            for (t, two) in gig.twos.get().into_iter().flatten().enumerate() {
                let two_pa = gig_pa + ((t as u64) << 21);
                if in_use(&two.entry) {
                    f(two_pa, PageSize::Size2M, &two.entry);
                }
                for (k, entry) in two.fours.get().into_iter().flatten().enumerate() {
                    if in_use(entry) {
                        f(two_pa + ((k as u64) << 12), PageSize::Size4K, entry);
                    }
                }
            }
        }
    }

    /// Returns true if all 4K entries of the 2 MiB at `pa` are unassigned.
    fn all_4k_nda(&self, pa: u64) -> bool {
        let base = pa & !0x1F_FFFF;
        let reserved = self.tdmr.reserved.iter().any(|r| {
            let at = self.tdmr.range.base + r.base;
            r.size != 0 && at < base + 0x20_0000 && base < at + r.size
        });
        match self.two(pa).fours.get() {
            None => !reserved,
            Some(fours) => fours.iter().all(|e| e.page_type() == PageType::Nda),
        }
    }
}

/// Errors of a walk to a page's entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WalkError {
    OutOfRange,
    Busy,
}

fn take(entry: &Entry, mode: LockMode) -> Result<Guard<'_>, WalkError> {
    entry.lock.guard(mode, Side::Host).ok_or(WalkError::Busy)
}

/// A shared hold in the wanted mode.
fn in_mode(guard: Guard<'_>, mode: LockMode) -> Result<Guard<'_>, WalkError> {
    match mode {
        LockMode::Exclusive => guard.promote().ok_or(WalkError::Busy),
        LockMode::Shared => Ok(guard),
    }
}

/// The metadata of all TDMRs.
#[derive(Debug)]
pub(crate) struct Pamt {
    pub(crate) tdmrs: Vec<TdmrPamt>,
}

/// A page found by a walk, with the locks the walk took.
#[derive(Debug)]
pub(crate) struct PageRef<'a> {
    pub(crate) entry: &'a Entry,
    pub(crate) size: PageSize,
    tdmr: &'a TdmrPamt,
    pa: u64,
    held: [Option<Guard<'a>>; 3],
}

impl PageRef<'_> {
    /// Keeps the locks; [`Pamt::unlock_shared_walk`] gives those of a shared 4K walk back.
    pub(crate) fn keep(self) {
        self.held.into_iter().flatten().for_each(Guard::keep);
    }

    /// For a page of `size` to be taken: it and every smaller unit in it is unassigned.
    pub(crate) fn is_free(&self, size: PageSize) -> bool {
        self.size == size
            && self.entry.page_type() == PageType::Nda
            && (size != PageSize::Size2M || self.tdmr.all_4k_nda(self.pa))
    }
}

impl Pamt {
    pub(crate) fn new(tdmrs: Vec<Tdmr>) -> Self {
        Pamt {
            tdmrs: tdmrs.into_iter().map(TdmrPamt::new).collect(),
        }
    }

    fn find(&self, pa: u64) -> Option<&TdmrPamt> {
        self.tdmrs
            .iter()
            .find(|t| pa >= t.tdmr.range.base && pa < t.tdmr.range.end())
    }

    /// The TDMR of an address whose metadata is initialised (counted in whole GiB).
    fn find_usable(&self, pa: u64) -> Option<&TdmrPamt> {
        self.find(pa).filter(|t| {
            let limit = t.initialised.load(Ordering::Acquire) >> 30 << 30;
            pa - t.tdmr.range.base < limit
        })
    }

    /// The entry of an address at a size, without any lock; for implicit access and observation.
    pub(crate) fn entry(&self, pa: u64, size: PageSize) -> Option<&Entry> {
        Some(self.find(pa)?.entry(pa, size))
    }

    /// Walks from the 1G entry towards `wanted`, sharing the entries on the way, and takes the last in
    /// `mode`. Stops early at a private page of a larger size.
    pub(crate) fn walk(
        &self,
        pa: u64,
        wanted: PageSize,
        mode: LockMode,
    ) -> Result<PageRef<'_>, WalkError> {
        let tdmr = self.find_usable(pa).ok_or(WalkError::OutOfRange)?;
        let stops =
            |size: PageSize, entry: &Entry| size == wanted || entry.page_type() == PageType::Reg;
        let found = |entry, size, held| PageRef {
            entry,
            size,
            tdmr,
            pa,
            held,
        };
        let gig = tdmr.gig(pa);
        let gig_lock = take(&gig.entry, LockMode::Shared)?;
        if stops(PageSize::Size1G, &gig.entry) {
            let held = [Some(in_mode(gig_lock, mode)?), None, None];
            return Ok(found(&gig.entry, PageSize::Size1G, held));
        }
        let two = gig.two(pa);
        let two_lock = take(&two.entry, LockMode::Shared)?;
        if stops(PageSize::Size2M, &two.entry) {
            let held = [Some(in_mode(two_lock, mode)?), Some(gig_lock), None];
            return Ok(found(&two.entry, PageSize::Size2M, held));
        }
        let entry = &tdmr.fours_of(two, pa)[(pa >> 12) as usize % 512];
        let held = [Some(take(entry, mode)?), Some(two_lock), Some(gig_lock)];
        Ok(found(entry, PageSize::Size4K, held))
    }

    /// Gives back the locks of a shared walk that reached a 4K entry.
    pub(crate) fn unlock_shared_walk(&self, pa: u64) {
        if let Some(tdmr) = self.find(pa) {
            for size in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
                tdmr.entry(pa, size).lock.unlock(LockMode::Shared);
            }
        }
    }
}
