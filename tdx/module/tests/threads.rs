//! SEAMCALLs from several threads at once: contention is real, and nothing is lost or done twice.

mod common;

use common::{GIB, Td, large_machine, machine, regs};
use soft_tdx_module::{
    Code, GuestOp, HostLeaf as L, LockMode, LockTarget, Outcome, PageSize, PageType, Platform,
    Regs, Script, Status,
};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn call(p: &Platform, lp: usize, leaf: L, operands: Regs) -> (Status, Regs) {
    let mut r = Regs {
        rax: leaf.number(),
        ..operands
    };
    (
        p.seamcall(lp, &mut r)
            .expect("each thread has a processor of its own"),
        r,
    )
}

#[test]
fn of_racing_creators_one_gets_the_page_and_one_the_key_id() {
    let p = machine();
    for round in 0..200u64 {
        let page = 0x4000_0000 + round * 0x1000;
        let hkid = 33 + round % 31;
        let barrier = Barrier::new(4);
        let won = AtomicU64::new(0);
        std::thread::scope(|s| {
            for lp in 0..4 {
                let (p, barrier, won) = (&p, &barrier, &won);
                s.spawn(move || {
                    barrier.wait();
                    let (status, _) = call(p, lp, L::MngCreate, regs(page, hkid));
                    match status.code() {
                        Code::SUCCESS => {
                            won.fetch_add(1, Ordering::Relaxed);
                        }
                        Code::OPERAND_BUSY
                        | Code::PAGE_METADATA_INCORRECT
                        | Code::HKID_NOT_FREE => {}
                        _ => panic!("{status}"),
                    }
                });
            }
        });
        // BUSY may have stopped all losers, but two can never have won.
        let expected = u64::from(round < 31);
        assert_eq!(won.load(Ordering::Relaxed), expected, "round {round}");
    }
}

#[test]
fn pages_augmented_blocked_and_removed_by_four_threads_are_all_accounted_for() {
    const PER_THREAD: u64 = 120;
    let p = machine();
    let mut td = Td::create(&p, 0x4000_0000, 33, 0, 0);
    td.tables(&p, 0, 0);
    td.finalize(&p);
    let before = p.td(td.tdr).expect("td").chldcnt;
    let busy = AtomicU64::new(0);
    let until = |f: &mut dyn FnMut() -> Status| loop {
        let status = f();
        match status.code() {
            Code::OPERAND_BUSY | Code::PREVIOUS_TLB_EPOCH_BUSY => {
                busy.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
            }
            _ => return status,
        }
    };
    std::thread::scope(|s| {
        for lp in 0..4 {
            let (p, td, until) = (&p, &td, &until);
            s.spawn(move || {
                for i in 0..PER_THREAD {
                    let n = lp as u64 * PER_THREAD + i;
                    let (gpa, pa) = (n << 12, 0x4020_0000 + (n << 12));
                    let run = |leaf, o: Regs| until(&mut || call(p, lp, leaf, o).0);
                    let aug = run(
                        L::MemPageAug,
                        Regs {
                            r8: pa,
                            ..regs(gpa, td.tdr)
                        },
                    );
                    assert_eq!(aug, Status::SUCCESS);
                    if i % 2 == 0 {
                        assert_eq!(run(L::MemRangeBlock, regs(gpa, td.tdr)), Status::SUCCESS);
                        // Another thread's TRACK may come between; one after the BLOCK is enough.
                        assert_eq!(run(L::MemTrack, regs(td.tdr, 0)), Status::SUCCESS);
                        assert_eq!(run(L::MemPageRemove, regs(gpa, td.tdr)), Status::SUCCESS);
                    }
                }
            });
        }
    });
    let view = p.td(td.tdr).expect("td");
    assert_eq!(view.chldcnt, before + 2 * PER_THREAD);
    for n in 0..4 * PER_THREAD {
        let page = p
            .page(0x4020_0000 + (n << 12), PageSize::Size4K)
            .expect("page");
        let expected = if n % 2 == 0 {
            PageType::Nda
        } else {
            PageType::Reg
        };
        assert_eq!(page.page_type, expected, "page {n}");
    }
    for target in [
        LockTarget::SeptTree { tdr: td.tdr },
        LockTarget::OpState { tdr: td.tdr },
    ] {
        assert!(p.hold(target, LockMode::Exclusive), "{target:?}");
    }
}

