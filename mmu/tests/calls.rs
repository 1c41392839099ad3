//! The cost of each operation, in calls to the firmware.

mod common;

use common::{Counts, Failure, Firmware, entries_of};
use kvm_ops_mmu::{
    EmptyTables, Error, Gfn, Level, Lookup, Mapped, Mirror, Page, Pfn, PortId, PrivateSpte, Removal,
};

const ZERO: Counts = Counts {
    add_table: 0,
    add_page: 0,
    block: 0,
    unblock: 0,
    remove: 0,
    block_table: 0,
    unblock_table: 0,
    remove_table: 0,
    demote: 0,
    promote: 0,
    flush: 0,
};

fn g(gfn: u64) -> Gfn {
    Gfn::new(gfn)
}

fn filled(top: Level, frames: &[u64]) -> (Firmware, Mirror) {
    let fw = Firmware::new(top);
    let mirror = fw.mirror();
    for &gfn in frames {
        let page = || Ok(fw.page(gfn + 0x1000, Level::Size4K));
        assert_eq!(
            mirror.map(&fw, g(gfn), Level::Size4K, page),
            Ok(Mapped::New)
        );
    }
    (fw, mirror)
}

#[test]
fn a_fault_costs_one_call_and_one_more_for_each_missing_table() {
    for (top, tables) in [(Level::Size512G, 3), (Level::Size256T, 4)] {
        let fw = Firmware::new(top);
        let mirror = fw.mirror();
        let map = |gfn| {
            fw.counts_of(|| {
                let page = || Ok(fw.page(gfn + 0x1000, Level::Size4K));
                assert_eq!(
                    mirror.map(&fw, g(gfn), Level::Size4K, page),
                    Ok(Mapped::New)
                );
            })
        };
        let cost = |add_table| Counts {
            add_table,
            add_page: 1,
            ..ZERO
        };
        assert_eq!(map(5), cost(tables), "nothing was there");
        assert_eq!(map(6), cost(0), "all tables were");
        assert_eq!(map(512), cost(1), "the next 2 MiB");
        assert_eq!(map(1 << 18), cost(2), "the next 1 GiB");
    }
}

#[test]
fn a_spurious_fault_and_a_lookup_cost_nothing() {
    let (fw, mirror) = filled(Level::Size512G, &[5]);
    let counts = fw.counts_of(|| {
        let entry = PrivateSpte::Mapped(Pfn::new(0x1005));
        let found = Lookup {
            level: Level::Size4K,
            entry,
        };
        assert_eq!(mirror.lookup(g(5)), found);
        let again = mirror.map(&fw, g(5), Level::Size4K, || panic!("no page is needed"));
        assert_eq!(again, Ok(Mapped::Occupied(found)));
        for gfn in [6, 512, 1 << 30, 1 << 36, u64::MAX] {
            assert_eq!(mirror.lookup(g(gfn)).entry, PrivateSpte::Absent);
        }
    });
    assert_eq!(counts, ZERO);
}

#[test]
fn removing_n_pages_costs_n_to_block_one_flush_and_n_to_remove() {
    let sizes = [1u64, 2, 511, 512, 513, 3000];
    for &n in if cfg!(miri) { &sizes[..2] } else { &sizes } {
        let frames: Vec<u64> = (0..n).map(|i| 100 + i * 3).collect();
        let (fw, mut mirror) = filled(Level::Size512G, &frames);
        let counts = fw.counts_of(|| {
            let zapped = mirror.zap(&fw, g(0), 1 << 20, EmptyTables::Keep).unwrap();
            assert_eq!((zapped.pages, zapped.tables), (n, 0));
        });
        let expected = Counts {
            block: n,
            flush: 1,
            remove: n,
            ..ZERO
        };
        assert_eq!(counts, expected);
        assert_eq!(fw.state.borrow().pages_freed.len() as u64, n);
        let again = fw.counts_of(|| {
            mirror.zap(&fw, g(0), 1 << 20, EmptyTables::Keep).unwrap();
        });
        assert_eq!(again, ZERO, "nothing is there");
    }
}

