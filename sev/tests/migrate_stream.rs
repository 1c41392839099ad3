//! A guest travels between two platforms over links that are good, bad or broken.

mod migrate_support;

use std::thread;

use kvm_ops_core::{Error, Tech};
use kvm_ops_sev::migrate::{
    Flow, FrameError, MigrateError, Owner, Phase, Progress, ProtocolError, Reason, Receiver,
    SendLimits, Sender,
};
use migrate_support::*;
use proptest::prelude::*;
use soft_amd_sp::{Command, SevPolicy, Status};

type Tx<'m> = Sender<RawSource<'m>>;
type Rx<'m> = Receiver<RawTarget<'m>>;
type Ended = Result<Progress, MigrateError>;

fn sender(source: RawSource<'_>) -> Tx<'_> {
    let limits = SendLimits {
        rounds: 4,
        pages_left: 2,
    };
    Sender::new(source, limits, &mut random(7))
        .map_err(|(error, _)| error)
        .unwrap()
}

/// One link: the sender on this thread, the receiver on another.
fn link(tx: &mut Tx<'_>, rx: &mut Rx<'_>, to_target: Fault, to_source: Fault) -> (Ended, Ended) {
    link_watched(tx, rx, to_target, to_source, &mut |_| Flow::GoOn)
}

fn link_watched(
    tx: &mut Tx<'_>,
    rx: &mut Rx<'_>,
    to_target: Fault,
    to_source: Fault,
    watch: &mut dyn FnMut(&Progress) -> Flow,
) -> (Ended, Ended) {
    let (mut a, mut b) = pair(to_target);
    b = b.with_fault(to_source);
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let mut b = b;
            rx.run(&mut b, &mut |_| Flow::GoOn)
        });
        let sent = tx.run(&mut a, watch);
        drop(a);
        (sent, receiving.join().unwrap())
    })
}

/// The error that names a command and its status.
fn failed(command: Command, status: Status) -> Error {
    Error::Firmware(u64::from(command as u32) << 32 | u64::from(status.0))
}

fn good(tx: &mut Tx<'_>, rx: &mut Rx<'_>) {
    let (sent, received) = link(tx, rx, Fault::None, Fault::None);
    assert_eq!(
        (sent.unwrap().phase, received.unwrap().phase),
        (Phase::Done, Phase::Done)
    );
}

/// Takes both down and looks for what is left.
fn nothing_left(tx: Tx<'_>, rx: Rx<'_>) {
    let (source, target) = (tx.into_source(), rx.into_target());
    let (a, b) = (source.machine, target.machine);
    source.tear_down();
    if target.handle.is_some() {
        target.tear_down();
    } else {
        drop(target);
    }
    assert_eq!((a.guests(), b.guests()), (0, 0));
    assert_eq!((a.pages_out(), b.pages_out()), (0, 0));
}

#[test]
fn a_running_guest_arrives_with_its_last_writes() {
    for tech in [Tech::Sev, Tech::SevEs] {
        let (a, b) = (Machine::new(1), Machine::new(2));
        let mut source = RawSource::new(&a, tech, SevPolicy::SEV.bits(), 64);
        source.script = (0..150).map(|i| (i * 7 % 64, Some(i as u8))).collect();
        let (mut tx, mut rx) = (sender(source), Receiver::new(RawTarget::new(&b, tech)));
        good(&mut tx, &mut rx);
        let (source, target) = (tx.source(), rx.target());
        assert!(target.owned && !source.running);
        assert!(source.script.len() < 150, "the guest ran meanwhile");
        assert_eq!(source.view(), target.view());
        assert_eq!(source.registers, target.registers);
        if tech == Tech::SevEs {
            assert_eq!(target.vmsa_view(), [[0x80; PAGE], [0x81; PAGE]]);
        }
        assert_eq!(
            (
                a.guest_state(source.handle),
                b.guest_state(target.handle.unwrap())
            ),
            (6, 3)
        );
        let pages = tx.progress().pages;
        assert!(
            pages > 64,
            "pages that were written are sent again: {pages}"
        );
        nothing_left(tx, rx);
    }
}

#[test]
fn a_source_that_cannot_follow_writes_is_stopped_before_the_first_page() {
    let (a, b) = (Machine::new(3), Machine::new(4));
    let mut source = RawSource::new(&a, Tech::Sev, 0, 32);
    source.follows = false;
    source.script = (0..9).map(|i| (i, Some(1))).collect();
    let (mut tx, mut rx) = (sender(source), Receiver::new(RawTarget::new(&b, Tech::Sev)));
    good(&mut tx, &mut rx);
    assert_eq!(tx.source().script.len(), 9);
    assert_eq!(tx.source().view(), rx.target().view());
    nothing_left(tx, rx);
}

