//! A TD leaves its host and runs on at another, by the module's own leaves, bundle by bundle.

mod common;
mod migrate_support;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::audit::mirror_equals_secure_ept;
use common::{Injected, TestHost};
use kvm_ops_core::guest::Script;
use kvm_ops_core::{
    Answer, Backend, Error, Exit, Field, Gfn, PreboundTd, Privacy, Step, VcpuId, VcpuOps, VmId,
    VmOps,
};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::migrate::{ExitState, MAX_STREAMS};
use migrate_support::{PAGES, Pair, carry, finish, machine, private_pages, round};
use proptest::prelude::*;
use soft_tdx_module::{GuestOp, Outcome as ModuleOutcome, PageSize, PageType};

/// Everything of a TD that must be the same before and after, as the module's tables have it.
fn identity(pair: &Pair, side: usize) -> impl PartialEq + std::fmt::Debug + use<> {
    let vm = [&pair.source, &pair.target][side];
    let tdr = vm.tdr().unwrap().get();
    let td = pair.hosts[side].platform().td(tdr).unwrap();
    (td.mrtd, td.rtmr, td.num_vcpus)
}

fn migrates(mut pair: Pair, streams: u16) {
    let now = pair.counted.load(Ordering::SeqCst);
    pair.run_source(now + 3 * PAGES).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    let (identity_before, pages_before) = (identity(&pair, 0), private_pages(&pair.source));
    let mut from = pair.source.outgoing(streams).unwrap();
    let mut to = pair.target.incoming(streams).unwrap();
    carry(&mut to, from.begin().unwrap()).unwrap();
    finish(&mut from, &mut to).unwrap();
    to.own().unwrap();
    from.leave().unwrap();
    let carried = from.carried();
    assert_eq!(
        (carried.pages, carried.pages_stopped),
        (PAGES + 1, PAGES + 1)
    );
    assert_eq!(to.pages(), PAGES + 1);
    drop((from, to));
    assert_eq!(identity(&pair, 1), identity_before);
    assert_eq!(private_pages(&pair.target), pages_before);
    mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
    assert_eq!(pair.target.step(), Step::Runnable);
    assert_eq!(
        pair.vcpus[0].vcpu_run().unwrap_err(),
        Error::Poisoned,
        "the source never runs it again"
    );
    assert_eq!(pair.run_target(), before + 1, "it goes on where it was");
    pair.destroy();
}

#[test]
fn a_stopped_td_comes_to_another_host_with_all_that_it_has() {
    migrates(Pair::on_two(false), 1);
}

#[test]
fn a_td_migrates_between_hosts_whose_memory_is_encrypted() {
    migrates(Pair::on_two(true), 1);
}

#[test]
fn a_td_migrates_over_several_streams() {
    migrates(Pair::on_two(false), 4);
}

#[test]
fn a_td_with_several_vcpus_migrates_within_one_machine() {
    let host = machine(false, 1);
    migrates(Pair::new([host.clone(), host], 3), 2);
}

#[test]
fn a_guest_that_writes_between_all_steps_loses_nothing() {
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES).unwrap();
    let counted = pair.counted.clone();
    let mut vcpu = pair.vcpus.remove(0);
    let mut write = |pages: u64| {
        let now = counted.load(Ordering::SeqCst);
        migrate_support::run_until(&mut vcpu, &counted, now + pages).unwrap();
    };
    let mut from = pair.source.outgoing(2).unwrap();
    let mut to = pair.target.incoming(2).unwrap();
    carry(&mut to, from.begin().unwrap()).unwrap();
    for written in [PAGES / 2, 3, 2 * PAGES, 0, 1] {
        write(2);
        while let Some(bundle) = from.pages(1).unwrap() {
            carry(&mut to, bundle).unwrap();
            write(written);
        }
        carry(&mut to, from.end_round().unwrap()).unwrap();
        write(1);
    }
    let before = counted.load(Ordering::SeqCst);
    finish(&mut from, &mut to).unwrap();
    to.own().unwrap();
    from.leave().unwrap();
    assert!(from.carried().pages > PAGES + 1, "pages travelled again");
    drop((from, to));
    pair.vcpus.insert(0, vcpu);
    assert_eq!(pair.run_target(), before + 1);
    pair.destroy();
}

