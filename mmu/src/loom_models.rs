//! The entry protocol and the lock under every interleaving.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p kvm-ops-mmu --lib loom_models`

extern crate std;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use std::prelude::v1::*;

use crate::{
    EmptyTables, Error, Gfn, Level, Lookup, Mapped, Mirror, MirrorHooks, Page, Pfn, PortId,
    PrivateSpte, ReaderLock, Result, SpteChange,
};

/// A firmware of two entries and as many tables, which finds out if two threads change one entry at
/// once, or one twice.
struct Hooks {
    /// The firmware's entries for frames 0 and 1: changed without a lock, so that the model
    /// checker reports a race.
    pages: [UnsafeCell<u64>; 2],
    tables: [UnsafeCell<u64>; 3],
    /// The page of this number cannot be mapped.
    refuses: u64,
    tables_out: AtomicU64,
    port: PortId,
}

impl Hooks {
    fn new(refuses: u64, port: PortId) -> Self {
        Self {
            pages: [UnsafeCell::new(0), UnsafeCell::new(0)],
            tables: [UnsafeCell::new(0), UnsafeCell::new(0), UnsafeCell::new(0)],
            refuses,
            tables_out: AtomicU64::new(0),
            port,
        }
    }

    fn page(&self, pfn: u64) -> Page {
        // SAFETY: no memory is behind the number.
        unsafe { Page::from_raw(Pfn::new(pfn), Level::Size4K, self.port) }
    }
}

// SAFETY: the cells are checked by the model checker at every access.
unsafe impl Sync for Hooks {}

// SAFETY: no memory is behind the numbers of pages.
unsafe impl MirrorHooks for Hooks {
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        let (cell, value) = match change.new_value() {
            PrivateSpte::Mapped(page) => (&self.pages[change.gfn().get() as usize], page.get()),
            PrivateSpte::Table(table) => (&self.tables[change.level() as usize - 1], table.get()),
            _ => return Ok(()),
        };
        cell.with_mut(|entry| {
            // SAFETY: the model checker refuses a second access at the same time.
            let entry = unsafe { &mut *entry };
            assert_eq!(*entry, 0, "set twice: {change:?}");
            if value == self.refuses {
                return Err(Error::Busy);
            }
            *entry = value;
            Ok(())
        })
    }

    fn flush_private_tlb(&self) -> Result<()> {
        Ok(())
    }

    fn alloc_table(&self) -> Result<Page> {
        Ok(self.page(100 + self.tables_out.fetch_add(1, Ordering::Relaxed)))
    }

    fn free_page(&self, page: Page) {
        if page.into_raw().get() >= 100 {
            self.tables_out.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn leak(&self, _: Page, _: Error) {}
}

fn fault(mirror: &Mirror, hooks: &Hooks, gfn: u64, page: u64) -> Result<Mapped> {
    loop {
        match mirror.map(hooks, Gfn::new(gfn), Level::Size4K, || Ok(hooks.page(page)))? {
            Mapped::Retry => thread::yield_now(),
            other => return Ok(other),
        }
    }
}

/// Two vCPUs fault, each at a frame with a page. `tables`: the tables are there before.
fn race(
    tables: bool,
    refuses: u64,
    faults: [(u64, u64); 2],
    check: impl Fn(Result<Mapped>, Result<Mapped>, &Mirror, &Hooks) + Sync + Send + 'static,
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 100_000;
    builder.check(move || {
        let port = PortId::new();
        let hooks = Arc::new(Hooks::new(refuses, port));
        let mut mirror = Mirror::new(Level::Size512G, port).unwrap();
        if tables {
            let quiet = Hooks::new(0, port);
            mirror
                .map(&quiet, Gfn::new(0), Level::Size4K, || Ok(quiet.page(1)))
                .unwrap();
            mirror
                .zap(&quiet, Gfn::new(0), 1, EmptyTables::Keep)
                .unwrap();
        }
        let mirror = Arc::new(mirror);
        let other = {
            let (mirror, hooks) = (mirror.clone(), hooks.clone());
            thread::spawn(move || fault(&mirror, &hooks, faults[1].0, faults[1].1))
        };
        let mine = fault(&mirror, &hooks, faults[0].0, faults[0].1);
        check(mine, other.join().unwrap(), &mirror, &hooks);
    });
}

#[test]
fn of_two_faults_at_one_entry_one_maps_and_the_other_is_spurious() {
    race(true, 0, [(0, 7), (0, 7)], |a, b, mirror, _| {
        let there = Lookup {
            level: Level::Size4K,
            entry: PrivateSpte::Mapped(Pfn::new(7)),
        };
        let (new, spurious) = (Ok(Mapped::New), Ok(Mapped::Occupied(there)));
        assert!(
            (a, b) == (new, spurious) || (a, b) == (spurious, new),
            "{a:?} {b:?}"
        );
        assert_eq!(mirror.stats().pages_4k, 1);
    });
}

#[test]
fn two_faults_that_miss_the_same_tables_add_each_once_and_both_map() {
    race(false, 0, [(0, 7), (1, 8)], |a, b, mirror, hooks| {
        assert_eq!((a, b), (Ok(Mapped::New), Ok(Mapped::New)));
        assert_eq!(hooks.tables_out.load(Ordering::Relaxed), 3);
        let stats = mirror.stats();
        assert_eq!((stats.pages_4k, stats.tables), (2, 3));
    });
}

#[test]
fn a_fault_that_fails_leaves_the_entry_to_the_other() {
    race(true, 9, [(0, 9), (0, 7)], |a, b, mirror, _| {
        // The refused one fails, or comes second and finds the other's page.
        assert!(
            matches!(a, Err(Error::Busy) | Ok(Mapped::Occupied(_))),
            "{a:?}"
        );
        assert_eq!(b, Ok(Mapped::New));
        let entry = mirror.lookup(Gfn::new(0)).entry;
        assert_eq!(entry, PrivateSpte::Mapped(Pfn::new(7)));
    });
}

#[test]
fn a_table_that_fails_is_added_by_the_other() {
    // Table 100 is refused: whoever takes it first fails, and gives node and page back.
    race(false, 100, [(0, 7), (1, 8)], |a, b, mirror, hooks| {
        let ok = [a, b].iter().filter(|r| **r == Ok(Mapped::New)).count();
        let failed = [a, b].iter().filter(|r| **r == Err(Error::Busy)).count();
        assert_eq!(ok + failed, 2, "{a:?} {b:?}");
        let stats = mirror.stats();
        assert_eq!(stats.pages_4k, ok as u64);
        assert_eq!(stats.tables, hooks.tables_out.load(Ordering::Relaxed));
    });
}

#[test]
fn a_lookup_sees_a_page_only_when_the_hook_is_done() {
    loom::model(|| {
        let port = PortId::new();
        let hooks = Arc::new(Hooks::new(0, port));
        let mirror = Arc::new(Mirror::new(Level::Size512G, port).unwrap());
        let other = {
            let (mirror, hooks) = (mirror.clone(), hooks.clone());
            thread::spawn(move || fault(&mirror, &hooks, 0, 7))
        };
        if let PrivateSpte::Mapped(page) = mirror.lookup(Gfn::new(0)).entry {
            // SAFETY: the model checker refuses this if the hook may still be writing.
            hooks.pages[0].with(|entry| assert_eq!(unsafe { *entry }, page.get()));
        }
        assert_eq!(other.join().unwrap(), Ok(Mapped::New));
    });
}

#[test]
fn a_writer_is_alone_and_readers_see_what_it_left() {
    loom::model(|| {
        let lock = Arc::new(ReaderLock::new(2, UnsafeCell::new(0u64)));
        let reader = {
            let lock = lock.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    let cell = lock.read(0, thread::yield_now);
                    // SAFETY: the model checker refuses it beside a write.
                    cell.with(|value| assert!(unsafe { *value } <= 1));
                }
            })
        };
        {
            let cell = lock.write(thread::yield_now);
            // SAFETY: the model checker refuses it beside any other access.
            cell.with_mut(|value| unsafe { *value += 1 });
        }
        // SAFETY: as above.
        lock.read(1, thread::yield_now)
            .with(|value| assert_eq!(unsafe { *value }, 1));
        reader.join().unwrap();
    });
}