#[test]
fn a_frame_that_is_gone_at_the_source_is_gone_at_the_target() {
    let (a, b) = (Machine::new(5), Machine::new(6));
    let mut source = RawSource::new(&a, Tech::Sev, 0, 32);
    // They go away after they were sent.
    source.script = [1, 2, 3].map(|gfn| (gfn, None)).to_vec();
    source.script.extend([(9, Some(1)); 12]);
    let (mut tx, mut rx) = (sender(source), Receiver::new(RawTarget::new(&b, Tech::Sev)));
    good(&mut tx, &mut rx);
    assert_eq!(tx.source().view(), rx.target().view());
    for gfn in [1, 2, 3] {
        assert!(!rx.target().view().contains_key(&gfn));
    }
    nothing_left(tx, rx);
}

#[test]
fn a_cancelled_guest_runs_on_at_the_source_and_can_be_sent_again() {
    for cancel_at in [Phase::New, Phase::Copying, Phase::Stopped, Phase::Prepared] {
        let (a, b) = (Machine::new(7), Machine::new(8));
        let source = RawSource::new(&a, Tech::Sev, 0, 48);
        let (mut tx, mut rx) = (sender(source), Receiver::new(RawTarget::new(&b, Tech::Sev)));
        let before = tx.source().view();
        let mut watch = |progress: &Progress| match progress.phase == cancel_at {
            true => Flow::Cancel,
            false => Flow::GoOn,
        };
        if cancel_at == Phase::New {
            tx.cancel::<Link>(None).unwrap();
        } else {
            let (none, quiet) = (Fault::None, Fault::None);
            let (sent, received) = link_watched(&mut tx, &mut rx, none, quiet, &mut watch);
            assert_eq!(sent, Err(MigrateError::Cancelled), "{cancel_at}");
            assert_eq!(received, Err(MigrateError::Cancelled), "{cancel_at}");
        }
        assert_eq!(tx.progress().phase.owner(), Owner::Source);
        let mut source = tx.into_source();
        assert!(source.running);
        assert_eq!(a.guest_state(source.handle), 3);
        assert_eq!((b.guests(), source.view()), (0, before));
        source.write(1, 0xee);

        let mut tx = sender(source);
        good(&mut tx, &mut rx);
        assert_eq!(tx.source().view(), rx.target().view());
        // Too late now.
        assert_eq!(tx.cancel::<Link>(None), Err(MigrateError::WrongPhase));
        assert_eq!(rx.abandon(), Err(MigrateError::WrongPhase));
        nothing_left(tx, rx);
    }
}

#[test]
fn a_watcher_at_the_target_can_cancel_too() {
    let (a, b) = (Machine::new(9), Machine::new(10));
    let mut tx = sender(RawSource::new(&a, Tech::Sev, 0, 48));
    let mut rx = Receiver::new(RawTarget::new(&b, Tech::Sev));
    let (mut near, mut far) = pair(Fault::None);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            rx.run(&mut far, &mut |p| match p.round {
                0 => Flow::GoOn,
                _ => Flow::Cancel,
            })
        });
        let refused = tx.run(&mut near, &mut |_| Flow::GoOn);
        assert!(matches!(refused, Err(MigrateError::Refused(r)) if r.reason == Reason::Host));
        assert_eq!(receiving.join().unwrap(), Err(MigrateError::Cancelled));
    });
    tx.cancel::<Link>(None).unwrap();
    assert!(tx.source().running);
    nothing_left(tx, rx);
}

