//! A TD carried over a byte stream, and everything that can happen to the messages. `BLESS=1` rewrites the table in
//! docs/migration.md.

mod common;
mod migrate_support;

use std::sync::atomic::Ordering;

use common::audit::mirror_equals_secure_ept;
use kvm_ops_core::{Error, Gfn, Privacy, Step, VcpuOps, VmOps};
use kvm_ops_tdx::migrate::{
    Bundle, Flow, MigrateError, Phase, Progress, ProtocolError, Reason, ReceiveLimits, Receiver,
    StreamKey, Threads,
};
use migrate_support::link::{Fate, Plan};
use migrate_support::matrix::{KEY, document_messages, owner_after};
use migrate_support::stream::{self, Ends, over_a_link, over_a_watched_link, sends};
use migrate_support::{PAGES, Pair, private_pages, run_until};

/// The two ends of a pair, which copies for one round.
fn ends(pair: &Pair, key: Option<StreamKey>) -> Ends<'_> {
    stream::ends(pair, 1, key)
}

/// The guest is on exactly one side, goes on there, and loses nothing; both sides are torn down whole.
fn exactly_one_runs_it(mut pair: Pair, phase: Phase, before: u64, what: &str) {
    match phase {
        Phase::Done => {
            assert_eq!(
                pair.vcpus[0].vcpu_run().unwrap_err(),
                Error::Poisoned,
                "{what}"
            );
            assert_eq!(private_pages(&pair.target), private_pages(&pair.source));
            mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
            assert_eq!(pair.run_target(), before + 1, "{what}");
        }
        Phase::Cancelled => {
            assert_ne!(pair.target.step(), Step::Runnable, "{what}");
            mirror_equals_secure_ept(&pair.hosts[0], &pair.source);
            pair.run_source(before + 2 * PAGES).unwrap();
            // Nothing is left in a state of the export.
            let shared = pair
                .source
                .set_memory_attributes(Gfn::new(PAGES + 3), 1, Privacy::Shared);
            assert_eq!(shared, Ok(1), "{what}");
        }
        other => panic!("{what}: the migration ended in phase {other}"),
    }
    pair.destroy();
}

/// A frame that the guest shares.
const SHARED: Gfn = Gfn::new(PAGES + 20);

fn pair() -> (Pair, u64) {
    let mut pair = Pair::on_two(false);
    pair.source
        .set_memory_attributes(SHARED, 1, Privacy::Shared)
        .unwrap();
    pair.run_source(PAGES + 7).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    (pair, before)
}

#[test]
fn a_td_comes_over_a_stream_with_its_shared_memory() {
    for key in [None, Some(KEY)] {
        let (pair, before) = pair();
        let mut both = ends(&pair, key);
        let ([sent, received], _) = over_a_link(&mut both, [None, None]);
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert_eq!((sent.phase, received.phase), (Phase::Done, Phase::Done));
        assert_eq!(sent.pages, received.pages);
        assert_eq!(sent.bytes, received.bytes);
        drop(both);
        assert_eq!(pair.target.privacy(SHARED), Privacy::Shared);
        exactly_one_runs_it(pair, Phase::Done, before, "an honest link");
    }
}

/// Goes on over a second link where the first has broken. If its target has met a failure that was no
/// broken link, the source cancels. Returns the phase, and the links that it took.
fn settle(both: &mut Ends<'_>, what: &str) -> (Phase, usize) {
    match both.0.progress().phase {
        phase @ (Phase::Done | Phase::Cancelled) => return (phase, 1),
        phase if phase < Phase::Committed && !both.1.can_go_on() => {
            both.0.cancel().unwrap();
            return (both.0.progress().phase, 1);
        }
        _ => {
            let (settled, _) = over_a_link(both, [None, None]);
            let is_settled = settled[0].is_ok() || both.0.progress().phase == Phase::Cancelled;
            assert!(is_settled, "{what}: {settled:?}");
        }
    }
    (both.0.progress().phase, 2)
}

/// If the session can tell, it is over with the guest at its source; else a second link settles who has it.
#[test]
fn each_message_lost_late_twice_changed_and_cut() {
    let (honest, _) = pair();
    let mut both = ends(&honest, None);
    let (_, frames) = over_a_link(&mut both, [None, None]);
    drop(both);
    honest.destroy();
    assert!(frames[0].len() >= 10 && frames[1].len() >= 4, "{frames:?}");
    document_messages("messages", &frames, |plans, key, what| {
        let (pair, before) = pair();
        let mut both = ends(&pair, key);
        let (ended, _) = over_a_link(&mut both, plans);
        let (phase, links) = settle(&mut both, &format!("{what}: {ended:?}"));
        drop(both);
        exactly_one_runs_it(pair, phase, before, what);
        let owner = match phase {
            Phase::Done => "target",
            _ => "source",
        };
        owner_after(owner, links)
    });
}