#[test]
fn the_source_runs_on_after_an_abort_at_every_point_and_migrates_later() {
    for rounds in 0..4 {
        let mut pair = Pair::on_two(false);
        pair.run_source(PAGES).unwrap();
        let mut from = pair.source.outgoing(1).unwrap();
        let mut to = pair.target.incoming(1).unwrap();
        if rounds > 0 {
            carry(&mut to, from.begin().unwrap()).unwrap();
        }
        if rounds > 1 {
            round(&mut from, &mut to).unwrap();
        }
        if rounds > 2 {
            from.stop().unwrap();
            assert_eq!(pair.vcpus[0].vcpu_run().unwrap_err(), Error::Busy);
            carry(&mut to, from.td_state().unwrap()).unwrap();
        }
        from.abort(None).unwrap();
        drop((from, to));
        let now = pair.counted.load(Ordering::SeqCst);
        pair.run_source(now + 2 * PAGES).unwrap();
        mirror_equals_secure_ept(&pair.hosts[0], &pair.source);
        // Conversions work again, so nothing is left in a state of the export.
        let frame = Gfn::new(PAGES + 5);
        pair.source
            .set_memory_attributes(frame, 1, Privacy::Shared)
            .unwrap();
        pair.source
            .set_memory_attributes(frame, 1, Privacy::Private)
            .unwrap();
        pair.renew_target();
        migrates(pair, 1);
    }
}

#[test]
fn a_session_that_is_dropped_lets_the_source_run_on_and_poisons_the_target() {
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES).unwrap();
    {
        let mut from = pair.source.outgoing(1).unwrap();
        let mut to = pair.target.incoming(1).unwrap();
        carry(&mut to, from.begin().unwrap()).unwrap();
        round(&mut from, &mut to).unwrap();
        from.stop().unwrap();
    }
    assert_eq!(pair.target.step(), Step::Poisoned);
    let now = pair.counted.load(Ordering::SeqCst);
    pair.run_source(now + PAGES).unwrap();
    pair.destroy();
}

#[test]
fn after_the_start_token_only_the_targets_token_brings_the_guest_back() {
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES).unwrap();
    let mut from = pair.source.outgoing(1).unwrap();
    let mut to = pair.target.incoming(1).unwrap();
    carry(&mut to, from.begin().unwrap()).unwrap();
    finish(&mut from, &mut to).unwrap();
    assert!(to.is_started());
    assert!(matches!(from.abort(None), Err(Error::WrongState(_))));
    let token = to.abort().unwrap();
    assert!(matches!(to.own(), Err(Error::WrongState(_))));
    let mut forged = Vec::new();
    token.encode(&mut forged);
    *forged.last_mut().unwrap() ^= 1;
    let forged = kvm_ops_tdx::migrate::Bundle::decode(&forged).unwrap();
    assert!(matches!(from.abort(Some(&forged)), Err(Error::Firmware(_))));
    assert_eq!(pair.vcpus[0].vcpu_run().unwrap_err(), Error::Busy);
    from.abort(Some(&token)).unwrap();
    drop((from, to));
    let now = pair.counted.load(Ordering::SeqCst);
    pair.run_source(now + PAGES).unwrap();
    assert_eq!(pair.target.step(), Step::Poisoned);
    pair.destroy();
}

#[test]
fn while_pages_travel_memory_keeps_its_kind_and_its_slots() {
    let pair = Pair::on_two(false);
    let mut from = pair.source.outgoing(1).unwrap();
    from.begin().unwrap();
    let change = |to| pair.source.set_memory_attributes(Gfn::new(1), 1, to);
    assert_eq!(change(Privacy::Shared), Err(Error::Busy));
    let slot = common::life::slot(&pair.hosts[0]);
    assert_eq!(pair.source.delete_memory_slot(&slot), Err(Error::Busy));
    assert!(matches!(pair.source.outgoing(1), Err(Error::Busy)));
    drop(from);
    assert_eq!(change(Privacy::Shared), Ok(1));
    pair.destroy();
}

#[test]
fn a_migration_td_that_cannot_be_prebound_undoes_the_creation() {
    for arrives in [false, true] {
        let host = machine(false, 1);
        let params = migrate_support::with(1, |td| {
            td.arrives = arrives;
            td.migration_td = Some(PreboundTd {
                info_hash: [7; 48],
                attributes: 0,
            });
        });
        let mut vm = migrate_support::Vm::create(&host, VmId(1), &params).unwrap();
        let refusal = 0xc000_0100_0000_0000;
        host.fail(Leaf::ServtdPrebind, 1, 1, Injected::Status(refusal));
        assert_eq!(vm.vm_init(), Err(Error::Firmware(refusal)));
        assert_eq!(vm.step(), Step::Created);
        assert!(host.heal());
        assert!(host.taken().is_empty(), "all pages are back");
        vm.vm_init().unwrap();
        assert!(common::life::destroy(vm).is_clean());
        assert_eq!(host.live(), 0);
    }
}

