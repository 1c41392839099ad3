//! An SNP guest carried over a byte stream, and everything that can happen to the messages.
//!
//! `BLESS=1 cargo test -p kvm-ops-sev --test carry_stream` writes the table in docs/migration.md.

mod common;
#[path = "../../tdx/tests/migrate_support/link.rs"]
#[allow(dead_code, unreachable_pub)]
mod link;
mod swap_support;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::thread;

use common::*;
use embedded_io_adapters::std::FromStd;
use kvm_ops_core::guest::Script;
use kvm_ops_core::{Error, Gfn, Hpa, Step, VcpuOps, VmOps};
use kvm_ops_sev::migrate::{
    Flow, MigrateError, MigrationAgent, Owner, Phase, ProtocolError, Reason, SnpReceiver,
    SnpSender, StreamKey,
};
use kvm_ops_sev::{SevVcpu, SevVm};
use kvm_ops_sim::SimHost;
use link::{Fate, Link, Plan};
use swap_support::agent::{Agent, agents, charge_of};
use swap_support::{FileStore, contents, leaves_by, waiting};

/// Frames enough for two pages of records and one above them.
const PAGES: u64 = 70;
const KEY: StreamKey = StreamKey::new([7; 32]);

/// Names of the kinds of records.
const KINDS: [&str; 13] = [
    "", "Hello", "Resume", "Ready", "Image", "ImageEnd", "Page", "Prepare", "Prepared", "Commit",
    "Done", "Cancel", "Refuse",
];

fn random(out: &mut [u8]) -> kvm_ops_core::Result<()> {
    out.fill(3);
    Ok(())
}

/// A platform with its agent, a VM and its vCPU, and a store.
struct Side {
    host: SimHost,
    agent: Agent<SimHost>,
    vm: SevVm<SimHost>,
    vcpu: SevVcpu<SimHost>,
    store: FileStore,
    _ram: Ram,
}

/// A source with a guest and a target for it, and the guest's contents.
fn sides(pages: u64) -> ([Side; 2], Vec<Vec<u8>>) {
    let (here, there) = (host(41), host(42));
    let (agent, peer) = agents(&here, &there);
    let ram = [(), ()].map(|()| Ram::new(1 << 20));
    let (vm, vcpu) = charge_of(&here, &agent.vm, &ram[0], pages);
    let (to, new) = waiting(&there, &ram[1], swap_support::POLICY);
    let before = contents(&here, &vm, pages);
    let [one, other] = ram;
    let side = |host, agent, vm, vcpu, ram| Side {
        host,
        agent,
        vm,
        vcpu,
        store: FileStore::new(),
        _ram: ram,
    };
    let sides = [
        side(here, agent, vm, vcpu, one),
        side(there, peer, to, new, other),
    ];
    (sides, before)
}

type Ended = Result<(), MigrateError>;

/// Both ends over one link. Returns what they say, and the kinds of the frames that each wrote.
fn over(
    sender: &mut SnpSender<'_, SimHost>,
    receiver: &mut SnpReceiver<'_, SimHost>,
    agents: [&mut Agent<SimHost>; 2],
    plans: [Option<Plan>; 2],
) -> ([Ended; 2], [Vec<u8>; 2]) {
    let [near, far] = Link::pair(plans);
    let [agent, peer] = agents;
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let mut link = FromStd::new(far);
            let ended = receiver.run(&mut link, peer, &mut |_| Flow::GoOn);
            (ended.map(drop), link.into_inner().kinds().to_vec())
        });
        let mut link = FromStd::new(near);
        let sent = sender.run(&mut link, agent, &mut |_| Flow::GoOn);
        let kinds = link.into_inner().kinds().to_vec();
        let (received, answers) = receiving.join().unwrap();
        ([sent.map(drop), received], [kinds, answers])
    })
}

/// Takes the guest back, and tells the target if it listens.
fn cancelled(sender: &mut SnpSender<'_, SimHost>, receiver: &mut SnpReceiver<'_, SimHost>) {
    let [near, far] = Link::pair([None, None]);
    thread::scope(|scope| {
        let listening = scope.spawn(move || {
            let mut link = FromStd::new(far);
            let _ = receiver.run(&mut link, &mut NoAgent, &mut |_| Flow::GoOn);
        });
        sender.cancel(Some(&mut FromStd::new(near))).unwrap();
        listening.join().unwrap();
    });
}

struct NoAgent;

impl MigrationAgent for NoAgent {
    fn export(&mut self, _: Hpa) -> kvm_ops_core::Result<Vec<u8>> {
        Err(Error::Busy)
    }

    fn import(&mut self, _: Hpa, _: &[u8]) -> kvm_ops_core::Result<()> {
        Err(Error::Busy)
    }
}

