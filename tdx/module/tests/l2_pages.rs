//! Trees of L2 VMs: the host gives tables, L1 makes aliases, and both follow changes of L1's pages.

mod common;

use common::{Td, machine, regs};
use soft_tdx_module::{
    Code, GuestLeaf, GuestOp, HostLeaf as L, L2SeptState, L2SeptView, Outcome, PageSize, PageType,
    Platform, Regs, Script, Status, pending,
};
use std::sync::{Arc, Mutex};

const DEBUG: u64 = 1;
const NO_PAGE: u64 = u64::MAX;
const UNUSED: u64 = 1 << 63;
const VALID: u64 = 0x8000;
const RW: u64 = VALID | 3;
const RWX: u64 = VALID | 0xF;
/// Selects all attributes.
const ALL: u64 = 0x7F;

/// TDG.MEM.PAGE.ATTR.WR of one VM's attributes.
fn attr_wr(vm: u32, mapping: u64, attributes: u64) -> GuestOp {
    GuestOp::Tdcall(Regs {
        r8: ALL << (16 * vm),
        ..tdcall(GuestLeaf::MemPageAttrWr, mapping, attributes << (16 * vm))
    })
}

fn tdcall(leaf: GuestLeaf, rcx: u64, rdx: u64) -> Regs {
    Regs {
        rcx,
        rdx,
        ..Regs::leaf(leaf.number())
    }
}

/// A TD with two L2 VMs and tables for the first two megabytes in all trees.
fn partitioned(p: &Platform) -> Td {
    let mut td = Td::partitioned(p, 0x4000_0000, 33, 0, DEBUG, 2);
    for level in [3, 2, 1] {
        let pages = [td.page(), td.page(), td.page()];
        add_tables(&td, p, level, pages);
    }
    td
}

/// TDH.MEM.SEPT.ADD version 1 of a table for L1 and both VMs at GPA 0.
fn add_tables(td: &Td, p: &Platform, level: u64, [l1, vm1, vm2]: [u64; 3]) -> Regs {
    let mut r = Regs {
        rax: L::MemSeptAdd.number() | 1 << 16,
        r8: l1,
        r9: vm1,
        r10: vm2,
        r11: NO_PAGE,
        ..regs(level, td.tdr)
    };
    p.seamcall(td.lp, &mut r).expect("executes");
    r
}

/// Runs operations as L1 and returns the registers after each TDCALL.
fn run(td: &Td, p: &Platform, ops: impl IntoIterator<Item = GuestOp>) -> Vec<Regs> {
    let log = Arc::new(Mutex::new(Vec::new()));
    let into = log.clone();
    let mut ops = ops.into_iter().collect::<Vec<_>>().into_iter();
    p.set_guest(td.tdvpr, move |last: &Outcome| {
        if let Outcome::Registers(r) = last {
            into.lock().expect("log").push(*r);
        }
        ops.next().unwrap_or_else(|| GuestOp::vmcall(12, [0; 4]))
    });
    td.enter(p);
    let log = log.lock().expect("log");
    log.clone()
}

fn alias(td: &Td, p: &Platform, vm: usize, gpa: u64) -> L2SeptView {
    p.l2_sept(td.tdr, vm, gpa, 0).expect("a td with that vm")
}

fn block(td: &Td, p: &Platform, mapping: u64) {
    td.ok(p, L::MemRangeBlock, regs(mapping, td.tdr));
    td.ok(p, L::MemTrack, regs(td.tdr, 0));
}

fn page_type(p: &Platform, pa: u64) -> PageType {
    p.page(pa, PageSize::Size4K).expect("in a tdmr").page_type
}

#[test]
fn tables_of_all_trees_come_together_and_go_together() {
    let p = machine();
    let mut td = partitioned(&p);
    td.finalize(&p);
    let children = || p.td(td.tdr).expect("td").chldcnt;
    let before = children();
    let pages = [td.page(), td.page(), td.page()];
    let mut r = Regs {
        rax: L::MemSeptAdd.number() | 1 << 16,
        r8: pages[0],
        r9: pages[1],
        r10: pages[2],
        r11: NO_PAGE,
        ..regs(0x20_0001, td.tdr)
    };
    assert_eq!(p.seamcall(0, &mut r).expect("executes"), Status::SUCCESS);
    assert_eq!([r.r8, r.r9, r.r10], [NO_PAGE; 3], "all pages are used");
    assert_eq!(p.td(td.tdr).expect("td").chldcnt, before + 3);
    assert_eq!(pages.map(|pa| page_type(&p, pa)), [PageType::Ept; 3]);
    for vm in [1, 2] {
        let view = p.l2_sept(td.tdr, vm, 0x20_0000, 1).expect("vm");
        assert_eq!((view.level, view.state), (1, L2SeptState::NlMapped));
    }

    block(&td, &p, 0x20_0001);
    let state = |vm| p.l2_sept(td.tdr, vm, 0x20_0000, 1).expect("vm").state;
    assert_eq!([state(1), state(2)], [L2SeptState::NlBlocked; 2]);
    let mut r = Regs {
        rax: L::MemSeptRemove.number() | 1 << 16,
        ..regs(0x20_0001, td.tdr)
    };
    assert_eq!(p.seamcall(0, &mut r).expect("executes"), Status::SUCCESS);
    assert_eq!(
        [r.rcx, r.r9, r.r10, r.r11],
        [pages[0], pages[1], pages[2], NO_PAGE]
    );
    assert_eq!(p.td(td.tdr).expect("td").chldcnt, before);
    assert_eq!(pages.map(|pa| page_type(&p, pa)), [PageType::Nda; 3]);
    assert_eq!([state(1), state(2)], [L2SeptState::Free; 2]);
}