#[test]
fn what_is_not_due_is_refused_by_name() {
    let pair = Pair::on_two(false);
    assert!(matches!(pair.target.outgoing(1), Err(Error::WrongState(_))));
    assert!(matches!(pair.source.incoming(1), Err(Error::WrongState(_))));
    for streams in [0, MAX_STREAMS + 1] {
        let error = Error::Invalid(Field::Stream, streams.into());
        assert_eq!(pair.source.outgoing(streams).err(), Some(error));
        assert_eq!(pair.target.incoming(streams).err(), Some(error));
    }
    let mut from = pair.source.outgoing(1).unwrap();
    assert!(matches!(from.pages(0), Err(Error::WrongState(_))));
    assert!(matches!(from.stop(), Err(Error::WrongState(_))));
    assert!(matches!(from.start_token(), Err(Error::WrongState(_))));
    assert!(matches!(from.leave(), Err(Error::WrongState(_))));
    let first = from.begin().unwrap();
    assert!(matches!(from.begin(), Err(Error::WrongState(_))));
    let mut to = pair.target.incoming(1).unwrap();
    let token = from.end_round().unwrap();
    assert_eq!(to.take(&token), Err(Error::Invalid(Field::Bundle, 32)));
    assert!(matches!(to.own(), Err(Error::WrongState(_))));
    to.take(&first).unwrap();
    assert_eq!(to.take(&first), Err(Error::Invalid(Field::Bundle, 0)));
    from.stop().unwrap();
    assert_eq!(
        from.start_token().err(),
        Some(Error::Invalid(Field::Size, (PAGES + 1) << 12)),
        "pages are left"
    );
    drop((from, to));
    pair.destroy();
}

#[test]
fn shared_frames_travel_beside_the_bundles() {
    let mut pair = Pair::on_two(false);
    let frame = Gfn::new(PAGES + 9);
    pair.source
        .set_memory_attributes(frame, 1, Privacy::Shared)
        .unwrap();
    let mut from = pair.source.outgoing(1).unwrap();
    let mut to = pair.target.incoming(1).unwrap();
    carry(&mut to, from.begin().unwrap()).unwrap();
    finish(&mut from, &mut to).unwrap();
    assert_eq!(from.shared(), [(frame, 1)]);
    let mut page = [0; 4096];
    from.read_shared(frame, &mut page).unwrap();
    to.take_shared(frame, Some(&page)).unwrap();
    assert_eq!(
        to.take_shared(Gfn::new(1), None),
        Err(Error::Exists(Field::Gfn, 1))
    );
    to.own().unwrap();
    from.leave().unwrap();
    drop((from, to));
    assert_eq!(pair.target.privacy(frame), Privacy::Shared);
    pair.run_target();
    pair.destroy();
}

#[test]
fn a_guest_on_its_own_thread_writes_until_it_is_stopped_and_loses_nothing() {
    let mut pair = Pair::on_two(false);
    pair.run_source(1).unwrap();
    let counted = pair.counted.clone();
    let mut vcpu = pair.vcpus.remove(0);
    let (mut vcpu, carried) = std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            let stopped = migrate_support::run_until(&mut vcpu, &counted, u64::MAX);
            assert_eq!(stopped, Err(Error::Busy));
            vcpu
        });
        let mut from = pair.source.outgoing(2).unwrap();
        let mut to = pair.target.incoming(2).unwrap();
        carry(&mut to, from.begin().unwrap()).unwrap();
        for _ in 0..5 {
            round(&mut from, &mut to).unwrap();
            let before = counted.load(Ordering::SeqCst);
            while counted.load(Ordering::SeqCst) < before + PAGES {
                std::thread::yield_now();
            }
        }
        finish(&mut from, &mut to).unwrap();
        to.own().unwrap();
        // Out before the VM is given up, which would be another error.
        let vcpu = running.join().unwrap();
        from.leave().unwrap();
        (vcpu, from.carried())
    });
    assert_eq!(vcpu.vcpu_run().unwrap_err(), Error::Poisoned);
    assert!(carried.pages_stopped <= PAGES + 1, "{carried:?}");
    assert_eq!(carried.rounds, 5 + 2, "{carried:?}");
    pair.vcpus.push(vcpu);
    let before = pair.counted.load(Ordering::SeqCst);
    // It may have been stopped between the write of a count and the word of it.
    let first = pair.run_target();
    assert!(
        (before + 1..=before + 2).contains(&first),
        "{before} then {first}"
    );
    pair.destroy();
}

/// TDG.VP.VMCALL for an instruction: its exit reason.
const IO: u64 = 30;

/// The TDVPR page of a TD with one vCPU.
fn tdvpr(host: &TestHost, tdr: u64) -> u64 {
    let is_tdvpr = |page: &u64| {
        let view = host.platform().page(*page, PageSize::Size4K).unwrap();
        view.page_type == PageType::Tdvpr && view.owner == tdr
    };
    let mut pages = host.ever_taken().into_iter().map(|page| page.get() << 12);
    pages.find(is_tdvpr).unwrap()
}

