//! An embedder that keeps the tables of private memory itself and uses the hooks alone: large pages,
//! their splitting and joining, and the reclaim of single pages at the end.

mod common;

use std::collections::BTreeMap;

use common::life::runnable;
use common::{Injected, TestHost};
use kvm_ops_core::{
    Error, Gfn, Leaked, Level, Page, PagePort, PrivateSpte, Result, SpteChange, Step, VmOps,
};
use kvm_ops_mmu::{EmptyTables, Mapped, Mirror, MirrorHooks, PageKind};
use kvm_ops_tdx::status::Class;
use kvm_ops_tdx::{Leaf, TdxVm};
use soft_tdx_module::SeptState;

/// Hooks that go through the public operations of the VM.
struct Own<'a> {
    host: &'a TestHost,
    vm: &'a TdxVm<TestHost>,
}

// SAFETY: every change goes to the back end, which makes it in the module, or fails.
unsafe impl MirrorHooks for Own<'_> {
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        self.vm.set_private_spte(change)
    }

    fn flush_private_tlb(&self) -> Result<()> {
        self.vm.flush_private_tlb()
    }

    fn alloc_table(&self) -> Result<Page> {
        self.host.0.alloc(Level::Size4K)
    }

    fn free_page(&self, page: Page) {
        self.host.0.free(page).expect("a page of this machine");
    }

    fn leak(&self, page: Page, error: Error) {
        panic!("{page:?}: {error}");
    }
}

fn equals(host: &TestHost, vm: &TdxVm<TestHost>, mirror: &Mirror) {
    let tdr = vm.tdr().unwrap().get();
    mirror.for_each(|gfn, level, spte| {
        let gpa = gfn.get() << 12;
        let view = host.platform().sept(tdr, gpa, level as u8).unwrap();
        let state = match spte {
            PrivateSpte::Absent => SeptState::Free,
            PrivateSpte::Table(_) => SeptState::NlMapped,
            PrivateSpte::BlockedTable(_) => SeptState::NlBlocked,
            PrivateSpte::Mapped(_) => SeptState::Pending,
            PrivateSpte::Blocked(_) => SeptState::PendingBlocked,
        };
        assert_eq!((view.level, view.state), (level as u8, state), "{gfn:?}");
    });
}

const AT: Gfn = Gfn::new(0x400);

#[test]
fn a_large_page_is_mapped_split_joined_blocked_and_removed() {
    let host = TestHost::new();
    let vm = runnable(&host);
    let own = Own {
        host: &host,
        vm: &vm,
    };
    let mut mirror = Mirror::new(Level::Size512G, host.0.id()).unwrap();
    let page = host.0.alloc(Level::Size2M).unwrap();
    host.take_log();
    let counts = |host: &TestHost| -> BTreeMap<&'static str, u64> { host.take_counts() };

    let mapped = mirror.map(&own, AT, Level::Size2M, || Ok(page));
    assert_eq!(mapped, Ok(Mapped::New));
    assert_eq!(
        counts(&host),
        [("TDH.MEM.SEPT.ADD", 2), ("TDH.MEM.PAGE.AUG", 1)].into()
    );
    equals(&host, &vm, &mirror);

    mirror.demote(&own, Gfn::new(0x433)).unwrap();
    assert_eq!(
        counts(&host),
        [
            ("TDH.MEM.RANGE.BLOCK", 1),
            ("TDH.MEM.TRACK", 1),
            ("TDH.MEM.PAGE.DEMOTE", 1)
        ]
        .into()
    );
    assert_eq!(mirror.stats().pages_4k, 512);
    equals(&host, &vm, &mirror);

    mirror.promote(&own, AT).unwrap();
    assert_eq!(
        counts(&host),
        [
            ("TDH.MEM.RANGE.BLOCK", 1),
            ("TDH.MEM.TRACK", 1),
            ("TDH.MEM.PAGE.PROMOTE", 1),
            ("TDH.PHYMEM.PAGE.WBINVD", 1)
        ]
        .into()
    );
    assert_eq!((mirror.stats().pages_4k, mirror.stats().pages_2m), (0, 1));
    equals(&host, &vm, &mirror);

    mirror.block(&own, AT, 512).unwrap();
    equals(&host, &vm, &mirror);
    mirror.unblock(&own, AT, 512).unwrap();
    equals(&host, &vm, &mirror);
    host.take_log();

    // One part of it goes, which splits it first; then the rest, with its tables.
    mirror.zap(&own, AT, 1, EmptyTables::Keep).unwrap();
    equals(&host, &vm, &mirror);
    assert_eq!(mirror.stats().pages_4k, 511);
    mirror.zap(&own, AT, 512, EmptyTables::Free).unwrap();
    assert_eq!(mirror.stats().tables, 0);
    let report = common::life::destroy(vm);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(host.live(), 0);
}

