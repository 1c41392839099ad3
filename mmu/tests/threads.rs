//! Real threads on one mirror.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use kvm_ops_mmu::{
    EmptyTables, Error, Gfn, Level, Mapped, Mirror, MirrorHooks, Page, Pfn, PortId, PrivateSpte,
    ReaderLock, Result, SpteChange,
};

const THREADS: u64 = if cfg!(miri) { 2 } else { 4 };
const FRAMES: u64 = if cfg!(miri) { 6 } else { 1024 };
const ROUNDS: u64 = if cfg!(miri) { 2 } else { 8 };

/// Counts, checks that no entry is changed by two threads at once, and fails now and then.
struct Hooks {
    port: PortId,
    calls: AtomicU64,
    pages: AtomicU64,
    tables: AtomicU64,
    freed: AtomicU64,
    inside: Mutex<HashSet<(u64, Level)>>,
}

// SAFETY: no memory is behind the numbers of pages.
unsafe impl MirrorHooks for Hooks {
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        let key = (change.gfn().get(), change.level());
        assert!(self.inside.lock().unwrap().insert(key), "two at {key:?}");
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let fails = call % 61 == 3;
        if !fails {
            match change.new_value() {
                PrivateSpte::Mapped(_) => self.pages.fetch_add(1, Ordering::Relaxed),
                PrivateSpte::Table(_) => self.tables.fetch_add(1, Ordering::Relaxed),
                _ => 0,
            };
        }
        assert!(self.inside.lock().unwrap().remove(&key));
        if fails { Err(Error::Busy) } else { Ok(()) }
    }

    fn flush_private_tlb(&self) -> Result<()> {
        Ok(())
    }

    fn alloc_table(&self) -> Result<Page> {
        Ok(self.page(TABLE))
    }

    fn free_page(&self, page: Page) {
        if page.into_raw() != TABLE {
            self.freed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn leak(&self, _: Page, _: Error) {}
}

impl Hooks {
    fn page(&self, pfn: Pfn) -> Page {
        // SAFETY: no memory is behind the number.
        unsafe { Page::from_raw(pfn, Level::Size4K, self.port) }
    }
}

const TABLE: Pfn = Pfn::new(1 << 30);

/// Frames of many tables, a few of each.
fn gfn(i: u64) -> Gfn {
    Gfn::new(i % 64 + ((i / 64) << 18) + ((i % 3) << 9))
}

#[test]
fn of_all_faults_on_a_frame_one_maps_it_while_others_look_and_zap() {
    let hooks = Hooks {
        port: PortId::new(),
        calls: AtomicU64::new(0),
        pages: AtomicU64::new(0),
        tables: AtomicU64::new(0),
        freed: AtomicU64::new(0),
        inside: Mutex::default(),
    };
    let lock = ReaderLock::new(
        THREADS as usize,
        Mirror::new(Level::Size512G, hooks.port).unwrap(),
    );
    let new = AtomicU64::new(0);
    let taken = AtomicU64::new(0);
    let zapped = AtomicU64::new(0);
    thread::scope(|scope| {
        for t in 0..THREADS {
            let (hooks, lock, new, taken, zapped) = (&hooks, &lock, &new, &taken, &zapped);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    for i in 0..FRAMES {
                        let gfn = gfn((i * 31 + t) % FRAMES);
                        let page = Pfn::new(gfn.get());
                        loop {
                            let mirror = lock.read(t as usize, thread::yield_now);
                            let supply = || {
                                taken.fetch_add(1, Ordering::Relaxed);
                                Ok(hooks.page(page))
                            };
                            match mirror.map(hooks, gfn, Level::Size4K, supply) {
                                Ok(Mapped::New) => {
                                    new.fetch_add(1, Ordering::Relaxed);
                                    let entry = mirror.lookup(gfn).entry;
                                    assert_eq!(entry, PrivateSpte::Mapped(page));
                                    break;
                                }
                                Ok(Mapped::Occupied(found)) => {
                                    assert_eq!(found.entry, PrivateSpte::Mapped(page));
                                    break;
                                }
                                Ok(Mapped::Retry) | Err(Error::Busy) => {}
                                other => panic!("{other:?}"),
                            }
                            drop(mirror);
                            thread::yield_now();
                        }
                    }
                    if t == round % THREADS {
                        let mut mirror = lock.write(thread::yield_now);
                        let all = mirror.frames();
                        // Until no hook fails; `free_page` counts the pages removed.
                        while let Err(error) =
                            mirror.zap(hooks, Gfn::new(0), all, EmptyTables::Free)
                        {
                            assert_eq!(error, Error::Busy);
                        }
                        zapped.fetch_add(1, Ordering::Relaxed);
                        assert_eq!(mirror.stats().tables, 0);
                    }
                }
            });
        }
    });
    let mut mirror = lock.into_inner();
    let left = mirror.stats().pages_4k;
    let new = new.into_inner();
    assert_eq!(new, hooks.pages.load(Ordering::Relaxed), "one hook each");
    let freed = hooks.freed.load(Ordering::Relaxed);
    assert_eq!(
        taken.into_inner(),
        left + freed,
        "each page is in the mirror or back"
    );
    assert_eq!(zapped.into_inner(), ROUNDS);
    let mut listed = 0;
    mirror.drain(|_, held| listed += u64::from(held == kvm_ops_mmu::PageKind::Page));
    assert_eq!(listed, left);
}

#[test]
fn a_writer_sees_and_leaves_whole_values_among_readers_that_share_slots() {
    let lock = ReaderLock::new(2, (0u64, 0u64));
    thread::scope(|scope| {
        for t in 0..THREADS as usize {
            let lock = &lock;
            scope.spawn(move || {
                for i in 0..ROUNDS * 50 {
                    if i % 5 == 0 {
                        let mut pair = lock.write(thread::yield_now);
                        pair.0 += 1;
                        pair.1 += 1;
                    } else {
                        let pair = lock.read(t, thread::yield_now);
                        assert_eq!(pair.0, pair.1);
                    }
                }
            });
        }
    });
    let writes = THREADS * ROUNDS * 50 / 5;
    assert_eq!(lock.into_inner(), (writes, writes));
}
