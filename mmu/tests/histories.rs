//! Random histories, with hooks that fail at random points: the mirror always says what the
//! firmware has, and no page is lost or given out twice.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Failure, Firmware, PAGES, entries_of};
use kvm_ops_mmu::{
    EmptyTables, Gfn, Level, Lookup, Mapped, Mirror, PageKind, Pfn, PrivateSpte, Result,
};
use proptest::prelude::*;

const TOPS: [Level; 2] = [Level::Size512G, Level::Size256T];

#[derive(Clone, Debug)]
enum Op {
    Map(u64, Level, bool),
    Fill(u64, u64),
    Lookup(u64),
    Zap(u64, u64, bool),
    Block(u64, u64),
    Unblock(u64, u64),
    Demote(u64),
    Promote(u64),
}

/// Frames close together, so that ranges meet, at both ends of what a mirror covers.
fn gfn() -> impl Strategy<Value = u64> {
    (
        0u64..4,
        prop_oneof![Just(0u64), Just(1), 0u64..512, Just(511)],
        prop_oneof![Just(0u64), Just(1 << 18), Just((1 << 36) - 2048)],
    )
        .prop_map(|(table, page, base)| base + table * 512 + page)
}

fn op() -> impl Strategy<Value = Op> {
    let range = || {
        (
            gfn(),
            prop_oneof![Just(1u64), Just(512), 1u64..1600, Just(1 << 19)],
        )
    };
    prop_oneof![
        3 => (gfn(), any::<bool>(), any::<bool>()).prop_map(|(g, large, other)| {
            let level = if large { Level::Size2M } else { Level::Size4K };
            Op::Map(g & !(level.frames() - 1), level, other)
        }),
        2 => range().prop_map(|(g, n)| Op::Fill(g, n.min(2000))),
        2 => gfn().prop_map(Op::Lookup),
        2 => (range(), any::<bool>()).prop_map(|((g, n), keep)| Op::Zap(g, n, keep)),
        1 => range().prop_map(|(g, n)| Op::Block(g, n)),
        1 => range().prop_map(|(g, n)| Op::Unblock(g, n)),
        2 => gfn().prop_map(Op::Demote),
        2 => gfn().prop_map(Op::Promote),
    ]
}

fn failures() -> impl Strategy<Value = Vec<(u32, Failure)>> {
    let failure = prop_oneof![
        Just(Failure::Busy),
        Just(Failure::Again),
        Just(Failure::Hard),
        Just(Failure::Dirty)
    ];
    let after = prop_oneof![4 => 0u32..12, 1 => 0u32..1500];
    prop::collection::vec((after, failure), 0..8)
}

/// Offset of the other page for a frame.
const OTHERS: u64 = 1 << 41;

/// The page of a frame: fixed, so that faults repeat and promotions are possible.
fn page_of(gfn: u64) -> Pfn {
    Pfn::new(PAGES + (gfn & 0x1f_ffff_ffff))
}

/// The entry that decides about a frame, from the firmware's entries alone.
fn expected(entries: &BTreeMap<(u64, Level), PrivateSpte>, top: Level, gfn: u64) -> Lookup {
    let mut level = top;
    loop {
        let key = (gfn & !(level.frames() - 1), level);
        match entries.get(&key) {
            Some(PrivateSpte::Table(_)) => {
                level = Level::ALL.into_iter().rev().find(|l| *l < level).unwrap()
            }
            Some(entry) => {
                return Lookup {
                    level,
                    entry: *entry,
                };
            }
            None => {
                return Lookup {
                    level,
                    entry: PrivateSpte::Absent,
                };
            }
        }
    }
}