#[test]
fn the_answer_to_an_exit_follows_the_guest_to_its_target() {
    for carried in [true, false] {
        let mut pair = Pair::on_two(false);
        let vcpu = &mut pair.vcpus[0];
        let program = Script::new().hypercall(42, [0; 4]).halt();
        vcpu.programs()
            .unwrap()
            .load_program(Box::new(program))
            .unwrap();
        assert!(matches!(
            vcpu.vcpu_run().unwrap(),
            Exit::Hypercall { nr: 42, .. }
        ));
        vcpu.answer(Answer::Value(5)).unwrap();
        assert!(matches!(vcpu.exit_state(), Err(Error::WrongState(_))));
        let mut from = pair.source.outgoing(1).unwrap();
        let mut to = pair.target.incoming(1).unwrap();
        carry(&mut to, from.begin().unwrap()).unwrap();
        finish(&mut from, &mut to).unwrap();
        let state = vcpu.exit_state().unwrap();
        assert_eq!(
            vcpu.exit_state().unwrap(),
            state,
            "it is asked for as often as wanted"
        );
        assert_eq!(ExitState::decode(&state.encode()), Ok(state));
        to.own().unwrap();
        from.leave().unwrap();
        drop((from, to));
        let mut arrived = pair.target.create_vcpu(VcpuId(0)).unwrap();
        if carried {
            arrived.set_exit_state(&state).unwrap();
        }
        // A vCPU without a program would run machine code.
        let placeholder = Box::new(Script::new());
        arrived
            .programs()
            .unwrap()
            .load_program(placeholder)
            .unwrap();
        // The registers with which the guest comes out of its TDCALL.
        let tdr = pair.target.tdr().unwrap().get();
        let at_start = Arc::new(Mutex::new(None));
        let seen = Arc::clone(&at_start);
        let platform = pair.hosts[1].platform();
        platform.set_guest(tdvpr(&pair.hosts[1], tdr), move |last: &ModuleOutcome| {
            if let ModuleOutcome::Start(regs) = last {
                *seen.lock().unwrap() = Some(regs.r10);
            }
            GuestOp::vmcall(IO, [1, 1, 0x80, 0])
        });
        assert!(matches!(arrived.vcpu_run().unwrap(), Exit::IoOut { .. }));
        let answer = if carried { 5 } else { 0 };
        assert_eq!(*at_start.lock().unwrap(), Some(answer));
        assert!(matches!(
            arrived.set_exit_state(&state),
            Err(Error::WrongState(_))
        ));
        drop(arrived);
        pair.destroy();
    }
}

/// A step of a history: the guest writes, a bundle travels, a round ends.
#[derive(Clone, Copy, Debug)]
enum Event {
    Write(u64),
    Send(u16),
    EndRound,
    Prefault(u64),
}

fn any_step() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1..2 * PAGES).prop_map(Event::Write),
        4 => (0..3u16).prop_map(Event::Send),
        2 => Just(Event::EndRound),
        1 => (PAGES + 1..PAGES + 90).prop_map(Event::Prefault),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_written_between_whichever_bundles_arrives(
        steps in proptest::collection::vec(any_step(), 0..30),
        leaves in any::<bool>(),
    ) {
        let mut pair = Pair::on_two(false);
        pair.run_source(1).unwrap();
        let counted = pair.counted.clone();
        let mut vcpu = pair.vcpus.remove(0);
        let mut from = pair.source.outgoing(3).unwrap();
        let mut to = pair.target.incoming(3).unwrap();
        carry(&mut to, from.begin().unwrap()).unwrap();
        for step in steps {
            match step {
                Event::Write(pages) => {
                    let now = counted.load(Ordering::SeqCst);
                    migrate_support::run_until(&mut vcpu, &counted, now + pages).unwrap();
                }
                Event::Send(stream) => {
                    if let Some(bundle) = from.pages(stream).unwrap() {
                        carry(&mut to, bundle).unwrap();
                    }
                }
                Event::EndRound => carry(&mut to, from.end_round().unwrap()).unwrap(),
                Event::Prefault(gfn) => {
                    pair.source.pre_fault_memory(Gfn::new(gfn), 2).unwrap();
                }
            }
        }
        let before = counted.load(Ordering::SeqCst);
        finish(&mut from, &mut to).unwrap();
        let token = (!leaves).then(|| to.abort().unwrap());
        match token {
            None => {
                to.own().unwrap();
                from.leave().unwrap();
            }
            Some(token) => from.abort(Some(&token)).unwrap(),
        }
        drop((from, to));
        pair.vcpus.push(vcpu);
        if leaves {
            prop_assert_eq!(private_pages(&pair.target), private_pages(&pair.source));
            mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
            prop_assert_eq!(pair.run_target(), before + 1);
        } else {
            mirror_equals_secure_ept(&pair.hosts[0], &pair.source);
            pair.run_source(before + 2 * PAGES).unwrap();
        }
        pair.destroy();
    }
}