#[test]
fn a_cut_at_any_byte_in_either_direction_is_resumed_in_the_same_session() {
    let mut cuts = 0;
    for step in 0..24u64 {
        let (to_target, to_source) = match step % 2 {
            0 => (Fault::CutAfter(step * 6_500 + step % 24), Fault::None),
            _ => (
                Fault::None,
                Fault::CutAfter(step / 2 * 12 + 8_000 * (step % 3)),
            ),
        };
        let (a, b) = (Machine::new(11), Machine::new(12));
        let mut source = RawSource::new(&a, Tech::SevEs, 0, 24);
        source.script = (0..60).map(|i| (i * 5 % 24, Some(i as u8))).collect();
        let (mut tx, mut rx) = (
            sender(source),
            Receiver::new(RawTarget::new(&b, Tech::SevEs)),
        );
        let (sent, received) = link(&mut tx, &mut rx, to_target, to_source);
        if let Err(error) = sent {
            cuts += 1;
            assert!(error.can_go_on(), "{error}");
            assert!(received.is_err() || rx.progress().phase == Phase::Done);
            // At no time do both own it.
            assert!(!rx.target().owned || tx.progress().phase.owner() == Owner::Target);
            // A guest that is not stopped for good runs on.
            if rx.progress().phase < Phase::Prepared && tx.progress().phase == Phase::Copying {
                assert!(tx.source().running);
            }
            let (sent, received) = link(&mut tx, &mut rx, Fault::None, Fault::None);
            match (sent, received) {
                (Ok(_), Ok(_)) => {}
                // The target never heard of the session: only a new one helps.
                (Err(MigrateError::Refused(refusal)), Err(_)) => {
                    assert_eq!(
                        refusal.reason,
                        Reason::Session,
                        "{to_target:?} {to_source:?}"
                    );
                    tx.cancel::<Link>(None).unwrap();
                    let mut again = sender(tx.into_source());
                    good(&mut again, &mut rx);
                    tx = again;
                }
                other => panic!("{to_target:?} {to_source:?}: {other:?}"),
            }
        }
        assert!(rx.target().owned);
        assert_eq!(
            tx.source().view(),
            rx.target().view(),
            "{to_target:?} {to_source:?}"
        );
        nothing_left(tx, rx);
    }
    assert!(cuts > 12, "{cuts}");
}

#[test]
fn what_the_target_has_is_not_sent_again_after_a_break() {
    let (a, b) = (Machine::new(13), Machine::new(14));
    let source = RawSource::new(&a, Tech::Sev, 0, 128);
    let (mut tx, mut rx) = (sender(source), Receiver::new(RawTarget::new(&b, Tech::Sev)));
    let (sent, _) = link(&mut tx, &mut rx, Fault::CutAfter(200_000), Fault::None);
    assert!(sent.is_err());
    let (had, sent_before) = (rx.progress().pages, tx.progress().pages);
    assert!(had > 10 && sent_before - had <= 1);
    good(&mut tx, &mut rx);
    assert_eq!(tx.source().starts, 1, "one session, one SEND_START");
    let frames = tx.source().layout.frames();
    assert!(
        tx.progress().pages <= frames + 2,
        "{} of {frames}",
        tx.progress().pages
    );
    nothing_left(tx, rx);
}

#[test]
fn every_flipped_bit_is_noticed_and_nothing_is_lost() {
    for step in 0..16u64 {
        let (a, b) = (Machine::new(15), Machine::new(16));
        let source = RawSource::new(&a, Tech::Sev, 0, 16);
        let (mut tx, mut rx) = (sender(source), Receiver::new(RawTarget::new(&b, Tech::Sev)));
        let fault = Fault::FlipAt(step * 3_301 + step, (step % 8) as u8);
        let (sent, received) = link(&mut tx, &mut rx, fault, Fault::None);
        if sent.is_ok() {
            assert_eq!(received.unwrap().phase, Phase::Done);
            assert!(step > 8, "the flip came after the last byte");
        } else {
            let error = received.unwrap_err();
            assert!(matches!(error, MigrateError::Frame(_)), "{error:?}");
            // A flipped length may leave the other side waiting for what never comes; then the
            // link is closed, as here by the sender's end.
            if tx.progress().phase == Phase::New {
                tx.cancel::<Link>(None).unwrap();
                tx = sender(tx.into_source());
            }
            let again = link(&mut tx, &mut rx, Fault::None, Fault::None);
            if again.0.is_err() {
                tx.cancel::<Link>(None).unwrap();
                tx = sender(tx.into_source());
                good(&mut tx, &mut rx);
            }
        }
        assert_eq!(tx.source().view(), rx.target().view());
        nothing_left(tx, rx);
    }
}

#[test]
fn policies_that_forbid_the_journey_leave_everything_as_it_was() {
    let (a, b) = (Machine::new(17), Machine::new(18));
    for forbidding in [SevPolicy::NOSEND, SevPolicy::DOMAIN] {
        let source = RawSource::new(&a, Tech::Sev, forbidding.bits(), 8);
        let (mut tx, mut rx) = (sender(source), Receiver::new(RawTarget::new(&b, Tech::Sev)));
        let (sent, received) = link(&mut tx, &mut rx, Fault::None, Fault::None);
        let error = failed(Command::SEND_START, Status::POLICY_FAILURE);
        assert_eq!(
            sent,
            Err(MigrateError::Failed {
                operation: "SEND_START",
                error
            })
        );
        assert!(!sent.unwrap_err().can_go_on());
        assert_eq!(received, Err(MigrateError::Truncated));
        assert_eq!(a.guest_state(tx.source().handle), 3);
        tx.cancel::<Link>(None).unwrap();
        assert_eq!((tx.source().cancels, b.guests()), (0, 0));
        nothing_left(tx, rx);
    }
}

