//! A firmware to test against: it keeps separate tables, refuses the calls that the real one
//! refuses, and fails on demand.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use kvm_ops_mmu::{
    Error, Gfn, Level, Mirror, MirrorHooks, Page, Pfn, PortId, PrivateSpte as E, Removal, Result,
    SpteChange,
};

/// Pages from here on are tables, to tell the two kinds apart.
pub const TABLES: u64 = 1 << 32;
/// Pages from here on are the guest's, as are those below the tables.
pub const PAGES: u64 = 1 << 40;

#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counts {
    pub add_table: u64,
    pub add_page: u64,
    pub block: u64,
    pub unblock: u64,
    pub remove: u64,
    pub block_table: u64,
    pub unblock_table: u64,
    pub remove_table: u64,
    pub demote: u64,
    pub promote: u64,
    pub flush: u64,
}

impl Counts {
    pub fn total(&self) -> u64 {
        self.add_table
            + self.add_page
            + self.block
            + self.unblock
            + self.remove
            + self.block_table
            + self.unblock_table
            + self.remove_table
            + self.demote
            + self.promote
            + self.flush
    }
}

#[derive(Default)]
pub struct State {
    /// The truth: every entry that is not empty.
    pub entries: BTreeMap<(u64, Level), E>,
    /// Blocked since the last flush.
    pub fresh: BTreeSet<(u64, Level)>,
    pub counts: Counts,
    next_table: u64,
    /// Table pages that are out: in a table, or in the mirror's hands.
    pub tables_out: BTreeSet<u64>,
    pub pages_freed: Vec<(Pfn, Level)>,
    pub leaked: Vec<(Pfn, Level, Error)>,
    /// Calls until the next failure, and how it fails.
    pub fail: Vec<(u32, Failure)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Busy,
    Again,
    Hard,
    /// A removal is done, but not clean. Other calls fail hard.
    Dirty,
}

impl Failure {
    pub fn error(self) -> Error {
        match self {
            Failure::Busy => Error::Busy,
            Failure::Again => Error::Again,
            Failure::Hard | Failure::Dirty => Error::Firmware(0xC000_0100_0000_0000),
        }
    }
}

pub struct Firmware {
    pub root: Level,
    pub port: PortId,
    pub state: RefCell<State>,
}

impl Firmware {
    pub fn new(root: Level) -> Self {
        let state = State {
            next_table: TABLES,
            ..State::default()
        };
        Self {
            root,
            port: PortId::new(),
            state: RefCell::new(state),
        }
    }

    /// An empty mirror for this firmware.
    pub fn mirror(&self) -> Mirror {
        Mirror::new(self.root, self.port).unwrap()
    }

    /// The owner of a page that only has a number.
    pub fn page(&self, pfn: u64, level: Level) -> Page {
        // SAFETY: no memory is behind the number.
        unsafe { Page::from_raw(Pfn::new(pfn), level, self.port) }
    }

    pub fn counts(&self) -> Counts {
        self.state.borrow().counts
    }

    /// The calls of `f`.
    pub fn counts_of(&self, f: impl FnOnce()) -> Counts {
        self.state.borrow_mut().counts = Counts::default();
        f();
        self.counts()
    }

    /// The failure that is due now, if any.
    fn failure(&self) -> Option<Failure> {
        let mut state = self.state.borrow_mut();
        let (left, failure) = state.fail.last_mut()?;
        let failure = *failure;
        if *left > 0 {
            *left -= 1;
            return None;
        }
        state.fail.pop();
        Some(failure)
    }

    pub fn entries(&self) -> BTreeMap<(u64, Level), E> {
        self.state.borrow().entries.clone()
    }