#[test]
fn an_interrupted_addition_goes_on_where_it_was() {
    let p = machine();
    let mut td = Td::partitioned(&p, 0x4000_0000, 33, 0, DEBUG, 2);
    let pages = [td.page(), td.page(), td.page()];
    p.set_pending(0, pending::NMI);
    let r = add_tables(&td, &p, 3, pages);
    assert_eq!(Status(r.rax).code(), Code::INTERRUPTED_RESUMABLE);
    assert_eq!([r.rcx, r.rdx], [3, td.tdr], "operands are restored");
    assert_eq!([r.r8, r.r9, r.r10], [NO_PAGE, pages[1], pages[2]]);
    // The registers now ask for the remaining work.
    let r = add_tables(&td, &p, 3, [r.r8, r.r9, r.r10]);
    assert_eq!([r.r8, r.r9, r.r10], [NO_PAGE, NO_PAGE, pages[2]]);
    let r = add_tables(&td, &p, 3, [r.r8, r.r9, r.r10]);
    assert_eq!(Status(r.rax), Status::SUCCESS);
    assert_eq!([r.r8, r.r9, r.r10], [NO_PAGE; 3]);
}

#[test]
fn an_alias_follows_its_page_through_blocking_relocation_and_removal() {
    let p = machine();
    let mut td = partitioned(&p);
    let first = td.add(&p, 0x3000, 1);
    td.finalize(&p);
    let done = run(&td, &p, [attr_wr(1, 0x3000, RW), attr_wr(2, 0x3000, RWX)]);
    assert!(done.iter().all(|r| Status(r.rax) == Status::SUCCESS));
    let views = |state| {
        let view = |attributes: u64| L2SeptView {
            level: 0,
            state,
            attributes: attributes as u16,
        };
        [view(RW), view(RWX)]
    };
    let now = |td: &Td| [alias(td, &p, 1, 0x3000), alias(td, &p, 2, 0x3000)];
    assert_eq!(now(&td), views(L2SeptState::Mapped));

    block(&td, &p, 0x3000);
    assert_eq!(now(&td), views(L2SeptState::Blocked), "attributes are kept");
    let read = td.ok(&p, L::MemSeptRd, regs(0x3000, td.tdr | 1));
    assert_eq!(read.r8, RW << 16 | RWX << 32);
    td.ok(&p, L::MemRangeUnblock, regs(0x3000, td.tdr));
    assert_eq!(now(&td), views(L2SeptState::Mapped));

    block(&td, &p, 0x3000);
    let second = td.page();
    let moved = td.ok(
        &p,
        L::MemPageRelocate,
        Regs {
            r8: second,
            ..regs(0x3000, td.tdr)
        },
    );
    assert_eq!(moved.rcx, first);
    assert_eq!(now(&td), views(L2SeptState::Mapped), "relocation unblocks");

    block(&td, &p, 0x3000);
    td.ok(&p, L::MemPageRemove, regs(0x3000, td.tdr));
    let free = L2SeptView {
        level: 0,
        state: L2SeptState::Free,
        attributes: 0,
    };
    assert_eq!(now(&td), [free; 2]);
}

#[test]
fn an_alias_without_permissions_is_gone() {
    let p = machine();
    let mut td = partitioned(&p);
    td.add(&p, 0x3000, 1);
    td.finalize(&p);
    let gone = run(
        &td,
        &p,
        [attr_wr(1, 0x3000, RW), attr_wr(1, 0x3000, VALID | 0x50)],
    );
    assert_eq!(gone[1].rdx, VALID << 16, "what is left has no attributes");
    assert_eq!(alias(&td, &p, 1, 0x3000).state, L2SeptState::Free);
}