/// What the target has is not sent again: over the second link less travels than over the first.
#[test]
fn a_session_goes_on_where_its_link_broke() {
    let (pair, before) = pair();
    pair.source
        .pre_fault_memory(Gfn::new(PAGES + 30), REST)
        .unwrap();
    let mut both = ends(&pair, Some(KEY));
    // The bundles of the first round are in the frames before.
    let cut = Plan {
        nth: 12,
        fate: Fate::Cut,
    };
    let (ended, first) = over_a_link(&mut both, [Some(cut), None]);
    let broken = both.0.progress();
    assert_eq!(broken.phase, Phase::Copying, "{ended:?}");
    assert!(both.1.can_go_on());
    let taken = both.1.progress().pages;
    assert!(taken > REST / 2, "{taken} {first:?}");
    let (ended, _) = over_a_link(&mut both, [None, None]);
    let [sent, received] = ended.map(Result::unwrap);
    assert_eq!((sent.phase, received.phase), (Phase::Done, Phase::Done));
    assert_eq!(sent.pages, received.pages);
    assert!(sent.bytes - broken.bytes < sent.bytes / 2, "{sent:?}");
    drop(both);
    exactly_one_runs_it(pair, Phase::Done, before, "two links");
}

#[test]
fn a_source_whose_link_broke_cancels_and_the_guest_runs_on() {
    for nth in [3, 6] {
        let (pair, before) = pair();
        let mut both = ends(&pair, None);
        let cut = Plan {
            nth,
            fate: Fate::Cut,
        };
        let (ended, _) = over_a_link(&mut both, [Some(cut), None]);
        assert!(ended[0].is_err());
        let phase = both.0.progress().phase;
        assert!(
            (Phase::Copying..Phase::Committed).contains(&phase),
            "{phase}"
        );
        both.0.cancel().unwrap();
        drop(both);
        exactly_one_runs_it(pair, Phase::Cancelled, before, "cancelled after a cut");
    }
}

#[test]
fn a_watcher_cancels_and_the_guest_runs_on() {
    let (pair, before) = pair();
    let mut both = ends(&pair, None);
    let cancel = &mut |progress: &Progress| match progress.phase {
        Phase::Prepared => Flow::Cancel,
        _ => Flow::GoOn,
    };
    let (ended, _) = over_a_watched_link(&mut both, [None, None], cancel, &mut |_| Flow::GoOn);
    assert_eq!(ended, [Err(MigrateError::Cancelled); 2]);
    drop(both);
    exactly_one_runs_it(pair, Phase::Cancelled, before, "cancelled");
}