#[test]
fn a_guest_of_another_shape_is_refused_before_any_command() {
    let (a, b) = (Machine::new(19), Machine::new(20));
    let mut tx = sender(RawSource::new(&a, Tech::SevEs, 0, 8));
    let mut rx = Receiver::new(RawTarget::new(&b, Tech::Sev));
    let (sent, _) = link(&mut tx, &mut rx, Fault::None, Fault::None);
    assert!(matches!(sent, Err(MigrateError::Refused(r)) if r.reason == Reason::Shape));
    assert_eq!((tx.source().starts, tx.source().running), (0, true));
    nothing_left(tx, rx);
}

#[test]
fn a_second_sender_is_turned_away_during_a_session() {
    let (a, b) = (Machine::new(21), Machine::new(22));
    let mut tx = sender(RawSource::new(&a, Tech::Sev, 0, 32));
    let mut rx = Receiver::new(RawTarget::new(&b, Tech::Sev));
    let (sent, _) = link(&mut tx, &mut rx, Fault::CutAfter(60_000), Fault::None);
    assert!(sent.is_err());

    let c = Machine::new(23);
    let mut foreign = sender(RawSource::new(&c, Tech::Sev, 0, 32));
    let (sent, _) = link(&mut foreign, &mut rx, Fault::None, Fault::None);
    assert!(matches!(sent, Err(MigrateError::Refused(r)) if r.reason == Reason::Busy));
    foreign.cancel::<Link>(None).unwrap();
    foreign.into_source().tear_down();

    good(&mut tx, &mut rx);
    assert_eq!(tx.source().view(), rx.target().view());
    nothing_left(tx, rx);
}

#[test]
fn a_packet_of_another_session_gives_bad_measurement_and_the_page_comes_again() {
    let (a, b) = (Machine::new(24), Machine::new(25));
    let mut tx = sender(RawSource::new(&a, Tech::Sev, 0, 32));
    let mut rx = Receiver::new(RawTarget::new(&b, Tech::Sev));
    // The firmware itself is the judge: one packet is not authentic.
    b.platform
        .fail_next(Command::RECEIVE_UPDATE_DATA, Status::BAD_MEASUREMENT);
    let (_, received) = link(&mut tx, &mut rx, Fault::None, Fault::None);
    let error = failed(Command::RECEIVE_UPDATE_DATA, Status::BAD_MEASUREMENT);
    assert_eq!(
        received,
        Err(MigrateError::Failed {
            operation: "RECEIVE_UPDATE_DATA",
            error
        })
    );
    good(&mut tx, &mut rx);
    assert_eq!(tx.source().view(), rx.target().view());
    nothing_left(tx, rx);
}

#[test]
fn a_prepared_guest_runs_at_the_target_without_its_source_only_once_that_is_fenced() {
    let (a, b) = (Machine::new(26), Machine::new(27));
    let mut tx = sender(RawSource::new(&a, Tech::Sev, 0, 16));
    let mut rx = Receiver::new(RawTarget::new(&b, Tech::Sev));
    assert_eq!(
        rx.take_over_from_fenced_source(),
        Err(MigrateError::WrongPhase)
    );
    a.platform
        .fail_next(Command::SEND_FINISH, Status::HWERROR_PLATFORM);
    let (sent, received) = link(&mut tx, &mut rx, Fault::None, Fault::None);
    assert!(matches!(
        sent,
        Err(MigrateError::Failed {
            operation: "SEND_FINISH",
            ..
        })
    ));
    assert!(received.is_err());
    assert_eq!(rx.progress().phase, Phase::Prepared);
    assert_eq!(tx.progress().phase.owner(), Owner::Source);
    assert!(!rx.target().owned);
    rx.take_over_from_fenced_source().unwrap();
    assert!(rx.target().owned);
    assert_eq!(tx.source().view(), rx.target().view());
    nothing_left(tx, rx);
}

#[test]
fn errors_say_what_they_mean() {
    let error = MigrateError::Frame(FrameError::Length {
        kind: 6,
        claimed: 0xffff_ffff,
    });
    assert!(error.can_go_on());
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "length 0xffffffff for record kind 0x6");
    let error = MigrateError::Protocol(ProtocolError::OutsideOfGuest(0x1234));
    assert_eq!(error.to_string(), "the peer does not keep to the protocol");
}