#[test]
fn freeing_empty_tables_costs_one_flush_for_each_level_that_has_any() {
    // Two leaves in one directory, one in another; and a table that is not empty afterwards.
    let (fw, mut mirror) = filled(Level::Size512G, &[0, 512, 1 << 18, (2 << 18) + 7]);
    let counts = fw.counts_of(|| {
        let zapped = mirror.zap(&fw, g(0), 2 << 18, EmptyTables::Free).unwrap();
        assert_eq!((zapped.pages, zapped.tables), (3, 5));
    });
    let expected = Counts {
        block: 3,
        remove: 3,
        block_table: 5,
        remove_table: 5,
        flush: 1 + 2,
        ..ZERO
    };
    assert_eq!(counts, expected);
    assert_eq!(mirror.stats().tables, 3, "those of the page that stayed");
}

#[test]
fn demotion_and_promotion_cost_three_calls_each_and_undo_each_other() {
    let fw = Firmware::new(Level::Size512G);
    let mut mirror = fw.mirror();
    mirror
        .map(&fw, g(1024), Level::Size2M, || {
            Ok(fw.page(0x200, Level::Size2M))
        })
        .unwrap();
    let before = fw.entries();
    let down = fw.counts_of(|| mirror.demote(&fw, g(1024 + 77)).unwrap());
    let expected = Counts {
        block: 1,
        flush: 1,
        demote: 1,
        ..ZERO
    };
    assert_eq!(down, expected);
    assert_eq!(
        mirror.lookup(g(1024 + 77)).entry,
        PrivateSpte::Mapped(Pfn::new(0x200 + 77))
    );
    let up = fw.counts_of(|| mirror.promote(&fw, g(1024 + 511)).unwrap());
    let expected = Counts {
        block_table: 1,
        flush: 1,
        promote: 1,
        ..ZERO
    };
    assert_eq!(up, expected);
    assert_eq!(fw.entries(), before);
    assert_eq!(entries_of(&mirror), before);
    assert!(fw.state.borrow().tables_out.len() == mirror.stats().tables as usize);
}

#[test]
fn a_range_that_cuts_a_large_page_splits_it_and_touches_no_frame_outside() {
    let fw = Firmware::new(Level::Size512G);
    let mut mirror = fw.mirror();
    for table in 0..3 {
        let page = fw.page(0x10000 + table * 512, Level::Size2M);
        mirror
            .map(&fw, g(table * 512), Level::Size2M, || Ok(page))
            .unwrap();
    }
    let zapped = mirror
        .zap(&fw, g(500), 512 + 24, EmptyTables::Free)
        .unwrap();
    assert_eq!(zapped.pages, 12 + 1 + 12, "the one in the middle is whole");
    for gfn in 0..3 * 512 {
        let mapped = PrivateSpte::Mapped(Pfn::new(0x10000 + gfn));
        let expected = if (500..1036).contains(&gfn) {
            PrivateSpte::Absent
        } else {
            mapped
        };
        assert_eq!(mirror.lookup(g(gfn)).entry, expected, "{gfn}");
    }
}

#[test]
fn what_is_not_clean_is_leaked_once_and_never_freed() {
    let (fw, mut mirror) = filled(Level::Size512G, &[1, 2, 3]);
    // Three blocks, a flush, one removal; then the second is dirty.
    fw.state.borrow_mut().fail = vec![(5, Failure::Dirty)];
    let error = Failure::Dirty.error();
    assert_eq!(mirror.zap(&fw, g(0), 512, EmptyTables::Free), Err(error));
    assert_eq!(
        fw.state.borrow().leaked,
        [(Pfn::new(0x1002), Level::Size4K, error)]
    );
    assert_eq!(
        fw.state.borrow().pages_freed,
        [(Pfn::new(0x1001), Level::Size4K)]
    );
    assert_eq!(mirror.lookup(g(2)).entry, PrivateSpte::Absent);
    assert_eq!(
        mirror.lookup(g(3)).entry,
        PrivateSpte::Blocked(Pfn::new(0x1003))
    );
    let mut listed = Vec::new();
    mirror.drain(|page, _| listed.push(page.into_raw().get()));
    assert!(listed.contains(&0x1003) && !listed.contains(&0x1002));
}