#[test]
fn a_session_has_bounded_records() {
    let (pair, before) = pair();
    let (sender, receiver) = ends(&pair, None);
    let receiver = receiver.with_limits(ReceiveLimits { times: 0 });
    let mut both = (sender, receiver);
    let (ended, _) = over_a_link(&mut both, [None, None]);
    let refusal = match ended {
        [
            Err(MigrateError::Refused(refusal)),
            Err(MigrateError::Protocol(error)),
        ] => {
            assert_eq!(error, ProtocolError::TooManyRecords);
            refusal
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(refusal.reason, Reason::Limits);
    let phase = both.0.progress().phase;
    assert_eq!(phase, Phase::Cancelled);
    drop(both);
    exactly_one_runs_it(pair, phase, before, "bounded");
}

#[test]
fn a_target_that_cannot_own_the_guest_gives_it_back() {
    let (pair, before) = pair();
    let mut both = ends(&pair, None);
    // TDH.IMPORT.END fails for ever.
    let status = common::Injected::Status(0xc000_0608_0000_0000);
    pair.hosts[1].fail(kvm_ops_tdx::Leaf::ImportEnd, 1, u64::MAX, status);
    let ([sent, received], _) = over_a_link(&mut both, [None, None]);
    assert!(matches!(sent, Err(MigrateError::Refused(_))), "{sent:?}");
    assert!(
        matches!(
            received,
            Err(MigrateError::Failed {
                operation: "TDH.IMPORT.END",
                ..
            })
        ),
        "{received:?}"
    );
    assert!(pair.hosts[1].heal());
    drop(both);
    exactly_one_runs_it(pair, Phase::Cancelled, before, "given back");
}

/// Makes all bundles of each stream on a thread before any is sent, the last stream's first, and takes all of
/// a round's on threads once the last has come: as far apart as streams can be.
struct Apart;

impl Threads for Apart {
    fn make(
        &self,
        streams: u16,
        make: &(dyn Fn(u16) -> Option<kvm_ops_core::Result<Bundle>> + Sync),
        take: &mut dyn FnMut(kvm_ops_core::Result<Bundle>) -> bool,
    ) {
        let all = |stream| {
            let mut made = Vec::new();
            while made.last().is_none_or(Result::is_ok)
                && let Some(bundle) = make(stream)
            {
                made.push(bundle);
            }
            made
        };
        let made: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..streams)
                .map(|stream| scope.spawn(move || all(stream)))
                .collect();
            let made = threads.into_iter().rev();
            made.flat_map(|thread| thread.join().unwrap()).collect()
        });
        let _ = made.into_iter().all(take);
    }

    fn take(
        &self,
        streams: u16,
        next: &mut dyn FnMut() -> Option<Bundle>,
        take: &(dyn Fn(Bundle) + Sync),
    ) {
        let mut lines = vec![Vec::new(); usize::from(streams)];
        while let Some(bundle) = next() {
            lines[usize::from(bundle.stream())].push(bundle);
        }
        std::thread::scope(|scope| {
            for line in lines {
                scope.spawn(move || line.into_iter().for_each(take));
            }
        });
    }
}

/// The frames beyond those that the guest's program writes, in two tables.
const REST: u64 = 700;

#[test]
fn streams_on_threads_carry_a_td_that_writes_all_the_time() {
    let mut pair = Pair::on_two(true);
    pair.source
        .pre_fault_memory(Gfn::new(PAGES + 1), REST)
        .unwrap();
    pair.run_source(PAGES + 7).unwrap();
    let mut vcpu = pair.vcpus.remove(0);
    let counted = pair.counted.clone();
    let sender = sends(pair.source.outgoing(4).unwrap(), 3);
    let receiver = Receiver::new(pair.target.incoming(4).unwrap());
    let mut both = (
        sender.with_threads(Box::new(Apart)),
        receiver.with_threads(Box::new(Apart)),
    );
    let [sent, received] = std::thread::scope(|scope| {
        let writing = scope.spawn(|| run_until(&mut vcpu, &counted, u64::MAX));
        let (ended, _) = over_a_link(&mut both, [None, None]);
        assert_eq!(writing.join().unwrap(), Err(Error::Busy), "it was stopped");
        ended
    });
    let (sent, received) = (sent.unwrap(), received.unwrap());
    assert_eq!((sent.phase, received.phase), (Phase::Done, Phase::Done));
    assert_eq!(sent.pages, received.pages);
    assert!(sent.pages > REST + PAGES, "{sent:?}");
    drop(both);
    pair.vcpus.push(vcpu);
    assert_eq!(private_pages(&pair.target), private_pages(&pair.source));
    mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
    let before = counted.load(Ordering::SeqCst);
    // It may have been stopped between its count and the word of it.
    let first = pair.run_target();
    assert!(
        (before + 1..=before + 2).contains(&first),
        "{before} {first}"
    );
    pair.destroy();
}

#[test]
fn a_refusal_of_one_stream_ends_all() {
    let (pair, before) = pair();
    pair.source
        .pre_fault_memory(Gfn::new(PAGES + 30), REST)
        .unwrap();
    let (sender, receiver) = ends(&pair, None);
    let mut both = (
        sender.with_threads(Box::new(Apart)),
        receiver.with_threads(Box::new(Apart)),
    );
    // OPERAND_INVALID, fatal, for the third bundle of pages.
    let status = common::Injected::Status(0xe000_0100_0000_0000);
    pair.hosts[1].fail(kvm_ops_tdx::Leaf::ImportMem, 3, 1, status);
    let ([sent, received], _) = over_a_link(&mut both, [None, None]);
    assert!(matches!(sent, Err(MigrateError::Refused(_))), "{sent:?}");
    assert!(
        matches!(
            received,
            Err(MigrateError::Failed {
                operation: "TDH.IMPORT.MEM",
                ..
            })
        ),
        "{received:?}"
    );
    let phase = both.0.progress().phase;
    drop(both);
    exactly_one_runs_it(pair, phase, before, "one stream refused");
}