/// The guest runs at exactly one side with its contents, and both sides give all back.
fn exactly_one_runs_it(mut sides: [Side; 2], owner: Owner, before: &[Vec<u8>]) {
    let [from, to] = &mut sides;
    let (side, pages) = match owner {
        Owner::Source => (&*from, before.len() as u64),
        Owner::Target => (&*to, before.len() as u64),
    };
    assert_eq!(contents(&side.host, &side.vm, pages), before);
    match owner {
        Owner::Source => {
            assert!(leaves_by(&mut from.vcpu, 0x81));
            assert!(to.vcpu.vcpu_run().is_err());
        }
        Owner::Target => {
            load(&mut to.vcpu, Script::new().output(0x82, &[1]));
            assert!(leaves_by(&mut to.vcpu, 0x82));
            assert_eq!(from.vcpu.vcpu_run().err(), Some(Error::Poisoned));
        }
    }
    all_given_back(sides);
}

fn all_given_back(sides: [Side; 2]) {
    for side in sides {
        drop(side.vcpu);
        free_clean(side.vm);
        side.agent.free();
        nothing_left(&side.host);
    }
}

/// A journey in which one message meets a fate; what goes wrong is settled as an embedder does, over one more link.
fn journey(pages: u64, plans: [Option<Plan>; 2]) -> (String, [Vec<u8>; 2]) {
    let (mut sides, before) = sides(pages);
    let [from, to] = &mut sides;
    let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
    let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, KEY, [9; 16]);
    let agents = [&mut from.agent, &mut to.agent];
    let ([sent, _], kinds) = over(&mut sender, &mut receiver, agents, plans);
    let mut how = "";
    if let Err(error) = sent {
        if error.can_go_on() || sender.progress().phase == Phase::Committed {
            how = ", next link";
            let agents = [&mut from.agent, &mut to.agent];
            let (ended, _) = over(&mut sender, &mut receiver, agents, [None, None]);
            assert_eq!(ended, [Ok(()), Ok(())], "after {error}");
        } else {
            cancelled(&mut sender, &mut receiver);
        }
    }
    let owner = sender.progress().phase.owner();
    drop((sender, receiver));
    exactly_one_runs_it(sides, owner, &before);
    (format!("{owner}{how}"), kinds)
}

/// A journey whose link is cut in this message, and never replaced.
fn journey_without_another_link(pages: u64, side: usize, nth: usize) -> &'static str {
    let (mut sides, before) = sides(pages);
    let [from, to] = &mut sides;
    let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
    let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, KEY, [9; 16]);
    let mut plans = [None, None];
    plans[side] = Some(Plan {
        nth,
        fate: Fate::Cut,
    });
    let agents = [&mut from.agent, &mut to.agent];
    let ([sent, _], _) = over(&mut sender, &mut receiver, agents, plans);
    assert!(sent.is_err());
    if sender.progress().phase < Phase::Committed {
        sender.cancel::<FromStd<Link>>(None).unwrap();
    }
    let (owner, here) = (sender.progress().phase.owner(), receiver.progress().phase);
    drop((sender, receiver));
    if owner == Owner::Target && here != Phase::Done {
        let both = [&mut from.vcpu, &mut to.vcpu].map(|vcpu| vcpu.vcpu_run().err());
        assert_eq!(both, [Some(Error::Poisoned); 2]);
        all_given_back(sides);
        return "lost";
    }
    exactly_one_runs_it(sides, owner, &before);
    match owner {
        Owner::Source => "source",
        Owner::Target => "target",
    }
}

#[test]
fn a_guest_comes_over_a_stream() {
    let (owner, _) = journey(PAGES, [None, None]);
    assert_eq!(owner, "target");
}

/// The messages of a journey, each named and with its number among those of its end.
fn messages(kinds: &[Vec<u8>; 2]) -> Vec<(usize, usize, String)> {
    let mut all = Vec::new();
    for (side, kinds) in kinds.iter().enumerate() {
        for (nth, kind) in kinds.iter().enumerate() {
            let same = kinds[..nth].iter().filter(|before| *before == kind).count();
            let number = match same {
                0 => String::new(),
                same => format!(" {}", same + 1),
            };
            let end = ["source", "target"][side];
            all.push((
                side,
                nth,
                format!("{end}: {}{number}", KINDS[usize::from(*kind)]),
            ));
        }
    }
    all
}