#[test]
fn interrupted_splits_are_begun_anew_and_busy_ones_are_left_whole() {
    let host = TestHost::new();
    let vm = runnable(&host);
    let own = Own {
        host: &host,
        vm: &vm,
    };
    let mut mirror = Mirror::new(Level::Size512G, host.0.id()).unwrap();
    let page = host.0.alloc(Level::Size2M).unwrap();
    mirror.map(&own, AT, Level::Size2M, || Ok(page)).unwrap();

    let interrupted = Class::INTERRUPTED_RESTARTABLE.with(0).get();
    host.fail(Leaf::MemPageDemote, 1, 9, Injected::Status(interrupted));
    mirror.demote(&own, AT).unwrap();
    assert!(host.heal());
    host.fail(Leaf::MemPagePromote, 1, 9, Injected::Status(interrupted));
    mirror.promote(&own, AT).unwrap();
    assert!(host.heal());

    let busy = Class::OPERAND_BUSY.with(1).get();
    host.fail(Leaf::MemPageDemote, 1, 2, Injected::Status(busy));
    assert_eq!(mirror.demote(&own, AT), Err(Error::Busy));
    equals(&host, &vm, &mirror);
    assert_eq!((mirror.stats().pages_2m, mirror.stats().blocked), (1, 0));
    assert_eq!(vm.step(), Step::Runnable);
    mirror.zap(&own, AT, 512, EmptyTables::Free).unwrap();
    assert!(common::life::destroy(vm).is_clean());
}

#[test]
fn pages_of_tables_that_are_not_the_back_ends_are_reclaimed_one_by_one() {
    for failing in [false, true] {
        let host = TestHost::new();
        let mut vm = runnable(&host);
        let mut mirror = Mirror::new(Level::Size512G, host.0.id()).unwrap();
        let own = Own {
            host: &host,
            vm: &vm,
        };
        for n in 0..3 {
            let page = host.0.alloc(Level::Size4K).unwrap();
            let gfn = Gfn::new(AT.get() + n);
            mirror.map(&own, gfn, Level::Size4K, || Ok(page)).unwrap();
        }
        let foreign = runnable(&host).mmu_release_hkid().unwrap();
        let mut pages = Vec::new();
        mirror.drain(|page, kind| {
            assert!(matches!(kind, PageKind::Page | PageKind::Table));
            pages.push(page);
        });
        let key = vm.mmu_release_hkid().unwrap();
        // The token of another VM reclaims nothing: the page is lost, and the report says so.
        let last = pages.pop().unwrap();
        let mut expected = vec![Leaked::Page(last.hpa())];
        let token = Error::Invalid(kvm_ops_core::Field::Token, foreign.vm().0);
        assert_eq!(vm.reclaim_private_page(&foreign, last), Err(token));
        if failing {
            let odd = Class::PAGE_METADATA_INCORRECT.with(1).get();
            host.fail(Leaf::PhymemPageReclaim, 2, 1, Injected::Status(odd));
            expected.push(Leaked::Page(pages[1].hpa()));
        }
        for (n, page) in pages.into_iter().enumerate() {
            match vm.reclaim_private_page(&key, page) {
                Ok(page) => host.0.free(page).expect("the caller's again"),
                Err(_) => assert!(failing && n == 1),
            }
        }
        let drained = vm.drain_private(key).map_err(|(error, _)| error).unwrap();
        let tdr = vm.tdr().unwrap();
        let report = vm.vm_free(drained);
        let leaked: Vec<Leaked> = report.leaks.iter().map(|leak| leak.what).collect();
        // The module counts its pages in the TDR, which stays with the first of them.
        expected.push(Leaked::Page(tdr));
        assert_eq!(leaked, expected);
    }
}
