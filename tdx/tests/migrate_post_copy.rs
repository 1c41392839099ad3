//! A TD that runs at its target before its pages have come.

mod common;
mod migrate_support;

use std::sync::atomic::{AtomicBool, Ordering};

use common::TestHost;
use common::audit::mirror_equals_secure_ept;
use kvm_ops_core::guest::{Action, FnProgram, Outcome};
use kvm_ops_core::{Backend, Error, Gfn, Gpa, Privacy, VcpuId, VcpuOps, VmOps};
use kvm_ops_tdx::migrate::{Incoming, Outgoing};
use migrate_support::{PAGES, Pair, Vcpu, carry, private_pages, run_until};

/// Carries the state of a stopped source and an early start token, after so many rounds.
fn start(from: &mut Outgoing<'_, TestHost>, to: &mut Incoming<'_, TestHost>, rounds: u32) {
    carry(to, from.begin().unwrap()).unwrap();
    for _ in 0..rounds {
        migrate_support::round(from, to).unwrap();
    }
    from.stop().unwrap();
    carry(to, from.td_state().unwrap()).unwrap();
    for vcpu in from.vcpus() {
        carry(to, from.vcpu_state(vcpu, 0).unwrap()).unwrap();
    }
    carry(to, from.early_start_token().unwrap()).unwrap();
}

/// The same, and the target runs the guest.
fn commit(from: &mut Outgoing<'_, TestHost>, to: &mut Incoming<'_, TestHost>, rounds: u32) {
    start(from, to, rounds);
    to.commit().unwrap();
}

/// Carries the pages that have not travelled.
fn carry_rest(from: &Outgoing<'_, TestHost>, to: &Incoming<'_, TestHost>) {
    while let Some(bundle) = from.pages(0).unwrap() {
        to.take_pages(&bundle).unwrap();
    }
}

/// Serves what the guest waits for. Returns the number of pages that were sent for it.
fn serve(from: &Outgoing<'_, TestHost>, to: &Incoming<'_, TestHost>) -> usize {
    let wanted = to.wanted();
    for gfn in wanted.iter().filter(|gfn| !from.has_page(**gfn)) {
        to.never_had(*gfn);
    }
    let bundle = from.wanted_pages(1, &wanted).unwrap();
    bundle.map_or(0, |bundle| {
        to.take_pages(&bundle).unwrap();
        bundle.guest_pages()
    })
}

/// The target's vCPU with the guest's program, which goes on from what is in memory.
fn vcpu_at_target(pair: &Pair) -> Vcpu {
    let mut vcpu = pair.target.create_vcpu(VcpuId(0)).unwrap();
    pair.counted.store(0, Ordering::SeqCst);
    pair.load(&mut vcpu);
    vcpu
}

#[test]
fn a_guest_runs_at_its_target_before_its_pages_come() {
    for encrypted in [false, true] {
        let mut pair = Pair::on_two(encrypted);
        pair.run_source(PAGES + 7).unwrap();
        let before = pair.counted.load(Ordering::SeqCst);
        let mut from = pair.source.outgoing(2).unwrap();
        let mut to = pair.target.incoming(2).unwrap();
        commit(&mut from, &mut to, 0);
        assert_eq!(to.pages(), 0, "nothing has travelled");
        let mut vcpu = vcpu_at_target(&pair);
        let counted = pair.counted.clone();
        let on_demand = std::thread::scope(|scope| {
            // It looks at every page before it counts on.
            let running = scope.spawn(|| run_until(&mut vcpu, &counted, before + 3 * PAGES));
            let mut on_demand = 0;
            while !running.is_finished() {
                on_demand += serve(&from, &to);
                std::thread::yield_now();
            }
            running.join().unwrap().unwrap();
            on_demand
        });
        assert_eq!(on_demand as u64, PAGES + 1, "each page was waited for");
        carry_rest(&from, &to);
        assert_eq!(from.pages_left(), 0);
        to.own().unwrap();
        from.leave().unwrap();
        drop((from, to));
        assert_eq!(pair.vcpus[0].vcpu_run().unwrap_err(), Error::Poisoned);
        assert_eq!(private_pages(&pair.target), private_pages(&pair.source));
        mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
        // Faults are the host's again.
        assert_eq!(pair.target.pre_fault_memory(Gfn::new(PAGES + 50), 1), Ok(1));
        drop(vcpu);
        pair.destroy();
    }
}