/// Failures that a random history draws from.
#[derive(Clone, Debug)]
enum Trouble {
    CutToTarget(u64),
    CutToSource(u64),
    Flip(u64, u8),
    Fails(bool, usize, u64),
}

const COMMANDS: [Command; 13] = [
    Command::PDH_CERT_EXPORT,
    Command::SEND_START,
    Command::SEND_UPDATE_DATA,
    Command::SEND_UPDATE_VMSA,
    Command::SEND_FINISH,
    Command::SEND_CANCEL,
    Command::RECEIVE_START,
    Command::ACTIVATE,
    Command::RECEIVE_UPDATE_DATA,
    Command::RECEIVE_UPDATE_VMSA,
    Command::RECEIVE_FINISH,
    Command::DEACTIVATE,
    Command::DECOMMISSION,
];

fn any_trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        (0..260_000u64).prop_map(Trouble::CutToTarget),
        (0..8_000u64).prop_map(Trouble::CutToSource),
        (0..200_000u64, 0..8u8).prop_map(|(at, bit)| Trouble::Flip(at, bit)),
        (any::<bool>(), 0..COMMANDS.len(), 1..30u64).prop_map(|(s, c, n)| Trouble::Fails(s, c, n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever fails, there is one owner at every moment, and in the end a guest that is whole.
    #[test]
    fn one_owner_and_nothing_lost_whatever_fails(
        es in any::<bool>(),
        writes in proptest::collection::vec((0..28u64, proptest::option::weighted(0.9, any::<u8>())), 0..80),
        troubles in proptest::collection::vec((any_trouble(), 0..4u8), 0..6),
    ) {
        let tech = if es { Tech::SevEs } else { Tech::Sev };
        let (a, b) = (Machine::new(30), Machine::new(31));
        let mut source = RawSource::new(&a, tech, 0, 28);
        source.script = writes;
        let (mut tx, mut rx) = (sender(source), Receiver::new(RawTarget::new(&b, tech)));
        for (trouble, then) in troubles {
            let (mut there, mut back) = (Fault::None, Fault::None);
            match trouble {
                Trouble::CutToTarget(at) => there = Fault::CutAfter(at),
                Trouble::CutToSource(at) => back = Fault::CutAfter(at),
                Trouble::Flip(at, bit) => there = Fault::FlipAt(at, bit),
                Trouble::Fails(at_source, command, nth) => {
                    let at = if at_source { &a } else { &b };
                    at.platform.fail(soft_amd_sp::Failure {
                        operation: COMMANDS[command].into(),
                        nth,
                        code: Status::RESOURCE_LIMIT.0.into(),
                    });
                }
            }
            let (sent, _) = link(&mut tx, &mut rx, there, back);
            check_owner(&tx, &rx)?;
            if sent.is_ok() {
                break;
            }
            // Sometimes the caller goes on, sometimes it cancels, with or without a link.
            if then == 0 && tx.progress().phase < Phase::Committed {
                tx = cancel(tx, &mut rx);
            }
        }
        a.platform.clear_failures();
        b.platform.clear_failures();
        for _ in 0..3 {
            if tx.progress().phase == Phase::Done {
                break;
            }
            let (sent, _) = link(&mut tx, &mut rx, Fault::None, Fault::None);
            check_owner(&tx, &rx)?;
            if sent.is_err() && tx.progress().phase < Phase::Committed {
                tx = cancel(tx, &mut rx);
            }
        }
        prop_assert_eq!(tx.progress().phase, Phase::Done);
        prop_assert!(rx.target().owned);
        prop_assert_eq!(tx.source().view(), rx.target().view());
        nothing_left(tx, rx);
    }
}

fn cancel<'m>(mut tx: Tx<'m>, rx: &mut Rx<'_>) -> Tx<'m> {
    if tx.cancel::<Link>(None).is_err() {
        tx.cancel::<Link>(None).unwrap();
    }
    if rx.abandon().is_err() {
        rx.abandon().unwrap();
    }
    assert!(tx.source().running);
    sender(tx.into_source())
}

fn check_owner(tx: &Tx<'_>, rx: &Rx<'_>) -> Result<(), TestCaseError> {
    let (source, target) = (tx.source(), rx.target());
    let given_up = tx.progress().phase.owner() == Owner::Target;
    // The firmware agrees with the protocol's word.
    let sent = source.machine.guest_state(source.handle) == 6;
    prop_assert_eq!(sent, given_up);
    prop_assert!(!target.owned || given_up);
    prop_assert!(!source.running || !given_up);
    Ok(())
}
