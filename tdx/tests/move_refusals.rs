//! Everything that can stand in the way of a TD's move within its host, as a call and by token: the guest goes on in one VM,
//! and every page and key has one owner.
//!
//! `BLESS=1 cargo test -p kvm-ops-tdx --test move_refusals` writes the table in docs/migration.md.

mod common;
mod migrate_support;
mod move_support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Injected, TestHost};
use kvm_ops_core::moves::MoveToken;
use kvm_ops_core::{
    Backend, EncParams, Error, Exit, FaultPlan, Field, Gpaw, Host, InitialPageKind, Step, TdParams,
    VcpuId, VcpuOps, VmOps, VmParams,
};
use kvm_ops_tdx::status::{Class, operand};
use kvm_ops_tdx::{Leaf, TdxVm};
use migrate_support::matrix::document;
use migrate_support::{Pair, carry};
use move_support::{FAR, World, created, distinct, in_words, waiting};

const FOR_EVER: u64 = u64::MAX;

/// The ways to move, by whether they go by token.
const BOTH: &[bool] = &[false, true];
const CALL: &[bool] = &[false];
const TOKEN: &[bool] = &[true];

/// What makes another try succeed.
enum Then {
    /// This is done first.
    Again(fn(&mut World)),
    /// Another target.
    OtherTarget,
    /// Nothing does.
    Never,
    /// The move is done in spite of it.
    Done,
}

use Then::{Again, Done, Never, OtherTarget};

type Case = (&'static str, &'static [bool], fn(&mut World), Then);