#[test]
fn pages_come_behind_the_guest_while_it_runs_and_before_it_asks() {
    let mut pair = Pair::on_two(false);
    pair.source
        .pre_fault_memory(Gfn::new(PAGES + 1), 600)
        .unwrap();
    pair.run_source(PAGES + 7).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    let mut from = pair.source.outgoing(2).unwrap();
    let mut to = pair.target.incoming(2).unwrap();
    // What travelled before and was not written again does not travel twice.
    commit(&mut from, &mut to, 1);
    let sent_before = to.pages();
    assert!(sent_before > PAGES);
    assert_eq!(from.pages_left(), 0);
    let mut vcpu = vcpu_at_target(&pair);
    let counted = pair.counted.clone();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| run_until(&mut vcpu, &counted, before + 3 * PAGES));
        let serving = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                serve(&from, &to);
                std::thread::yield_now();
            }
        });
        carry_rest(&from, &to);
        running.join().unwrap().unwrap();
        done.store(true, Ordering::SeqCst);
        serving.join().unwrap();
    });
    assert_eq!(to.pages(), sent_before);
    to.own().unwrap();
    from.leave().unwrap();
    drop((from, to, vcpu));
    assert_eq!(private_pages(&pair.target), private_pages(&pair.source));
    mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
    pair.destroy();
}

#[test]
fn a_page_that_the_source_never_had_is_new() {
    let mut pair = Pair::on_two(false);
    pair.run_source(3).unwrap();
    let mut from = pair.source.outgoing(1).unwrap();
    let mut to = pair.target.incoming(1).unwrap();
    commit(&mut from, &mut to, 0);
    let gfn = Gfn::new(PAGES + 9);
    assert!(!from.has_page(gfn) && from.has_page(Gfn::new(1)));
    // A fault at it waits, until it is known that nothing comes.
    assert_eq!(pair.target.pre_fault_memory(gfn, 1), Err(Error::Busy));
    assert_eq!(to.wanted(), [gfn]);
    assert_eq!(from.wanted_pages(0, &[gfn]).unwrap(), None);
    to.never_had(gfn);
    assert_eq!(pair.target.pre_fault_memory(gfn, 1), Ok(1));
    assert_eq!(to.wanted(), []);
    // Memory keeps its kind while pages come.
    let shared = pair.target.set_memory_attributes(gfn, 1, Privacy::Shared);
    assert_eq!(shared, Err(Error::Busy));
    carry_rest(&from, &to);
    to.own().unwrap();
    from.leave().unwrap();
    drop((from, to));
    mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
    pair.destroy();
}

#[test]
fn a_page_that_comes_twice_changes_nothing() {
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES + 7).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    let mut from = pair.source.outgoing(1).unwrap();
    let mut to = pair.target.incoming(1).unwrap();
    commit(&mut from, &mut to, 0);
    let wanted = [Gfn::new(3), Gfn::new(0)];
    for _ in 0..2 {
        let bundle = from.wanted_pages(0, &wanted).unwrap().unwrap();
        to.take_pages(&bundle).unwrap();
        assert_eq!(to.wanted(), []);
        assert_eq!(to.pages(), 2);
    }
    carry_rest(&from, &to);
    assert_eq!(to.pages(), PAGES + 1);
    to.own().unwrap();
    from.leave().unwrap();
    drop((from, to));
    assert_eq!(pair.run_target(), before + 1);
    mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
    pair.destroy();
}

#[test]
fn after_the_commit_there_is_no_way_back() {
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES + 7).unwrap();
    let mut from = pair.source.outgoing(1).unwrap();
    let mut to = pair.target.incoming(1).unwrap();
    assert!(matches!(to.commit(), Err(Error::WrongState(_))));
    commit(&mut from, &mut to, 0);
    assert!(matches!(to.abort(), Err(Error::WrongState(_))));
    assert!(matches!(from.abort(None), Err(Error::WrongState(_))));
    assert!(matches!(to.commit(), Err(Error::WrongState(_))));
    // Neither end comes back: the guest is lost, and both sides say so.
    let mut vcpu = vcpu_at_target(&pair);
    let lost = std::thread::scope(|scope| {
        let running = scope.spawn(|| vcpu.vcpu_run().map(drop));
        while to.wanted().is_empty() {
            std::thread::yield_now();
        }
        drop(to);
        running.join().unwrap()
    });
    assert_eq!(lost, Err(Error::Poisoned));
    drop(from);
    assert_eq!(pair.vcpus[0].vcpu_run().unwrap_err(), Error::Poisoned);
    drop(vcpu);
    pair.destroy();
}

