//! A TD carried over a byte stream, and everything that can happen to the messages.

mod common;
mod migrate_support;

use std::sync::atomic::Ordering;

use common::TestHost;
use common::audit::mirror_equals_secure_ept;
use embedded_io_adapters::std::FromStd;
use kvm_ops_core::{Error, Gfn, Privacy, Step, VcpuOps, VmOps};
use kvm_ops_tdx::migrate::{
    Flow, MigrateError, Phase, Progress, ProtocolError, Reason, ReceiveLimits, Receiver,
    SendLimits, Sender, StreamKey,
};
use migrate_support::link::{Fate, Link, Plan};
use migrate_support::{PAGES, Pair, private_pages};

type Ends<'a> = (Sender<'a, TestHost>, Receiver<'a, TestHost>);
type Ended = Result<Progress, MigrateError>;

/// The two ends of a pair.
fn ends(pair: &Pair, key: Option<StreamKey>) -> Ends<'_> {
    let from = pair.source.outgoing(2).unwrap();
    let to = pair.target.incoming(2).unwrap();
    let limits = SendLimits {
        rounds: 1,
        pages_left: 0,
    };
    let mut random = |out: &mut [u8]| {
        out.fill(7);
        Ok(())
    };
    let mut sender = Sender::new(from, limits, &mut random).unwrap();
    let mut receiver = Receiver::new(to);
    if let Some(key) = key {
        sender = sender.with_key(key.clone());
        receiver = receiver.with_key(key, [9; 16]);
    }
    (sender, receiver)
}

/// Runs both ends over one link. Returns how each ended, and the frames that each wrote.
fn over_a_link(
    (sender, receiver): &mut Ends<'_>,
    plans: [Option<Plan>; 2],
) -> ([Ended; 2], [usize; 2]) {
    let [near, far] = Link::pair(plans);
    let (mut near, mut far) = (FromStd::new(near), FromStd::new(far));
    let go_on = &mut |_: &Progress| Flow::GoOn;
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let ended = receiver.run(&mut far, &mut |_| Flow::GoOn);
            let mut far = far.into_inner();
            // The link stays open, so that a refusal is read before the link is found broken.
            let _ = std::io::copy(&mut far, &mut std::io::sink());
            (ended, far.frames())
        });
        let sent = sender.run(&mut near, go_on);
        let near = near.into_inner();
        let frames = near.frames();
        // The peer hears that the link is over.
        drop(near);
        let (received, there) = receiving.join().unwrap();
        ([sent, received], [frames, there])
    })
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

const KEY: StreamKey = StreamKey::new([0x5a; 32]);

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

/// The number of frames that each end writes in an honest session.
fn honest_frames() -> [usize; 2] {
    let (pair, _) = pair();
    let mut both = ends(&pair, None);
    let (_, frames) = over_a_link(&mut both, [None, None]);
    drop(both);
    pair.destroy();
    frames
}

/// Each frame of either side meets this fate, with a stream key and without; if the session can tell,
/// it is over with the guest at its source, else a second link settles who has it.
fn every_frame(fate: Fate) {
    let frames = honest_frames();
    assert!(frames[0] >= 10 && frames[1] >= 4, "{frames:?}");
    let mut ended_at_target = 0;
    for side in 0..2 {
        for nth in 0..frames[side] {
            for key in [None, Some(KEY)] {
                let what = format!("{fate:?} frame {nth} of side {side}, key {}", key.is_some());
                let (pair, before) = pair();
                let mut both = ends(&pair, key);
                let mut plans = [None, None];
                plans[side] = Some(Plan { nth, fate });
                let (ended, _) = over_a_link(&mut both, plans);
                if both.0.progress().phase == Phase::Committed {
                    let (settled, _) = over_a_link(&mut both, [None, None]);
                    assert!(settled[0].is_ok(), "{what}: {ended:?}, then {settled:?}");
                }
                let phase = both.0.progress().phase;
                ended_at_target += u32::from(phase == Phase::Done);
                drop(both);
                exactly_one_runs_it(pair, phase, before, &what);
            }
        }
    }
    // The last frames of each side come when the guest has left.
    assert!(ended_at_target > 0, "{fate:?}");
}

#[test]
fn each_message_lost() {
    every_frame(Fate::Lost);
}

#[test]
fn each_message_late() {
    every_frame(Fate::Late);
}

#[test]
fn each_message_twice() {
    every_frame(Fate::Twice);
}

#[test]
fn each_message_changed_at_its_beginning() {
    every_frame(Fate::Changed(0));
}

#[test]
fn each_message_changed_in_its_mbmd() {
    every_frame(Fate::Changed(20));
}

#[test]
fn the_link_cut_in_each_message() {
    every_frame(Fate::Cut);
}

#[test]
fn a_watcher_cancels_and_the_guest_runs_on() {
    let (pair, before) = pair();
    let (mut sender, mut receiver) = ends(&pair, None);
    let [near, far] = Link::pair([None, None]);
    let (mut near, mut far) = (FromStd::new(near), FromStd::new(far));
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.run(&mut far, &mut |_| Flow::GoOn));
        let sent = sender.run(&mut near, &mut |progress| match progress.phase {
            Phase::Prepared => Flow::Cancel,
            _ => Flow::GoOn,
        });
        assert_eq!(sent, Err(MigrateError::Cancelled));
        assert_eq!(receiving.join().unwrap(), Err(MigrateError::Cancelled));
    });
    drop((sender, receiver));
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