#[test]
fn an_alias_of_a_pending_page_comes_into_use_when_l1_accepts_the_page() {
    let p = machine();
    let mut td = partitioned(&p);
    td.finalize(&p);
    td.aug(&p, 0x5000);
    run(&td, &p, [attr_wr(1, 0x5000, RW)]);
    assert_eq!(alias(&td, &p, 1, 0x5000).state, L2SeptState::Blocked);
    block(&td, &p, 0x5000);
    td.ok(&p, L::MemRangeUnblock, regs(0x5000, td.tdr));
    assert_eq!(
        alias(&td, &p, 1, 0x5000).state,
        L2SeptState::Blocked,
        "unblocking does not accept"
    );
    run(&td, &p, [GuestOp::accept(0x5000, 0)]);
    let view = alias(&td, &p, 1, 0x5000);
    assert_eq!(
        (view.state, u64::from(view.attributes)),
        (L2SeptState::Mapped, RW)
    );
}

#[test]
fn a_large_page_splits_and_merges_with_its_aliases() {
    let p = machine();
    let mut td = partitioned(&p);
    td.finalize(&p);
    let large = td.large_page(PageSize::Size2M.bytes());
    td.ok(
        &p,
        L::MemPageAug,
        Regs {
            r8: large,
            ..regs(0x20_0001, td.tdr)
        },
    );
    run(
        &td,
        &p,
        [GuestOp::accept(0x20_0000, 1), attr_wr(2, 0x20_0001, RW)],
    );
    block(&td, &p, 0x20_0001);
    let pages = [td.page(), td.page(), td.page()];
    let demote = |r9, r10, sparse: u64| {
        let mut r = Regs {
            rax: L::MemPageDemote.number(),
            r8: pages[0],
            r9,
            r10,
            r11: NO_PAGE,
            ..regs(0x20_0001, td.tdr | sparse)
        };
        p.seamcall(0, &mut r).expect("executes");
        r
    };
    let missing = demote(pages[1], NO_PAGE, 0);
    assert_eq!(
        Status(missing.rax),
        Code::L2_SEPT_PAGE_NOT_PROVIDED.detail(10)
    );
    let split = demote(pages[1], pages[2], 1);
    assert_eq!(Status(split.rax), Status::SUCCESS);
    assert_eq!(split.r9, pages[1] | UNUSED, "vm 1 has no alias to split");
    assert_eq!(page_type(&p, pages[1]), PageType::Nda);
    for gpa in [0x20_0000, 0x20_7000, 0x3F_F000] {
        let view = alias(&td, &p, 2, gpa);
        assert_eq!((view.level, view.state), (0, L2SeptState::Mapped));
        assert_eq!(u64::from(view.attributes), RW);
    }

    let promote = || {
        let mut r = Regs {
            rax: L::MemPagePromote.number() | 1 << 16,
            ..regs(0x20_0001, td.tdr)
        };
        p.seamcall(0, &mut r).expect("executes");
        r
    };
    run(&td, &p, [attr_wr(2, 0x20_7000, RWX)]);
    block(&td, &p, 0x20_0001);
    let uneven = Status(promote().rax);
    assert_eq!(uneven.code(), Code::EPT_INVALID_PROMOTE_CONDITIONS);
    td.ok(&p, L::MemRangeUnblock, regs(0x20_0001, td.tdr));
    run(&td, &p, [attr_wr(2, 0x20_7000, RW)]);
    block(&td, &p, 0x20_0001);
    let merged = promote();
    assert_eq!(Status(merged.rax), Status::SUCCESS);
    assert_eq!(
        [merged.rcx, merged.r9, merged.r10],
        [pages[0], NO_PAGE, pages[2]]
    );
    let view = p.l2_sept(td.tdr, 2, 0x20_0000, 1).expect("vm");
    assert_eq!((view.level, view.state), (1, L2SeptState::Mapped));
    assert_eq!(u64::from(view.attributes), RW);
}

#[test]
fn l1_makes_aliases_while_the_host_blocks_and_both_are_told_the_truth() {
    const ROUNDS: usize = 20_000;
    let p = machine();
    let mut td = partitioned(&p);
    td.add(&p, 0x3000, 1);
    td.finalize(&p);
    let ops = (0..ROUNDS).map(|n| attr_wr(1, 0x3000, if n % 2 == 0 { RW } else { VALID }));
    p.set_guest(td.tdvpr, Script::new(ops.collect::<Vec<_>>()));
    let host = |leaf: L, rcx, rdx| {
        let mut r = Regs {
            rax: leaf.number(),
            ..regs(rcx, rdx)
        };
        p.seamcall(2, &mut r).expect("its processor")
    };
    std::thread::scope(|s| {
        let guest = s.spawn(|| while td.enter(&p).rax & 0xFFFF != 77 {});
        while !guest.is_finished() {
            let blocked = host(L::MemRangeBlock, 0x3000, td.tdr);
            if blocked == Status::SUCCESS {
                let view = alias(&td, &p, 1, 0x3000);
                assert_ne!(
                    view.state,
                    L2SeptState::Mapped,
                    "nothing of a blocked page is in use"
                );
            }
            host(L::MemTrack, td.tdr, 0);
            host(L::MemRangeUnblock, 0x3000, td.tdr);
        }
    });
}
