//! Each SEAMCALL of a post-copy fails in every plausible way, and each of its messages is lost, late, repeated, changed
//! or cut: the guest runs on exactly one side, or is reported lost with the reason by both, and both accounts add
//! up. `BLESS=1` rewrites the tables in docs/migration.md.

mod common;
mod migrate_support;

use std::sync::atomic::Ordering;

use common::audit::mirror_equals_secure_ept;
use kvm_ops_core::{Error, Gfn, Step, VcpuOps, VmOps};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::migrate::{Flow, Phase, StreamKey};
use migrate_support::link::Plan;
use migrate_support::matrix::{
    Outcomes, SIDES, document_calls, document_messages, failures, owner_after, word,
};
use migrate_support::stream::{Ended, Ends, ends, over_a_link, over_a_watched_link};
use migrate_support::{PAGES, Pair, private_pages};

/// A call from the start token on: side, leaf, and which of its calls.
const CALLS: [(usize, Leaf, u64); 9] = [
    // The start token.
    (0, Leaf::ExportTrack, 1),
    (0, Leaf::ExportMem, 1),
    (0, Leaf::ExportMem, 2),
    (1, Leaf::ImportTrack, 1),
    (1, Leaf::ImportCommit, 1),
    (1, Leaf::MemSeptAdd, 1),
    (1, Leaf::ImportMem, 1),
    (1, Leaf::ImportMem, 2),
    (1, Leaf::ImportEnd, 1),
];

/// A frame that the guest waits for and that the source never had.
const ABSENT: Gfn = Gfn::new(PAGES + 9);
/// One that it waits for and that comes.
const WANTED: Gfn = Gfn::new(7);

/// The most links of a session.
const LINKS: usize = 4;

fn pair() -> (Pair, u64) {
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES + 7).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    for host in &pair.hosts {
        // No other thread is at a host here: waits for its locks are time lost.
        host.0.threads.store(false, Ordering::Relaxed);
    }
    (pair, before)
}

fn post_copy_ends(pair: &Pair, key: Option<StreamKey>) -> Ends<'_> {
    let (sender, receiver) = ends(pair, 0, key);
    (sender.with_post_copy(), receiver.with_post_copy())
}

/// One link. The guest touches two pages as soon as it may run.
fn link(pair: &Pair, both: &mut Ends<'_>, plans: [Option<Plan>; 2]) -> ([Ended; 2], [Vec<u8>; 2]) {
    let (target, mut touched) = (&pair.target, false);
    over_a_watched_link(both, plans, &mut |_| Flow::GoOn, &mut |progress| {
        if progress.phase == Phase::PostCopy && !touched {
            touched = true;
            for gfn in [WANTED, ABSENT] {
                // It waits, or the page is there.
                let _ = target.pre_fault_memory(gfn, 1);
            }
        }
        Flow::GoOn
    })
}

/// Goes on over further links where the first has broken. Returns the number of those that it took.
fn settle(both: &mut Ends<'_>, what: &str) -> usize {
    for links in 1..LINKS {
        match both.0.progress().phase {
            Phase::Done | Phase::Cancelled | Phase::Lost => return links,
            phase if phase < Phase::Committed && !both.1.can_go_on() => {
                both.0.cancel().unwrap();
                return links;
            }
            _ => {}
        }
        let _ = over_a_link(both, [None, None]);
    }
    let phase = both.0.progress().phase;
    assert!(
        matches!(phase, Phase::Done | Phase::Cancelled | Phase::Lost),
        "{what}: {phase}"
    );
    LINKS
}

/// The guest is on exactly one side and goes on there, or both sides say that it is lost; nothing leaks.
fn owner(mut pair: Pair, phase: Phase, before: u64, what: &str) -> &'static str {
    let runs = [&pair.source, &pair.target].map(|vm| vm.step() == Step::Runnable);
    let owner = match (phase, runs) {
        (Phase::Done, [false, true]) => {
            let mut there = private_pages(&pair.target);
            // It touched one that was never there.
            there.retain(|gfn| *gfn != ABSENT);
            assert_eq!(there, private_pages(&pair.source), "{what}");
            mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
            assert_eq!(pair.run_target(), before + 1, "{what}");
            "target"
        }
        (Phase::Cancelled, [true, false]) => {
            pair.run_source(before + 2 * PAGES).unwrap();
            drop(pair.source.outgoing(1).unwrap());
            mirror_equals_secure_ept(&pair.hosts[0], &pair.source);
            "source"
        }
        (Phase::Lost, [false, false]) => {
            assert_eq!(pair.vcpus[0].vcpu_run().unwrap_err(), Error::Poisoned);
            for vm in [&pair.source, &pair.target] {
                let why = vm.explain(Error::Poisoned).to_string();
                assert!(why.contains("destroy"), "{what}: {why}");
            }
            "lost"
        }
        other => panic!("{what}: {other:?}"),
    };
    pair.destroy();
    owner
}

#[test]
fn each_call_fails_in_every_plausible_way() {
    let rows = CALLS.map(|(side, leaf, nth)| {
        let mut outcomes = Outcomes::new();
        for (name, answer, times) in failures(side, leaf) {
            let what = format!("{}, call {nth} of side {side}, {name}", leaf.name());
            let (pair, before) = pair();
            let mut both = post_copy_ends(&pair, None);
            pair.hosts[side].fail(leaf, nth, times, answer);
            let (ended, _) = link(&pair, &mut both, [None, None]);
            pair.hosts.iter().for_each(|host| {
                host.heal();
            });
            let links = settle(&mut both, &what);
            let phase = both.0.progress().phase;
            drop(both);
            let [sent, received] = ended.each_ref().map(word);
            let end = owner_after(owner(pair, phase, before, &what), links);
            outcomes
                .entry([sent, received, end])
                .or_default()
                .push(name);
        }
        let which = match nth {
            1 => String::new(),
            n => format!(", call {n}"),
        };
        (format!("{}: {}{which}", SIDES[side], leaf.name()), outcomes)
    });
    document_calls("post-copy", rows.into());
}

#[test]
fn each_message_lost_late_twice_changed_and_cut() {
    let (honest, before) = pair();
    let mut both = post_copy_ends(&honest, None);
    let (ended, frames) = link(&honest, &mut both, [None, None]);
    assert!(ended.iter().all(Result::is_ok), "{ended:?}");
    drop(both);
    assert_eq!(owner(honest, Phase::Done, before, "honest"), "target");
    for kind in [19, 20, 21, 22, 23] {
        let came = frames.iter().flatten().any(|came| *came == kind);
        assert!(came, "no message of kind {kind} was tried");
    }
    document_messages("post-copy-messages", &frames, |plans, key, what| {
        let (pair, before) = pair();
        let mut both = post_copy_ends(&pair, key);
        let _ = link(&pair, &mut both, plans);
        let links = settle(&mut both, what);
        let phase = both.0.progress().phase;
        drop(both);
        owner_after(owner(pair, phase, before, what), links)
    });
}