const CASES: &[Case] = &[
    (
        "source: not finalised",
        BOTH,
        |w| {
            w.end_source(created(&w.host));
            w.prepare();
        },
        Again(World::start),
    ),
    (
        "source: its `vm_init` failed",
        BOTH,
        |w| {
            w.end_source(created(&w.host));
            refuse(w, Leaf::MngInit);
            assert!(w.from.vm_init().is_err());
            w.host.heal();
        },
        Again(|w| {
            w.prepare();
            w.start();
        }),
    ),
    (
        "source: an exit waits for its answer",
        BOTH,
        |w| {
            w.asks.store(true, Ordering::SeqCst);
            let exit = w.old.as_mut().unwrap().vcpu_run();
            assert!(matches!(exit, Ok(Exit::IoIn { .. })));
            w.asks.store(false, Ordering::SeqCst);
        },
        Again(|w| {
            let vcpu = w.old.as_mut().unwrap();
            vcpu.kick_handle().kick();
            assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted));
        }),
    ),
    (
        "source: staged already",
        CALL,
        |w| w.send().unwrap(),
        Again(|w| w.from.local_cancel().unwrap()),
    ),
    (
        "source: staged already",
        TOKEN,
        |w| {
            w.send().unwrap();
            w.token = None;
        },
        Again(|w| w.from.local_cancel().unwrap()),
    ),
    (
        "source: pages that a migration to another host left blocked",
        BOTH,
        leave_pages_blocked,
        Again(|w| drop(w.from.outgoing(1).unwrap())),
    ),
    (
        "source: poisoned by a fatal status",
        BOTH,
        |w| {
            let fatal = Injected::Status(Class::TD_FATAL.with(0).get());
            w.host.fail(Leaf::MemPageAug, 1, 1, fatal);
            assert!(w.from.pre_fault_memory(FAR, 1).is_err());
            w.host.heal();
            let why = w.from.explain(Error::Poisoned).to_string();
            assert!(why.contains("TDH.MEM.PAGE.AUG"), "{why}");
        },
        Never,
    ),
    (
        "source: its guest moved before",
        BOTH,
        |w| {
            let mut third = waiting(&w.host);
            TdxVm::move_context(&mut w.from, &mut third).unwrap();
            w.elsewhere = Some(third.create_vcpu(VcpuId(0)).unwrap());
            w.others.push(third);
        },
        Never,
    ),
    (
        "source: its key is released",
        BOTH,
        |w| drop(w.from.mmu_release_hkid().unwrap()),
        Never,
    ),
    (
        "target: on another machine",
        BOTH,
        |w| {
            let abroad = TestHost::new();
            w.renew_target(waiting(&abroad));
            w.abroad = Some(abroad);
        },
        OtherTarget,
    ),
    (
        "target: another place of the shared bit",
        BOTH,
        |w| {
            let wide = TdParams {
                gpaw: Gpaw::Bits52,
                ..TdParams::default()
            };
            renew_with(w, 1, wide);
        },
        OtherTarget,
    ),
    (
        "target: for more vCPUs",
        BOTH,
        |w| renew_with(w, 2, TdParams::default()),
        OtherTarget,
    ),
    (
        "target: has a vCPU",
        BOTH,
        |w| drop(w.to.create_vcpu(VcpuId(0)).unwrap()),
        OtherTarget,
    ),
    (
        "target: has a vCPU that is half made",
        BOTH,
        |w| {
            w.host.fail(Leaf::VpAddcx, 2, FOR_EVER, busy());
            assert_eq!(w.to.create_vcpu(VcpuId(0)).err(), Some(Error::Busy));
            w.host.heal();
        },
        OtherTarget,
    ),
    (
        "target: has an initial page",
        BOTH,
        |w| {
            let page = common::life::initial_page(0, InitialPageKind::Unmeasured);
            w.to.add_initial_page(&page).unwrap();
        },
        OtherTarget,
    ),
    (
        "target: finalised",
        BOTH,
        |w| {
            drop(w.to.create_vcpu(VcpuId(0)).unwrap());
            w.to.vm_finalize().unwrap();
        },
        OtherTarget,
    ),
    (
        "target: waits for a guest from another host",
        BOTH,
        |w| {
            let arriving = TdParams {
                arrives: true,
                ..TdParams::default()
            };
            renew_with(w, 1, arriving);
        },
        OtherTarget,
    ),
    (
        "target: `vm_init` failed, and its undoing failed",
        BOTH,
        |w| {
            w.renew_target(created(&w.host));
            refuse(w, Leaf::MngInit);
            let not_flushed = Class::FLUSHVP_NOT_DONE.with(0).get();
            let not_flushed = Injected::Status(not_flushed);
            w.host.fail(Leaf::MngVpflushdone, 1, 1, not_flushed);
            assert!(w.to.vm_init().is_err());
            w.host.heal();
            assert_eq!(w.to.step(), Step::Poisoned);
        },
        OtherTarget,
    ),
    (
        "target: `vm_init` failed, and was undone",
        BOTH,
        |w| {
            w.renew_target(created(&w.host));
            refuse(w, Leaf::MngInit);
            assert!(w.to.vm_init().is_err());
            w.host.heal();
            assert_eq!(w.to.step(), Step::Created);
        },
        Done,
    ),
    (
        "target: its key is released",
        BOTH,
        |w| drop(w.to.mmu_release_hkid().unwrap()),
        OtherTarget,
    ),
    (
        "host: no KeyID is free, and the target is not initialised",
        BOTH,
        |w| {
            w.renew_target(created(&w.host));
            while let Ok(lease) = w.host.key_pool().lease() {
                w.leases.push(lease);
            }
        },
        Done,
    ),
    (
        "host: no page is free",
        BOTH,
        |w| w.host.limit_pages(0),
        Done,
    ),
    (
        "port: `take_guest` answers `Busy`",
        BOTH,
        |w| w.host.fail_call(FaultPlan::TAKE_GUEST, Error::Busy),
        Again(|w| assert!(w.host.heal())),
    ),
    (
        "port: `take_guest` answers `NoMemory`",
        BOTH,
        |w| w.host.fail_call(FaultPlan::TAKE_GUEST, Error::NoMemory),
        Again(|w| assert!(w.host.heal())),
    ),
    (
        "port: `take_guest` answers anything else",
        BOTH,
        |w| {
            let error = Error::Invalid(Field::Vcpu, 0);
            w.host.fail_call(FaultPlan::TAKE_GUEST, error);
        },
        Again(|w| assert!(w.host.heal())),
    ),
    (
        "token: no random numbers",
        TOKEN,
        |w| w.random = |_| Err(Error::Busy),
        Again(|w| w.random = distinct),
    ),
    (
        "token: random numbers that are zeros",
        TOKEN,
        |w| w.random = |_| Ok(()),
        Again(|w| w.random = distinct),
    ),
    (
        "token: the random numbers of another one",
        TOKEN,
        |w| {
            w.random = ones;
            let mut other = common::life::runnable(&w.host);
            let sent = other.local_send(&w.table, &mut ones, &mut |_| Ok(()));
            sent.unwrap();
            w.others.push(other);
        },
        Again(|w| w.random = distinct),
    ),
    (
        "token: not delivered",
        TOKEN,
        |w| w.delivers[0] = Err(Error::NoMemory),
        Again(|w| w.delivers[0] = Ok(())),
    ),
    (
        "token: the guest's name is not delivered to the target",
        TOKEN,
        |w| w.delivers[1] = Err(Error::NoMemory),
        Again(|w| w.delivers[1] = Ok(())),
    ),
    (
        "token: nobody's",
        TOKEN,
        |w| {
            w.send().unwrap();
            w.token = Some(MoveToken::from_bytes([0xee; 16]));
        },
        Again(|w| {
            w.from.local_cancel().unwrap();
            w.token = None;
        }),
    ),
    (
        "token: of another table",
        TOKEN,
        |w| w.asked = Arc::default(),
        Again(|w| w.asked = Arc::clone(&w.table)),
    ),
    (
        "token: used",
        TOKEN,
        |w| {
            w.send().unwrap();
            let mut third = waiting(&w.host);
            let token = w.token.unwrap();
            third
                .local_receive(&w.table, &token, &mut |_| Ok(()))
                .unwrap();
            w.elsewhere = Some(third.create_vcpu(VcpuId(0)).unwrap());
            w.others.push(third);
        },
        Never,
    ),
    (
        "token: taken back",
        TOKEN,
        |w| {
            w.send().unwrap();
            w.from.local_cancel().unwrap();
        },
        Again(|w| w.token = None),
    ),
    (
        "token: its source is torn down",
        TOKEN,
        |w| {
            w.send().unwrap();
            w.end_source(created(&w.host));
        },
        Never,
    ),
];