#[test]
fn a_commit_that_fails_leaves_the_way_back() {
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES + 7).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    let mut from = pair.source.outgoing(1).unwrap();
    let mut to = pair.target.incoming(1).unwrap();
    start(&mut from, &mut to, 1);
    let status = 0xc000_0608_0000_0000;
    let injected = common::Injected::Status(status);
    pair.hosts[1].fail(kvm_ops_tdx::Leaf::ImportCommit, 1, u64::MAX, injected);
    assert_eq!(to.commit(), Err(Error::Firmware(status)));
    assert!(pair.hosts[1].heal());
    let token = to.abort().unwrap();
    from.abort(Some(&token)).unwrap();
    drop((from, to));
    pair.run_source(before + 2 * PAGES).unwrap();
    pair.destroy();
}

#[test]
fn a_page_that_is_changed_on_its_way_loses_the_guest_with_the_reason() {
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES + 7).unwrap();
    let mut from = pair.source.outgoing(1).unwrap();
    let mut to = pair.target.incoming(1).unwrap();
    commit(&mut from, &mut to, 0);
    let bundle = from.pages(0).unwrap().unwrap();
    let mut bytes = Vec::new();
    bundle.encode(&mut bytes);
    *bytes.last_mut().unwrap() ^= 1;
    let changed = kvm_ops_tdx::migrate::Bundle::decode(&bytes).unwrap();
    assert!(matches!(to.take_pages(&changed), Err(Error::Firmware(_))));
    drop((from, to));
    let told = pair.target.explain(Error::Poisoned);
    assert!(told.to_string().contains("IMPORT.MEM"), "{told}");
    mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
    pair.destroy();
}

#[test]
fn a_guest_that_never_leaves_the_td_does_not_keep_its_import_from_ending() {
    let mut pair = Pair::on_two(false);
    pair.run_source(3).unwrap();
    let mut from = pair.source.outgoing(1).unwrap();
    let mut to = pair.target.incoming(1).unwrap();
    commit(&mut from, &mut to, 0);
    let mut vcpu = pair.target.create_vcpu(VcpuId(0)).unwrap();
    let endless = FnProgram(|_: Outcome<'_>| Action::Read {
        gpa: Gpa::new(0),
        len: 8,
    });
    let programs = vcpu.programs().unwrap();
    programs.load_program(Box::new(endless)).unwrap();
    let kick = vcpu.kick_handle();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| vcpu.vcpu_run().map(drop));
        while to.wanted().is_empty() {
            std::thread::yield_now();
        }
        carry_rest(&from, &to);
        to.own().unwrap();
        assert!(!running.is_finished());
        kick.kick();
        running.join().unwrap().unwrap();
    });
    from.leave().unwrap();
    drop((from, to, vcpu));
    mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
    pair.destroy();
}

#[test]
fn pages_that_were_sent_and_written_again_travel_before_the_token() {
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES + 7).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    let mut from = pair.source.outgoing(1).unwrap();
    let mut to = pair.target.incoming(1).unwrap();
    carry(&mut to, from.begin().unwrap()).unwrap();
    migrate_support::round(&mut from, &mut to).unwrap();
    let mut vcpu = pair.vcpus.remove(0);
    run_until(&mut vcpu, &pair.counted, before + 3).unwrap();
    from.stop().unwrap();
    assert!(from.pages_left() > 0);
    carry(&mut to, from.td_state().unwrap()).unwrap();
    carry(&mut to, from.vcpu_state(VcpuId(0), 0).unwrap()).unwrap();
    assert!(matches!(from.early_start_token(), Err(Error::Firmware(_))));
    // The source is still the owner.
    from.abort(None).unwrap();
    drop((from, to));
    run_until(&mut vcpu, &pair.counted, before + 2 * PAGES).unwrap();
    pair.vcpus.push(vcpu);
    pair.destroy();
}