    fn apply(&self, c: &SpteChange) {
        let mut s = self.state.borrow_mut();
        let s = &mut *s;
        let (gfn, at, old, new) = (c.gfn(), c.level(), c.old(), c.new_value());
        let key = (gfn.get(), at);
        assert!(gfn.is_aligned(at), "{c:?}");
        let held = s.entries.get(&key).copied().unwrap_or(E::Absent);
        assert_eq!(held, old, "the mirror knows the entry: {c:?}");
        // The walk to the entry goes through tables that are not blocked.
        let mut level = at;
        while level < self.root {
            level = level.parent().unwrap();
            let above = gfn.get() & !(level.frames() - 1);
            assert!(
                matches!(s.entries.get(&(above, level)), Some(E::Table(_))),
                "no way to {c:?} at {level:?}"
            );
        }
        let size = at.frames();
        let child = Level::ALL
            .into_iter()
            .rev()
            .find(|l| *l < at)
            .unwrap_or(Level::Size4K);
        let below: Vec<_> = if at == Level::Size4K {
            vec![]
        } else {
            s.entries
                .range((key.0, Level::Size4K)..(key.0 + size, Level::Size4K))
                .filter(|((_, l), _)| *l == child)
                .map(|(k, e)| (*k, *e))
                .collect()
        };
        let flushed = !s.fresh.contains(&key);
        let n = &mut s.counts;
        match (old, new) {
            (E::Absent, E::Table(p)) => {
                assert!(at >= Level::Size2M && s.tables_out.contains(&p.get()));
                n.add_table += 1;
            }
            (E::Absent, E::Mapped(p)) => {
                assert!(at <= Level::Size2M && p.is_aligned(at));
                n.add_page += 1;
            }
            (E::Mapped(a), E::Blocked(b)) if a == b => n.block += 1,
            (E::Blocked(a), E::Mapped(b)) if a == b && flushed => n.unblock += 1,
            (E::Blocked(_), E::Absent) if flushed => n.remove += 1,
            (E::Table(a), E::BlockedTable(b)) if a == b => n.block_table += 1,
            (E::BlockedTable(a), E::Table(b)) if a == b && flushed => n.unblock_table += 1,
            (E::BlockedTable(_), E::Absent) if flushed => {
                assert!(below.is_empty(), "only an empty table is removed");
                n.remove_table += 1;
            }
            (E::Blocked(p), E::Table(t)) if flushed && at == Level::Size2M => {
                assert!(s.tables_out.contains(&t.get()));
                n.demote += 1;
                for i in 0..512 {
                    let page = Pfn::new(p.get() + i);
                    s.entries
                        .insert((key.0 + i, Level::Size4K), E::Mapped(page));
                }
            }
            (E::BlockedTable(_), E::Mapped(p)) if flushed && at == Level::Size2M => {
                assert_eq!(below.len(), 512);
                for (i, (k, e)) in below.into_iter().enumerate() {
                    assert_eq!(e, E::Mapped(Pfn::new(p.get() + i as u64)));
                    s.entries.remove(&k);
                }
                n.promote += 1;
            }
            _ => panic!("the firmware knows no such change, or it is not flushed: {c:?}"),
        }
        if matches!(new, E::Blocked(_) | E::BlockedTable(_)) {
            s.fresh.insert(key);
        }
        if new == E::Absent {
            s.entries.remove(&key);
        } else {
            s.entries.insert(key, new);
        }
    }
}

// SAFETY: no memory is behind the numbers of pages.
unsafe impl MirrorHooks for Firmware {
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        if let Some(failure) = self.failure() {
            return Err(failure.error());
        }
        self.apply(change);
        Ok(())
    }

    fn remove_private_spte(&self, change: &SpteChange) -> Removal {
        match self.failure() {
            Some(Failure::Dirty) => {
                self.apply(change);
                Removal::Dirty(Failure::Dirty.error())
            }
            Some(failure) => Removal::Failed(failure.error()),
            None => {
                self.apply(change);
                Removal::Done
            }
        }
    }

    fn flush_private_tlb(&self) -> Result<()> {
        if let Some(failure) = self.failure() {
            return Err(failure.error());
        }
        let mut s = self.state.borrow_mut();
        s.counts.flush += 1;
        s.fresh.clear();
        Ok(())
    }

    fn alloc_table(&self) -> Result<Page> {
        if self.failure().is_some() {
            return Err(Error::NoMemory);
        }
        let mut s = self.state.borrow_mut();
        s.next_table += 1;
        let table = s.next_table;
        s.tables_out.insert(table);
        Ok(self.page(table, Level::Size4K))
    }

    fn free_page(&self, page: Page) {
        let mut s = self.state.borrow_mut();
        let (level, pfn) = (page.level(), page.into_raw());
        if !(TABLES..PAGES).contains(&pfn.get()) {
            s.pages_freed.push((pfn, level));
            return;
        }
        assert!(s.tables_out.remove(&pfn.get()), "freed twice");
        let in_use = |e: &E| matches!(e, E::Table(t) | E::BlockedTable(t) if *t == pfn);
        assert!(
            !s.entries.values().any(in_use),
            "the firmware has the table"
        );
    }

    fn leak(&self, page: Page, error: Error) {
        let mut s = self.state.borrow_mut();
        let (level, pfn) = (page.level(), page.into_raw());
        s.tables_out.remove(&pfn.get());
        s.leaked.push((pfn, level, error));
    }
}

/// The mirror's entries, in the form in which the firmware keeps them.
pub fn entries_of(mirror: &kvm_ops_mmu::Mirror) -> BTreeMap<(u64, Level), E> {
    let mut entries = BTreeMap::new();
    mirror.for_each(|gfn: Gfn, level, entry| {
        assert!(entries.insert((gfn.get(), level), entry).is_none());
    });
    entries
}