/// The next call of the leaf is refused.
fn refuse(w: &World, leaf: Leaf) {
    let refused = Injected::Status(Class::OPERAND_INVALID.with(operand::RCX).get());
    w.host.fail(leaf, 1, 1, refused);
}

fn busy() -> Injected {
    Injected::Status(Class::OPERAND_BUSY.with(operand::RCX).get())
}

fn ones(out: &mut [u8]) -> kvm_ops_core::Result<()> {
    out.fill(1);
    Ok(())
}

/// Another target of this host, with such parameters.
fn renew_with(w: &mut World, vcpus: u32, td: TdParams) {
    let params = VmParams {
        enc: EncParams::Td(Box::new(td)),
        ..VmParams::new(vcpus)
    };
    let mut vm = TdxVm::create(&w.host, w.host.next_vm_id(), &params).unwrap();
    vm.vm_init().unwrap();
    w.renew_target(vm);
}

/// The guest was to go to another host: TDH.EXPORT.MEM was refused, and so was the way back of its pages.
fn leave_pages_blocked(w: &mut World) {
    let host = TestHost::new();
    let mut pair = Pair::new([host.clone(), host.clone()], 1);
    pair.run_source(3).unwrap();
    {
        let mut from = pair.source.outgoing(1).unwrap();
        let mut to = pair.target.incoming(1).unwrap();
        carry(&mut to, from.begin().unwrap()).unwrap();
        host.fail(Leaf::ExportMem, 1, FOR_EVER, busy());
        host.fail(Leaf::ExportUnblockw, 1, FOR_EVER, busy());
        assert_eq!(from.pages(0).err(), Some(Error::Busy));
    }
    host.heal();
    let staged = w.staged;
    let old = std::mem::replace(w, World::of_pair(staged, pair));
    old.end(true);
}