fn run(mirror: &mut Mirror, fw: &Firmware, op: &Op) -> Result<()> {
    let g = Gfn::new;
    match *op {
        Op::Map(gfn, level, other) => {
            let page = if other {
                Pfn::new(page_of(gfn).get() + OTHERS)
            } else {
                page_of(gfn)
            };
            let before = expected(&fw.entries(), fw.root, gfn);
            let mapped = if gfn % 2 == 0 {
                mirror.map(fw, g(gfn), level, || Ok(fw.page(page.get(), level)))?
            } else {
                let mut cursor = mirror.cursor();
                cursor.lookup(g(gfn ^ 1));
                cursor.map(fw, g(gfn), level, || Ok(fw.page(page.get(), level)))?
            };
            match mapped {
                Mapped::New => assert_eq!(before.entry, PrivateSpte::Absent),
                // The entry that was there, or the table where a 2 MiB page was wanted.
                Mapped::Occupied(found) => assert!(found == before || found.level > before.level),
                Mapped::Retry => panic!("no other thread is here"),
            }
            if mapped != Mapped::New && level == Level::Size4K {
                assert_ne!(before.entry, PrivateSpte::Absent);
                assert_eq!(mapped, Mapped::Occupied(before));
            }
        }
        Op::Fill(gfn, pages) => {
            mirror.map_range(fw, g(gfn), pages, |gfn| {
                Ok(fw.page(page_of(gfn.get()).get(), Level::Size4K))
            })?;
        }
        Op::Lookup(gfn) => {
            let calls = fw.counts().total();
            assert_eq!(mirror.lookup(g(gfn)), expected(&fw.entries(), fw.root, gfn));
            assert_eq!(mirror.cursor().lookup(g(gfn)), mirror.lookup(g(gfn)));
            assert_eq!(fw.counts().total(), calls);
        }
        Op::Zap(gfn, pages, keep) => {
            let empty = if keep {
                EmptyTables::Keep
            } else {
                EmptyTables::Free
            };
            mirror.zap(fw, g(gfn), pages, empty)?;
            // All gone, and with `Free` no table of the range is empty.
            let after = fw.entries();
            let inside = |k: u64, l: Level| k < gfn + pages && k + l.frames() > gfn;
            for ((k, l), e) in &after {
                if inside(*k, *l) {
                    let PrivateSpte::Table(_) = e else {
                        panic!("{e:?} left at {k:#x} {l:?}");
                    };
                    let child = Level::ALL.into_iter().rev().find(|c| c < l).unwrap();
                    let full = after
                        .keys()
                        .any(|(c, cl)| *cl == child && *c >= *k && *c < k + l.frames());
                    assert!(keep || full, "an empty table stayed at {k:#x} {l:?}");
                }
            }
        }
        Op::Block(gfn, pages) => {
            mirror.block(fw, g(gfn), pages)?;
        }
        Op::Unblock(gfn, pages) => {
            mirror.unblock(fw, g(gfn), pages)?;
            for ((k, l), e) in fw.entries() {
                if k < gfn + pages && k + l.frames() > gfn {
                    assert!(matches!(e, PrivateSpte::Mapped(_) | PrivateSpte::Table(_)));
                }
            }
        }
        Op::Demote(gfn) => mirror.demote(fw, g(gfn))?,
        Op::Promote(gfn) => mirror.promote(fw, g(gfn))?,
    }
    Ok(())
}

/// Every page that the firmware holds is listed once, and nothing else.
fn drained(mirror: &mut Mirror, fw: &Firmware) {
    let mut pages = BTreeSet::new();
    let mut tables = BTreeSet::new();
    mirror.drain(|page, held| {
        let (level, page) = (page.level(), page.into_raw());
        let new = match held {
            PageKind::Page => pages.insert((page.get(), level)),
            PageKind::Table => {
                assert_eq!(level, Level::Size4K);
                tables.insert(page.get())
            }
        };
        assert!(new, "listed twice: {page:?}");
    });
    let mut held = BTreeSet::new();
    for ((_, level), entry) in fw.entries() {
        if let PrivateSpte::Mapped(p) | PrivateSpte::Blocked(p) = entry {
            held.insert((p.get(), level));
        }
    }
    assert_eq!(pages, held);
    assert_eq!(tables, fw.state.borrow().tables_out);
    assert!(entries_of(mirror).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 1 } else { 64 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_mirror_says_what_the_firmware_has_whatever_fails(
        five in any::<bool>(),
        steps in prop::collection::vec((op(), failures()), 1..24),
    ) {
        let top = TOPS[usize::from(five)];
        let fw = Firmware::new(top);
        let mut mirror = fw.mirror();
        for (op, failures) in &steps {
            fw.state.borrow_mut().fail = failures.clone();
            let _ = run(&mut mirror, &fw, op);
            // The same again: it goes on where it stopped, through every failure that is left.
            for _ in failures {
                let _ = run(&mut mirror, &fw, op);
            }
            fw.state.borrow_mut().fail.clear();
            prop_assert_eq!(entries_of(&mirror), fw.entries());
        }
        // Without failures everything can be removed, and comes back.
        let all = mirror.frames();
        mirror.zap(&fw, Gfn::new(0), all, EmptyTables::Free).unwrap();
        prop_assert!(fw.entries().is_empty());
        prop_assert!(fw.state.borrow().tables_out.is_empty());
        drained(&mut mirror, &fw);
    }

    #[test]
    fn the_teardown_lists_every_page_once(
        five in any::<bool>(),
        steps in prop::collection::vec((op(), failures()), 1..12),
    ) {
        let top = TOPS[usize::from(five)];
        let fw = Firmware::new(top);
        let mut mirror = fw.mirror();
        for (op, failures) in &steps {
            fw.state.borrow_mut().fail = failures.clone();
            let _ = run(&mut mirror, &fw, op);
        }
        drained(&mut mirror, &fw);
// An emptied mirror can be used again.
        let mut fresh = Firmware::new(top);
        fresh.port = fw.port;
        let page = || Ok(fw.page(page_of(7).get(), Level::Size4K));
        prop_assert_eq!(
            mirror.map(&fresh, Gfn::new(7), Level::Size4K, page),
            Ok(Mapped::New)
        );
    }
}
