//! A TD with pages of 2 MiB leaves its host: they are split first, because the module exports pages of 4 KiB alone.

mod common;
mod migrate_support;

use std::sync::atomic::Ordering;

use common::Injected;
use common::audit::mirror_equals_secure_ept;
use kvm_ops_core::guest::Script;
use kvm_ops_core::{Error, Exit, Field, Gfn, Level, Privacy, VcpuOps, VmOps};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::status::{Class, operand};
use migrate_support::{PAGES, Pair, carry, finish, round};

/// The large page, which no slot begins or ends in.
const LARGE: Gfn = Gfn::new(0x400);
const FRAMES: u64 = 512;
const FOR_EVER: u64 = u64::MAX / 2;

/// Lets the guest accept a page in front of its own program.
fn accept(pair: &mut Pair, gfn: Gfn, level: Level) {
    const DONE: u16 = 0x70;
    let gpa = gfn.base().unwrap();
    let program = Script::new().accept(gpa, level).output(DONE, &[1]);
    let vcpu = &mut pair.vcpus[0];
    let programs = vcpu.programs().unwrap();
    programs.load_program(Box::new(program)).unwrap();
    let exit = vcpu.vcpu_run().unwrap();
    assert!(matches!(exit, Exit::IoOut { port: DONE, .. }), "{exit:?}");
}

/// A TD whose program works in a page of 2 MiB.
fn pair(encrypted: bool) -> Pair {
    let mut pair = Pair::on_two(encrypted);
    pair.source.map_large_page(LARGE).unwrap();
    accept(&mut pair, LARGE, Level::Size2M);
    pair.first = LARGE;
    pair.run_source(PAGES).unwrap();
    assert_eq!(pair.source.private_stats().pages_2m, 1);
    pair.hosts[0].take_log();
    pair
}

fn is_split(pair: &Pair) {
    let stats = pair.source.private_stats();
    assert_eq!((stats.pages_4k, stats.pages_2m), (PAGES + 1 + FRAMES, 0));
    assert_eq!(stats.blocked, 0);
    mirror_equals_secure_ept(&pair.hosts[0], &pair.source);
}

/// Takes the TD to its target with rounds between which it writes, and lets it run there.
fn travels(mut pair: Pair) {
    let mut from = pair.source.outgoing(2).unwrap();
    let mut to = pair.target.incoming(2).unwrap();
    carry(&mut to, from.begin().unwrap()).unwrap();
    let mut vcpu = pair.vcpus.remove(0);
    for _ in 0..2 {
        round(&mut from, &mut to).unwrap();
        let now = pair.counted.load(Ordering::SeqCst);
        migrate_support::run_until(&mut vcpu, &pair.counted, now + 3).unwrap();
    }
    finish(&mut from, &mut to).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    to.own().unwrap();
    from.leave().unwrap();
    let pages = PAGES + 1 + FRAMES;
    assert!(from.carried().pages > pages, "pages travelled again");
    drop((from, to));
    pair.vcpus.insert(0, vcpu);
    let stats = pair.target.private_stats();
    assert_eq!((stats.pages_4k, stats.pages_2m), (pages, 0));
    mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
    assert_eq!(pair.run_target(), before + 1);
    pair.destroy();
}

#[test]
fn a_large_page_is_split_once_and_travels_in_dirty_rounds() {
    for encrypted in [false, true] {
        travels(pair(encrypted));
    }
}

#[test]
fn a_split_takes_three_calls_a_page_and_one_page_for_the_table() {
    let pair = pair(false);
    let live = pair.hosts[0].live();
    let mut from = pair.source.outgoing(1).unwrap();
    let before = pair.hosts[0].live();
    pair.hosts[0].take_log();
    from.begin().unwrap();
    assert_eq!(pair.hosts[0].live(), before + 1);
    let counts = pair.hosts[0].take_counts();
    for leaf in ["RANGE.BLOCK", "TRACK", "PAGE.DEMOTE"] {
        assert_eq!(counts[format!("TDH.MEM.{leaf}").as_str()], 1, "{counts:?}");
    }
    is_split(&pair);
    from.abort(None).unwrap();
    drop(from);
    assert!(pair.hosts[0].live() > live, "the table stays");
    pair.destroy();
}