/// A world with that in the way, and what the move says.
fn refused((name, _, arrange, then): &Case, staged: bool) -> (World, String) {
    let mut world = World::new(staged);
    arrange(&mut world);
    let (tds, steps) = (world.tds(), world.steps());
    let said = match (world.attempt(), then) {
        (Ok(()), Done) => return (world, "done".into()),
        (Ok(()), _) => panic!("{name}: it moves"),
        (Err(error), _) => in_words(error),
    };
    assert_eq!(world.tds(), tds, "{name}");
    if !staged {
        assert_eq!(world.steps(), steps, "{name}");
    }
    (world, said)
}

/// What the move says, where the guest goes on, and where after another try.
fn outcome(case: &Case, staged: bool) -> [String; 3] {
    let (mut world, said) = refused(case, staged);
    world.take_back();
    let at = world.runs_at();
    world.end(true);
    let (mut world, _) = refused(case, staged);
    match case.3 {
        Again(undo) => undo(&mut world),
        OtherTarget => world.renew_target(waiting(&world.host)),
        Never | Done => {}
    }
    let then = match case.3 {
        Never => "no way",
        Done => "",
        Again(_) | OtherTarget => {
            world.attempt().unwrap();
            world.runs_at()
        }
    };
    world.end(false);
    [said, at.into(), then.into()]
}

#[test]
fn whatever_stands_in_the_way_the_guest_goes_on_in_one_vm() {
    let mut table = String::from(
        "| in the way | moves | the move says | the guest goes on at | tried again without it, at |\n|---|---|---|---|---|\n",
    );
    for case in CASES {
        let mut rows: Vec<([String; 3], Vec<&str>)> = Vec::new();
        for staged in case.1 {
            let (outcome, how) = (outcome(case, *staged), ["as a call", "by token"]);
            let how = how[usize::from(*staged)];
            match rows.iter_mut().find(|row| row.0 == outcome) {
                Some((_, all)) => all.push(how),
                None => rows.push((outcome, vec![how])),
            }
        }
        for ([said, at, then], how) in rows {
            let (name, how) = (case.0, how.join(", "));
            table += &format!("| {name} | {how} | {said} | {at} | {then} |\n");
        }
    }
    document("td-move-refusals", &table);
}

#[test]
fn while_a_token_is_traded_it_is_good_for_nobody_else_and_not_taken_back() {
    for trade_succeeds in [true, false] {
        let mut world = World::new(true);
        world.send().unwrap();
        let (token, table) = (world.token.unwrap(), Arc::clone(&world.table));
        let mut third = waiting(&world.host);
        let World { from, to, old, .. } = &mut world;
        let traded = to.local_receive(&table, &token, &mut |_| {
            let other = third.local_receive(&table, &token, &mut |_| Ok(()));
            assert!(matches!(other, Err(Error::NotFound(..))), "{other:?}");
            assert_eq!(from.local_cancel(), Err(Error::Busy));
            assert_eq!(TdxVm::move_context(from, &mut third), Err(Error::Busy));
            let run = old.as_mut().unwrap().vcpu_run();
            assert_eq!(run, Err(Error::Poisoned));
            if trade_succeeds {
                Ok(())
            } else {
                Err(Error::Again)
            }
        });
        assert_eq!(traded.is_ok(), trade_succeeds);
        world.take_back();
        let side = if trade_succeeds { "target" } else { "source" };
        assert_eq!(world.runs_at(), side);
        world.others.push(third);
        world.end(trade_succeeds);
    }
}

#[test]
fn a_source_does_not_buy_its_own_guest_and_the_token_stays_good() {
    let mut world = World::new(true);
    world.send().unwrap();
    let (token, table) = (world.token.unwrap(), Arc::clone(&world.table));
    let own = world.from.local_receive(&table, &token, &mut |_| Ok(()));
    assert_eq!(own.map(drop).map_err(in_words), Err("`Invalid(Vm)`".into()));
    world.attempt().unwrap();
    assert_eq!(world.runs_at(), "target");
    world.end(false);
}
