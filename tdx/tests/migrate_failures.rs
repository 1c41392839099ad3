//! Each SEAMCALL of a migration fails in every plausible way, one at a time: the guest runs on exactly one
//! side, or is reported lost with the reason, and both accounts add up. `BLESS=1` rewrites the table in
//! docs/migration.md.

mod common;
mod migrate_support;

use std::sync::atomic::Ordering;

use common::Injected;
use common::audit::mirror_equals_secure_ept;
use kvm_ops_core::{Error, Step, VmOps};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::migrate::{Flow, MigrateError, Phase, Progress, Receiver};
use kvm_ops_tdx::status::{Class, operand};
use migrate_support::matrix::{Failure, Outcomes, SIDES, document_calls, failures, word};
use migrate_support::stream::{Ended, over_a_link, over_a_watched_link, sends};
use migrate_support::{PAGES, Pair};

/// A call of the migration: side, leaf, and which of its calls.
const CALLS: [(usize, Leaf, u64); 23] = [
    (0, Leaf::MigStreamCreate, 1),
    (0, Leaf::ExportStateImmutable, 1),
    (0, Leaf::ExportBlockw, 1),
    (0, Leaf::MemTrack, 1),
    (0, Leaf::ExportMem, 1),
    (0, Leaf::ExportTrack, 1),
    (0, Leaf::ExportPause, 1),
    (0, Leaf::ExportStateTd, 1),
    (0, Leaf::ExportStateVp, 1),
    // The start token.
    (0, Leaf::ExportTrack, 2),
    (1, Leaf::MigStreamCreate, 1),
    (1, Leaf::ImportStateImmutable, 1),
    (1, Leaf::MemSeptAdd, 1),
    (1, Leaf::MemSeptAdd, 3),
    (1, Leaf::ImportMem, 1),
    (1, Leaf::ImportTrack, 1),
    (1, Leaf::ImportStateTd, 1),
    (1, Leaf::VpCreate, 1),
    (1, Leaf::VpAddcx, 1),
    (1, Leaf::VpAddcx, 4),
    (1, Leaf::ImportStateVp, 1),
    (1, Leaf::ImportTrack, 2),
    (1, Leaf::ImportEnd, 1),
];

/// Why a migration takes its way back.
#[derive(Clone, Copy)]
enum Cause {
    /// It does not.
    None,
    /// The source's embedder cancels when only the start token is left.
    Cancelled,
    /// A call of that side was refused.
    Refused(usize, Leaf),
}

/// A call of the way back: side, leaf, and what leads there.
const WAY_BACK: [(usize, Leaf, Cause); 5] = [
    (0, Leaf::ExportAbort, Cause::Cancelled),
    (0, Leaf::ExportRestore, Cause::Cancelled),
    // Pages that are blocked for writing, and were not exported.
    (0, Leaf::ExportUnblockw, Cause::Refused(0, Leaf::ExportMem)),
    (1, Leaf::ImportAbort, Cause::Refused(1, Leaf::ImportEnd)),
    // With the target's token.
    (0, Leaf::ExportAbort, Cause::Refused(1, Leaf::ImportEnd)),
];

/// The end of a migration.
struct Outcome {
    sent: String,
    received: String,
    owner: &'static str,
}

/// One migration with whatever is armed; heals before it looks at the end.
fn attempt(pair: &Pair, cancels: bool) -> (Ended, Ended, Phase) {
    let refused = |operation, error| Err(MigrateError::Failed { operation, error });
    let ready = Err(MigrateError::WrongPhase);
    let from = match pair.source.outgoing(1) {
        Ok(from) => from,
        Err(error) => return (refused("outgoing", error), ready, Phase::Cancelled),
    };
    let to = match pair.target.incoming(1) {
        Ok(to) => to,
        Err(error) => return (ready, refused("incoming", error), Phase::Cancelled),
    };
    let mut both = (sends(from, 1), Receiver::new(to));
    let cancel = &mut |progress: &Progress| match cancels && progress.phase == Phase::Prepared {
        true => Flow::Cancel,
        false => Flow::GoOn,
    };
    let ([sent, received], _) =
        over_a_watched_link(&mut both, [None, None], cancel, &mut |_| Flow::GoOn);
    pair.hosts.iter().for_each(|host| {
        host.heal();
    });
    if both.0.progress().phase == Phase::Committed && both.1.can_go_on() {
        let _ = over_a_link(&mut both, [None, None]);
    }
    let phase = both.0.progress().phase;
    (sent, received, phase)
}