#[test]
fn whatever_happens_to_a_message_the_guest_runs_on_exactly_one_side() {
    // The guest has 3 pages, a page of secrets, a VMSA and a page of records.
    const FEW: u64 = 3;
    let (_, kinds) = journey(FEW, [None, None]);
    let mut table = String::from(
        "| message | lost | late | twice | changed | cut | cut, no other link |\n|---|---|---|---|---|---|---|\n",
    );
    for (side, nth, name) in messages(&kinds) {
        let met = |fate| {
            let mut plans = [None, None];
            plans[side] = Some(Plan { nth, fate });
            journey(FEW, plans).0
        };
        let changed: BTreeSet<_> = [0, 30, 100].map(|at| met(Fate::Changed(at))).into();
        let changed = changed.into_iter().collect::<Vec<_>>().join(" or ");
        let [lost, late, twice, cut] = [Fate::Lost, Fate::Late, Fate::Twice, Fate::Cut].map(met);
        let alone = journey_without_another_link(FEW, side, nth);
        writeln!(
            table,
            "| {name} | {lost} | {late} | {twice} | {changed} | {cut} | {alone} |"
        )
        .unwrap();
    }
    swap_support::compare_table("snp-messages", &table);
}

#[test]
fn a_source_that_finds_no_other_link_runs_its_guest_on_and_the_target_never_does() {
    for (side, nth) in [(0, 2), (0, 8), (1, 1)] {
        let (mut sides, before) = sides(3);
        let [from, to] = &mut sides;
        let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
        let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, KEY, [9; 16]);
        let mut plans = [None, None];
        plans[side] = Some(Plan {
            nth,
            fate: Fate::Cut,
        });
        let agents = [&mut from.agent, &mut to.agent];
        let ([sent, _], _) = over(&mut sender, &mut receiver, agents, plans);
        assert!(sent.is_err_and(|error| error.is_of_the_link()));
        sender.cancel::<FromStd<Link>>(None).unwrap();
        let phase = receiver.progress().phase;
        assert!(matches!(phase, Phase::Stopped | Phase::Prepared), "{phase}");
        drop((sender, receiver));
        exactly_one_runs_it(sides, Owner::Source, &before);
    }
}

#[test]
fn a_target_that_the_fenced_source_told_nothing_takes_the_guest_over() {
    let (mut sides, before) = sides(3);
    let [from, to] = &mut sides;
    let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
    let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, KEY, [9; 16]);
    assert_eq!(
        receiver.take_over_from_fenced_source(),
        Err(MigrateError::WrongPhase)
    );
    // Hello, image, six pages, Prepare: then Commit is cut.
    let commit = Plan {
        nth: 9,
        fate: Fate::Cut,
    };
    let agents = [&mut from.agent, &mut to.agent];
    let _ = over(&mut sender, &mut receiver, agents, [Some(commit), None]);
    assert_eq!(sender.progress().phase, Phase::Committed);
    assert_eq!(
        sender.cancel::<FromStd<Link>>(None),
        Err(MigrateError::WrongPhase)
    );
    receiver.take_over_from_fenced_source().unwrap();
    drop((sender, receiver));
    exactly_one_runs_it(sides, Owner::Target, &before);
}

#[test]
fn a_guest_that_does_not_fit_is_not_stopped() {
    let (mut sides, before) = sides(3);
    let [from, to] = &mut sides;
    let slot = to._ram.slot(1, RAM + (1 << 30));
    to.vm.set_memory_slot(&slot).unwrap();
    let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
    let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, KEY, [9; 16]);
    let agents = [&mut from.agent, &mut to.agent];
    let ([sent, received], _) = over(&mut sender, &mut receiver, agents, [None, None]);
    for ended in [sent, received] {
        match ended {
            Err(MigrateError::Refused(refusal)) => assert_eq!(refusal.reason, Reason::Shape),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(sender.progress().phase, Phase::New);
    drop((sender, receiver));
    assert!(from.store.names().is_empty());
    exactly_one_runs_it(sides, Owner::Source, &before);
}

#[test]
fn ends_with_different_keys_do_not_understand_each_other() {
    let (mut sides, before) = sides(3);
    let [from, to] = &mut sides;
    let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
    let other = StreamKey::new([8; 32]);
    let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, other, [9; 16]);
    let agents = [&mut from.agent, &mut to.agent];
    let ([sent, received], _) = over(&mut sender, &mut receiver, agents, [None, None]);
    assert!(matches!(sent, Err(MigrateError::Frame(_))), "{sent:?}");
    assert!(
        matches!(received, Err(MigrateError::Frame(_))),
        "{received:?}"
    );
    drop((sender, receiver));
    exactly_one_runs_it(sides, Owner::Source, &before);
}

