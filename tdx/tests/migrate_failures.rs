//! Each SEAMCALL of a migration fails in every plausible way, one at a time: the guest runs on exactly one
//! side, or is reported lost with the reason, and both accounts add up. `BLESS=1` rewrites the table in
//! docs/migration.md.

mod common;
mod migrate_support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use common::audit::mirror_equals_secure_ept;
use common::{Injected, TestHost};
use embedded_io_adapters::std::FromStd;
use kvm_ops_core::{Error, Field, Step, VmOps};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::migrate::{Flow, MigrateError, Phase, Progress, Receiver, SendLimits, Sender};
use kvm_ops_tdx::status::{Class, operand};
use migrate_support::link::Link;
use migrate_support::{PAGES, Pair};

const FOR_EVER: u64 = u64::MAX;
/// Bit 61 of a status word.
const FATAL: u64 = 1 << 61;

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

/// The ways in which a leaf can fail: name, answer, times.
fn failures(side: usize, leaf: Leaf) -> Vec<(&'static str, Injected, u64)> {
    let status = |class: Class, detail| Injected::Status(class.with(detail).get());
    let mut all = vec![
        (
            "OPERAND_INVALID",
            status(Class::OPERAND_INVALID, operand::R8),
            1,
        ),
        (
            "OPERAND_BUSY once",
            status(Class::OPERAND_BUSY, operand::OP_STATE),
            1,
        ),
        (
            "OPERAND_BUSY for ever",
            status(Class::OPERAND_BUSY, operand::OP_STATE),
            FOR_EVER,
        ),
        (
            "not called",
            Injected::Port(Error::Invalid(Field::Cpu, 99)),
            1,
        ),
    ];
    if matches!(
        leaf,
        Leaf::ExportStateImmutable | Leaf::ImportStateImmutable
    ) {
        all.push(("RND_NO_ENTROPY once", status(Class::RND_NO_ENTROPY, 0), 1));
        all.push((
            "RND_NO_ENTROPY for ever",
            status(Class::RND_NO_ENTROPY, 0),
            FOR_EVER,
        ));
    }
    let takes_a_bundle = leaf.name().starts_with("TDH.IMPORT.") && leaf != Leaf::ImportEnd;
    if side == 1 && takes_a_bundle && leaf != Leaf::ImportAbort {
        let mac = Class::OPERAND_INVALID.with(operand::R8).get() | FATAL;
        all.push(("fatal", Injected::Status(mac), 1));
    }
    all
}

/// The end of a migration.
struct Outcome {
    sent: String,
    received: String,
    owner: &'static str,
}

fn word<T>(ended: &Result<T, MigrateError>) -> String {
    match ended {
        Ok(_) => "done".into(),
        Err(MigrateError::Failed { operation, error }) => match error {
            Error::Firmware(_) => format!("{operation}: the status"),
            error => format!("{operation}: {error}"),
        },
        Err(MigrateError::Refused(refusal)) => format!("refused: {}", refusal.reason),
        // The other end refused to begin.
        Err(MigrateError::WrongPhase) => "nothing".into(),
        Err(error) => error.to_string(),
    }
}

type Ended = Result<Progress, MigrateError>;

fn over_a_link(
    sender: &mut Sender<'_, TestHost>,
    receiver: &mut Receiver<'_, TestHost>,
    cancels: bool,
) -> [Ended; 2] {
    let [near, far] = Link::pair([None, None]);
    let (mut near, mut far) = (FromStd::new(near), FromStd::new(far));
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let received = receiver.run(&mut far, &mut |_| Flow::GoOn);
            // The link stays open, so that a refusal is read before the link is found broken.
            let _ = std::io::copy(&mut far.into_inner(), &mut std::io::sink());
            received
        });
        let sent = sender.run(&mut near, &mut |progress| match cancels
            && progress.phase == Phase::Prepared
        {
            true => Flow::Cancel,
            false => Flow::GoOn,
        });
        drop(near);
        [sent, receiving.join().unwrap()]
    })
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
    let limits = SendLimits {
        rounds: 1,
        pages_left: 0,
    };
    let mut random = |out: &mut [u8]| {
        out.fill(1);
        Ok(())
    };
    let mut sender = Sender::new(from, limits, &mut random).unwrap();
    let mut receiver = Receiver::new(to);
    let [sent, received] = over_a_link(&mut sender, &mut receiver, cancels);
    pair.hosts.iter().for_each(|host| {
        host.heal();
    });
    if sender.progress().phase == Phase::Committed && receiver.can_go_on() {
        let _ = over_a_link(&mut sender, &mut receiver, false);
    }
    let phase = sender.progress().phase;
    (sent, received, phase)
}

fn case(
    side: usize,
    leaf: Leaf,
    nth: u64,
    cause: Cause,
    (name, answer, times): (&str, Injected, u64),
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

/// What both ends say and who has the guest, and the failures that lead there.
type Outcomes = BTreeMap<[String; 3], Vec<&'static str>>;

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

const SIDES: [&str; 2] = ["source", "target"];

/// Compares the table between two markers of the document with `rows`, or writes it there.
fn document(marker: &str, rows: Vec<(String, Outcomes)>) {
    let mut table = String::from(
        "| call | fails with | `Sender` says | `Receiver` says | the guest |\n|---|---|---|---|---|\n",
    );
    for (call, outcomes) in rows {
        for ([sent, received, owner], names) in outcomes {
            let names = names.join(", ");
            let _ = writeln!(
                table,
                "| {call} | {names} | {sent} | {received} | {owner} |"
            );
        }
    }
    // Two tests write to one document.
    static DOCUMENT: Mutex<()> = Mutex::new(());
    let _turn = DOCUMENT.lock().unwrap_or_else(PoisonError::into_inner);
    let (begin, end) = (
        format!("<!-- {marker} -->\n"),
        format!("<!-- /{marker} -->\n"),
    );
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/migration.md");
    let text = std::fs::read_to_string(&path).expect("docs/migration.md");
    let (head, rest) = text.split_once(&begin).expect("a marker");
    let (_, tail) = rest.split_once(&end).expect("a marker");
    let expected = format!("{head}{begin}{table}{end}{tail}");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &expected).expect("docs is writable");
    } else {
        assert!(
            text == expected,
            "docs/migration.md is out of date:\n{table}"
        );
    }
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
    document("failures", rows.into());
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
    document("way-back", rows.into());
}