fn case(
    side: usize,
    leaf: Leaf,
    nth: u64,
    cause: Cause,
    (name, answer, times): Failure,
) -> Outcome {
    let what = format!("{} of side {side}, {name}", leaf.name());
    let mut pair = Pair::on_two(false);
    pair.run_source(PAGES + 7).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    for host in &pair.hosts {
        // No other thread is at a host here: waits for its locks are time lost.
        host.0.threads.store(false, Ordering::Relaxed);
    }
    if let Cause::Refused(side, leaf) = cause {
        let refusal = Class::OPERAND_INVALID.with(operand::R8).get();
        pair.hosts[side].fail(leaf, 1, 1, Injected::Status(refusal));
    }
    pair.hosts[side].fail(leaf, nth, times, answer);
    let (sent, received, phase) = attempt(&pair, matches!(cause, Cause::Cancelled));
    pair.hosts.iter().for_each(|host| {
        host.heal();
    });
    let runs_here = pair.source.step() == Step::Runnable;
    let runs_there = pair.target.step() == Step::Runnable;
    assert!(
        !(runs_here && runs_there),
        "{what}: the guest is on both sides"
    );
    let owner = match (runs_here, runs_there) {
        (true, _) => {
            if let Cause::None = cause {
                mirror_equals_secure_ept(&pair.hosts[0], &pair.source);
            }
            pair.run_source(before + 2 * PAGES).unwrap();
            // The next migration brings back what is left in a state of this one.
            drop(pair.source.outgoing(1).unwrap());
            mirror_equals_secure_ept(&pair.hosts[0], &pair.source);
            "source"
        }
        (_, true) => {
            assert_eq!(phase, Phase::Done, "{what}");
            mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
            assert_eq!(pair.run_target(), before + 1, "{what}");
            "target"
        }
        _ => {
            let why = pair.source.explain(Error::Poisoned).to_string();
            assert!(why.contains("destroy"), "{what}: {why}");
            "lost"
        }
    };
    pair.destroy();
    Outcome {
        sent: word(&sent),
        received: word(&received),
        owner,
    }
}

/// All failures of a call.
fn outcomes(side: usize, leaf: Leaf, nth: u64, cause: Cause) -> Outcomes {
    let mut outcomes = Outcomes::new();
    for failure in failures(side, leaf) {
        let Outcome {
            sent,
            received,
            owner,
        } = case(side, leaf, nth, cause, failure);
        let key = [sent, received, owner.to_owned()];
        outcomes.entry(key).or_default().push(failure.0);
    }
    outcomes
}

#[test]
fn each_call_fails_in_every_plausible_way_and_the_guest_is_on_one_side() {
    let rows = CALLS.map(|(side, leaf, nth)| {
        let which = match nth {
            1 => String::new(),
            n => format!(", call {n}"),
        };
        let call = format!("{}: {}{which}", SIDES[side], leaf.name());
        (call, outcomes(side, leaf, nth, Cause::None))
    });
    document_calls("failures", rows.into());
}

#[test]
fn each_call_of_the_way_back_fails_and_the_guest_is_on_one_side() {
    let rows = WAY_BACK.map(|(side, leaf, cause)| {
        let why = match cause {
            Cause::None => String::new(),
            Cause::Cancelled => ", cancelled".into(),
            Cause::Refused(_, first) => format!(", {} refused before", first.name()),
        };
        let call = format!("{}: {}{why}", SIDES[side], leaf.name());
        (call, outcomes(side, leaf, 1, cause))
    });
    document_calls("way-back", rows.into());
}