#[test]
fn guests_accept_while_the_host_adds_and_blocks() {
    const PAGES: u64 = 256;
    let p = large_machine(2, true);
    let mut tds: Vec<Td> = (0..2)
        .map(|i| {
            let mut td = Td::create(&p, (1 + i) * GIB, 33 + i as u16, i as usize, 0);
            td.tables(&p, 0, 0);
            td.finalize(&p);
            td
        })
        .collect();
    let pages: Vec<u64> = tds.iter_mut().map(|td| td.large_page(0x20_0000)).collect();
    std::thread::scope(|s| {
        for (td, pages) in tds.iter().zip(&pages) {
            let p = &p;
            p.set_guest(
                td.tdvpr,
                Script::new((0..PAGES).map(|n| GuestOp::accept(n << 12, 0))),
            );
            s.spawn(move || {
                loop {
                    let exit = td.enter(p);
                    match exit.rax {
                        48 => {
                            let aug = Regs {
                                r8: pages + exit.r8,
                                ..regs(exit.r8, td.tdr)
                            };
                            td.ok(p, L::MemPageAug, aug);
                        }
                        77 => break,
                        _ => panic!("{exit:?}"),
                    }
                }
            });
        }
    });
    for td in &tds {
        for n in 0..PAGES {
            let entry = p.sept(td.tdr, n << 12, 0).expect("td");
            assert_eq!(entry.state, soft_tdx_module::SeptState::Mapped);
        }
    }
}

#[test]
fn while_a_vcpu_runs_exclusive_leaves_are_busy_and_tracking_waits_for_its_exit() {
    // Without a timer the entry lasts until the kick.
    let p = Platform::builder()
        .guest_steps_per_entry(u32::MAX)
        .build()
        .expect("machine");
    p.bring_up().expect("up");
    let mut td = Td::create(&p, 0x4000_0000, 33, 0, 0);
    td.tables(&p, 0, 0);
    td.add(&p, 0, 1);
    td.finalize(&p);
    let running = std::sync::Arc::new(AtomicBool::new(false));
    let flag = running.clone();
    p.set_guest(td.tdvpr, move |_: &Outcome| {
        flag.store(true, Ordering::Release);
        GuestOp::Nop
    });
    let code = |leaf, o| call(&p, 1, leaf, o).0.code();
    std::thread::scope(|s| {
        let entered = s.spawn(|| td.enter(&p));
        while !running.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        assert_eq!(code(L::MemRangeBlock, regs(0, td.tdr)), Code::SUCCESS);
        assert_eq!(code(L::MemTrack, regs(td.tdr, 0)), Code::SUCCESS);
        assert_eq!(
            code(L::MemPageRemove, regs(0, td.tdr)),
            Code::TLB_TRACKING_NOT_DONE
        );
        assert_eq!(
            code(L::MemTrack, regs(td.tdr, 0)),
            Code::PREVIOUS_TLB_EPOCH_BUSY
        );
        assert_eq!(code(L::MrFinalize, regs(td.tdr, 0)), Code::OPERAND_BUSY);
        assert_eq!(code(L::VpFlush, regs(td.tdvpr, 0)), Code::OPERAND_BUSY);
        assert_eq!(code(L::SysShutdown, regs(0, 0)), Code::SYS_BUSY);
        p.kick(0);
        assert_eq!(entered.join().expect("no panic").rax, 1);
    });
    assert_eq!(code(L::MemPageRemove, regs(0, td.tdr)), Code::SUCCESS);
    assert_eq!(
        code(L::VpFlush, regs(td.tdvpr, 0)),
        Code::VCPU_NOT_ASSOCIATED
    );
    assert_eq!(p.td(td.tdr).expect("td").refcount, [0, 0]);
}