#[test]
fn of_two_writers_each_is_alone() {
    loom::model(|| {
        let lock = Arc::new(ReaderLock::new(1, UnsafeCell::new(0u64)));
        let write = |lock: &ReaderLock<UnsafeCell<u64>>| {
            let cell = lock.write(thread::yield_now);
            // SAFETY: the model checker refuses it beside any other access.
            cell.with_mut(|value| unsafe { *value += 1 });
        };
        let other = {
            let lock = lock.clone();
            thread::spawn(move || write(&lock))
        };
        write(&lock);
        other.join().unwrap();
        // SAFETY: the other is gone.
        lock.read(0, thread::yield_now)
            .with(|value| assert_eq!(unsafe { *value }, 2));
    });
}

#[test]
fn readers_that_share_a_slot_are_both_seen_by_a_writer() {
    loom::model(|| {
        let lock = Arc::new(ReaderLock::new(1, UnsafeCell::new(0u64)));
        let other = {
            let lock = lock.clone();
            thread::spawn(move || {
                let Some(cell) = lock.try_read(0) else { return };
                // SAFETY: the model checker refuses it beside a write.
                cell.with(|value| assert!(unsafe { *value } <= 1));
            })
        };
        if let Some(cell) = lock.try_read(0) {
            // SAFETY: as above.
            cell.with(|value| assert_eq!(unsafe { *value }, 0));
        }
        let cell = lock.write(thread::yield_now);
        // SAFETY: the model checker refuses it beside any other access.
        cell.with_mut(|value| unsafe { *value += 1 });
        drop(cell);
        other.join().unwrap();
    });
}

#[test]
fn a_fault_beside_a_zap_is_before_or_after_it() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.max_branches = 100_000;
    builder.check(|| {
        let port = PortId::new();
        let mirror = Mirror::new(Level::Size512G, port).unwrap();
        let lock = Arc::new(ReaderLock::new(1, mirror));
        let hooks = Arc::new(Hooks::new(0, port));
        let faulting = {
            let (lock, hooks) = (lock.clone(), hooks.clone());
            thread::spawn(move || {
                let mirror = lock.read(0, thread::yield_now);
                fault(&mirror, &hooks, 0, 7)
            })
        };
        let zapped = {
            let mut mirror = lock.write(thread::yield_now);
            mirror
                .zap(&*hooks, Gfn::new(0), 2, EmptyTables::Keep)
                .unwrap()
        };
        assert_eq!(faulting.join().unwrap(), Ok(Mapped::New));
        let left = lock.read(0, thread::yield_now).stats().pages_4k;
        assert_eq!(left + zapped.pages, 1);
    });
}