#[test]
fn a_blocked_page_is_occupied_until_it_is_unblocked() {
    let (fw, mut mirror) = filled(Level::Size512G, &[9, 10]);
    assert_eq!(mirror.block(&fw, g(9), 1), Ok(1));
    let occupied = |m: &Mirror, entry| {
        let mapped = m.map(&fw, g(9), Level::Size4K, || panic!("no page is needed"));
        let level = Level::Size4K;
        assert_eq!(mapped, Ok(Mapped::Occupied(Lookup { level, entry })));
    };
    occupied(&mirror, PrivateSpte::Blocked(Pfn::new(0x1009)));
    assert_eq!(mirror.unblock(&fw, g(0), 512), Ok(1));
    occupied(&mirror, PrivateSpte::Mapped(Pfn::new(0x1009)));
}

#[test]
fn a_promotion_that_stays_half_way_keeps_its_pages_in_the_list_and_can_be_undone() {
    let fw = Firmware::new(Level::Size512G);
    let mut mirror = fw.mirror();
    mirror
        .map_range(&fw, g(0), 512, |gfn| {
            Ok(fw.page(0x400 + gfn.get(), Level::Size4K))
        })
        .unwrap();
    // The block succeeds, the flush fails; what would undo it needs the flush as well.
    fw.state.borrow_mut().fail = vec![(1, Failure::Hard)];
    assert_eq!(mirror.promote(&fw, g(3)), Err(Failure::Hard.error()));
    assert_eq!(entries_of(&mirror), fw.entries());
    assert!(matches!(
        mirror.lookup(g(3)),
        Lookup {
            level: Level::Size2M,
            entry: PrivateSpte::BlockedTable(_)
        }
    ));
    assert_eq!(mirror.stats().pages_4k, 512);
    assert_eq!(mirror.unblock(&fw, g(3), 1), Ok(0));
    assert_eq!(
        mirror.lookup(g(3)).entry,
        PrivateSpte::Mapped(Pfn::new(0x403))
    );
    assert_eq!(mirror.promote(&fw, g(3)), Ok(()));
}

#[test]
fn arguments_that_no_table_can_hold_are_refused_before_any_call() {
    assert!(Mirror::new(Level::Size1G, PortId::new()).is_err());
    let (fw, mut mirror) = filled(Level::Size512G, &[]);
    let calls = fw.counts_of(|| {
        for (gfn, level, text) in [
            (0, Level::Size1G, "invalid page level: 0x2"),
            (0, Level::Size512G, "invalid page level: 0x3"),
            (1, Level::Size2M, "invalid guest frame number: 0x1"),
            (
                1 << 36,
                Level::Size4K,
                "invalid guest frame number: 0x1000000000",
            ),
        ] {
            let mapped = mirror.map(&fw, g(gfn), level, || panic!("no page is needed"));
            assert_eq!(mapped.unwrap_err().to_string(), text);
        }
        for (gfn, pages) in [
            (1 << 36, 1),
            (0, (1 << 36) + 1),
            (u64::MAX, 2),
            (5, u64::MAX),
        ] {
            assert!(mirror.zap(&fw, g(gfn), pages, EmptyTables::Keep).is_err());
            assert!(mirror.block(&fw, g(gfn), pages).is_err());
            assert!(mirror.unblock(&fw, g(gfn), pages).is_err());
            assert!(
                mirror
                    .map_range(&fw, g(gfn), pages, |_| Err(Error::Busy))
                    .is_err()
            );
        }
        for gfn in [0, 1 << 36, u64::MAX] {
            assert!(mirror.demote(&fw, g(gfn)).is_err());
            assert!(mirror.promote(&fw, g(gfn)).is_err());
        }
        assert!(mirror.zap(&fw, g(0), 0, EmptyTables::Free).is_ok());
    });
    assert_eq!(calls, ZERO);
}