#[test]
fn either_watcher_cancels_and_the_guest_runs_on_at_its_source() {
    for (side, phase) in [
        (0, Phase::Stopped),
        (0, Phase::Prepared),
        (1, Phase::Stopped),
    ] {
        // Enough pages for a target to tell of some.
        let (mut sides, before) = sides(200);
        let [from, to] = &mut sides;
        let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
        let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, KEY, [9; 16]);
        let [near, far] = Link::pair([None, None]);
        let watcher = |own| {
            move |progress: &kvm_ops_sev::migrate::Progress| match own == side
                && progress.phase == phase
            {
                true => Flow::Cancel,
                false => Flow::GoOn,
            }
        };
        let (agent, peer) = (&mut from.agent, &mut to.agent);
        let (sent, received) = thread::scope(|scope| {
            let receiver = &mut receiver;
            let receiving =
                scope.spawn(move || receiver.run(&mut FromStd::new(far), peer, &mut watcher(1)));
            let sent = sender.run(&mut FromStd::new(near), agent, &mut watcher(0));
            (sent, receiving.join().unwrap())
        });
        assert_eq!(received.err(), Some(MigrateError::Cancelled));
        match side {
            0 => assert_eq!(sent.err(), Some(MigrateError::Cancelled)),
            _ => {
                assert!(sent.is_err());
                sender.cancel::<FromStd<Link>>(None).unwrap();
            }
        }
        drop((sender, receiver));
        exactly_one_runs_it(sides, Owner::Source, &before);
    }
}

#[test]
fn a_target_that_cannot_take_the_guest_says_why_and_it_runs_on_at_its_source() {
    let (mut sides, before) = sides(3);
    let [from, to] = &mut sides;
    let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
    let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, KEY, [9; 16]);
    let [near, far] = Link::pair([None, None]);
    let agent = &mut from.agent;
    let (sent, received) = thread::scope(|scope| {
        let receiver = &mut receiver;
        let receiving = scope
            .spawn(move || receiver.run(&mut FromStd::new(far), &mut NoAgent, &mut |_| Flow::GoOn));
        let sent = sender.run(&mut FromStd::new(near), agent, &mut |_| Flow::GoOn);
        (sent, receiving.join().unwrap())
    });
    let failed = MigrateError::Failed {
        operation: "arrive",
        error: Error::Busy,
    };
    assert_eq!(received.err(), Some(failed));
    match sent {
        Err(MigrateError::Refused(refusal)) => assert_eq!(refusal.reason, Reason::Host),
        other => panic!("{other:?}"),
    }
    // It takes no more.
    let again = over(
        &mut sender,
        &mut receiver,
        [&mut from.agent, &mut to.agent],
        [None, None],
    );
    assert_eq!(again.0[1], Err(ProtocolError::Session.into()));
    sender.cancel::<FromStd<Link>>(None).unwrap();
    assert_eq!(to.vm.step(), Step::Initialized);
    drop((sender, receiver));
    exactly_one_runs_it(sides, Owner::Source, &before);
}

#[test]
fn a_link_that_breaks_between_pages_is_replaced_and_what_came_is_not_sent_again() {
    let (mut sides, before) = sides(PAGES);
    let [from, to] = &mut sides;
    let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
    let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, KEY, [9; 16]);
    let cut = Plan {
        nth: 40,
        fate: Fate::Cut,
    };
    let agents = [&mut from.agent, &mut to.agent];
    let ([sent, _], _) = over(&mut sender, &mut receiver, agents, [Some(cut), None]);
    assert!(sent.is_err_and(|error| error.is_of_the_link()));
    let agents = [&mut from.agent, &mut to.agent];
    let (ended, kinds) = over(&mut sender, &mut receiver, agents, [None, None]);
    assert_eq!(ended, [Ok(()), Ok(())]);
    let pages = kinds[0]
        .iter()
        .filter(|kind| KINDS[usize::from(**kind)] == "Page");
    // Two pages beside the guest's own, and three of records; 38 came before the cut.
    assert_eq!(pages.count() as u64, PAGES + 2 + 3 - 38);
    assert_eq!(receiver.progress().pages, PAGES + 2 + 3);
    drop((sender, receiver));
    exactly_one_runs_it(sides, Owner::Target, &before);
}

#[test]
fn a_guest_with_single_pages_out_departs_with_them() {
    let (mut sides, before) = sides(PAGES);
    let [from, to] = &mut sides;
    let out = from.vm.swap_out(Gfn::new(RAM >> 12), 5, &mut from.store);
    assert_eq!(out, Ok(5));
    let mut sender = SnpSender::new(&from.vm, &mut from.store, KEY, &mut random).unwrap();
    let mut receiver = SnpReceiver::new(&to.vm, &mut to.store, KEY, [9; 16]);
    let agents = [&mut from.agent, &mut to.agent];
    let (ended, _) = over(&mut sender, &mut receiver, agents, [None, None]);
    assert_eq!(ended, [Ok(()), Ok(())]);
    drop((sender, receiver));
    exactly_one_runs_it(sides, Owner::Target, &before);
}