#[test]
fn after_an_abort_the_guest_runs_on_in_small_pages_and_migrates_later() {
    for rounds in 0..3 {
        let mut pair = pair(false);
        let mut from = pair.source.outgoing(1).unwrap();
        let mut to = pair.target.incoming(1).unwrap();
        carry(&mut to, from.begin().unwrap()).unwrap();
        if rounds > 0 {
            round(&mut from, &mut to).unwrap();
        }
        if rounds > 1 {
            finish(&mut from, &mut to).unwrap();
            let token = to.abort().unwrap();
            from.abort(Some(&token)).unwrap();
        } else {
            from.abort(None).unwrap();
        }
        drop((from, to));
        let now = pair.counted.load(Ordering::SeqCst);
        pair.run_source(now + 2 * PAGES).unwrap();
        is_split(&pair);
        pair.renew_target();
        travels(pair);
    }
}

#[test]
fn a_split_that_fails_leaves_the_guest_running_and_the_next_session_does_it() {
    let busy = Injected::Status(Class::OPERAND_BUSY.with(operand::OP_STATE).get());
    let not_called = Injected::Port(Error::Invalid(Field::Cpu, 99));
    for leaf in [Leaf::MemRangeBlock, Leaf::MemTrack, Leaf::MemPageDemote] {
        for (answer, times) in [(busy, 1), (busy, FOR_EVER), (not_called, 1)] {
            let mut pair = pair(false);
            pair.hosts[0].fail(leaf, 1, times, answer);
            let mut from = pair.source.outgoing(1).unwrap();
            let begun = from.begin().map(drop);
            assert!(pair.hosts[0].heal(), "{leaf:?} {answer:?}");
            let done = (answer, times) == (busy, 1);
            assert_eq!(begun.is_ok(), done, "{leaf:?} {answer:?}: {begun:?}");
            drop(from);
            let now = pair.counted.load(Ordering::SeqCst);
            pair.run_source(now + PAGES).unwrap();
            mirror_equals_secure_ept(&pair.hosts[0], &pair.source);
            if done {
                // The target has not seen the first bundle.
                pair.renew_target();
            }
            travels(pair);
        }
    }
}

#[test]
fn a_guest_that_accepts_a_part_of_a_large_page_gets_it_split() {
    let mut pair = Pair::on_two(false);
    pair.source.map_large_page(LARGE).unwrap();
    accept(&mut pair, Gfn::new(LARGE.get() + 7), Level::Size4K);
    is_split(&pair);
    accept(&mut pair, LARGE, Level::Size4K);
    pair.destroy();
}

#[test]
fn a_large_page_is_refused_where_it_cannot_be() {
    let pair = Pair::on_two(false);
    let vm = &pair.source;
    let refused = |gfn: u64| Err(Error::Invalid(Field::Gfn, gfn));
    assert_eq!(vm.map_large_page(Gfn::new(0x401)), refused(0x401));
    // Behind the memory.
    assert_eq!(vm.map_large_page(Gfn::new(0x4_0000)), refused(0x4_0000));
    vm.map_large_page(LARGE).unwrap();
    let exists = Err(Error::Exists(Field::Gfn, LARGE.get()));
    assert_eq!(vm.map_large_page(LARGE), exists);
    let shared = Gfn::new(0x7ff);
    vm.set_memory_attributes(shared, 1, Privacy::Shared)
        .unwrap();
    assert_eq!(vm.map_large_page(Gfn::new(0x600)), refused(0x600));
    let from = pair.source.outgoing(1).unwrap();
    assert_eq!(vm.map_large_page(Gfn::new(0x800)), Err(Error::Busy));
    drop(from);
    pair.destroy();
}