#[test]
fn a_page_that_is_not_mapped_goes_back_and_its_entry_is_empty() {
    type Case = (
        Level,
        fn(&Firmware) -> Page,
        Vec<(u32, Failure)>,
        &'static str,
    );
    let small = Level::Size4K;
    let cases: [Case; 4] = [
        (
            Level::Size2M,
            |fw| fw.page(512, Level::Size4K),
            vec![],
            "invalid page: 0x200000",
        ),
        (
            small,
            |fw| fw.page(1 << 52, Level::Size4K),
            vec![],
            "invalid page: 0x0",
        ),
        (
            small,
            |_| Firmware::new(Level::Size512G).page(7, Level::Size4K),
            vec![],
            "invalid page: 0x7000",
        ),
        (
            small,
            |fw| fw.page(7, Level::Size4K),
            vec![(0, Failure::Busy)],
            "busy",
        ),
    ];
    for (level, page, fail, text) in cases {
        let (fw, mut mirror) = filled(Level::Size512G, &[1]);
        mirror.zap(&fw, g(1), 1, EmptyTables::Keep).unwrap();
        let gfn = if level == Level::Size2M { 512 } else { 1 };
        let before = (entries_of(&mirror), fw.counts().add_page);
        let freed = || std::mem::take(&mut fw.state.borrow_mut().pages_freed);
        freed();
        fw.state.borrow_mut().fail = fail;
        let given = page(&fw);
        let expected = (given.pfn(), given.level());
        let mapped = mirror.map(&fw, g(gfn), level, || Ok(given));
        assert!(mapped.unwrap_err().to_string().contains(text));
        assert_eq!(freed(), [expected]);
        assert_eq!((entries_of(&mirror), fw.counts().add_page), before);
        // An error of the supplier, with no page taken.
        let mapped = mirror.map(&fw, g(gfn), level, || Err(Error::NoMemory));
        assert_eq!(mapped, Err(Error::NoMemory));
        assert_eq!(freed(), []);
        let filled = mirror.map_range(&fw, g(2), 1, |_| Ok(fw.page(1 << 52, Level::Size4K)));
        assert!(filled.is_err());
        assert_eq!(freed().len(), 1);
        assert_eq!(entries_of(&mirror), before.0);
    }
}

#[test]
fn a_hook_that_panics_leaves_the_entry_empty() {
    struct Panics<'a>(&'a Firmware);
    // SAFETY: no memory is behind the numbers of pages.
    unsafe impl kvm_ops_mmu::MirrorHooks for Panics<'_> {
        fn set_private_spte(&self, change: &kvm_ops_mmu::SpteChange) -> kvm_ops_mmu::Result<()> {
            assert!(change.level() > Level::Size4K, "no page today");
            Ok(())
        }
        fn remove_private_spte(&self, _: &kvm_ops_mmu::SpteChange) -> Removal {
            Removal::Done
        }
        fn flush_private_tlb(&self) -> kvm_ops_mmu::Result<()> {
            Ok(())
        }
        fn alloc_table(&self) -> kvm_ops_mmu::Result<Page> {
            Ok(self.0.page(1, Level::Size4K))
        }
        fn free_page(&self, _: Page) {}
        fn leak(&self, _: Page, _: Error) {}
    }
    let fw = Firmware::new(Level::Size512G);
    let mirror = fw.mirror();
    let map = || {
        mirror.map(&Panics(&fw), g(0), Level::Size4K, || {
            Ok(fw.page(1, Level::Size4K))
        })
    };
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(map));
    assert!(caught.is_err());
    let tables: Vec<_> = entries_of(&mirror).into_iter().collect();
    fw.state.borrow_mut().entries.extend(tables);
    assert_eq!(
        mirror.map(&fw, g(0), Level::Size4K, || Ok(fw.page(1, Level::Size4K))),
        Ok(Mapped::New)
    );
}
