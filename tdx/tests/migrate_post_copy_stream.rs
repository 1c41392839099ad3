//! A TD that runs at its target while its pages follow it over a byte stream.

mod common;
mod migrate_support;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::Injected;
use common::audit::mirror_equals_secure_ept;
use kvm_ops_core::{Backend, Error, Gfn, Step, VcpuId, VcpuOps, VmOps};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::migrate::{Flow, MigrateError, Phase, Progress, ProtocolError, Reason, StreamKey};
use migrate_support::link::{Fate, Plan};
use migrate_support::stream::{Ended, Ends, ends, over_a_link, over_a_watched_link};
use migrate_support::{PAGES, Pair, load, private_pages, run_until};

/// Pages beyond those that the guest's program writes: more than those of one turn.
const REST: u64 = 1200;

const KEY: StreamKey = StreamKey::new([0x5a; 32]);

/// A pair whose source counts, and its last count.
fn pair(rest: u64) -> (Pair, u64) {
    let mut pair = Pair::on_two(false);
    if rest > 0 {
        pair.source
            .pre_fault_memory(Gfn::new(PAGES + 1), rest)
            .unwrap();
    }
    pair.run_source(PAGES + 7).unwrap();
    let before = pair.counted.load(Ordering::SeqCst);
    (pair, before)
}

fn post_copy_ends(pair: &Pair, rounds: u32, key: Option<StreamKey>) -> Ends<'_> {
    let (sender, receiver) = ends(pair, rounds, key);
    (sender.with_post_copy(), receiver.with_post_copy())
}

/// Runs a session over these links while the guest runs at its target, from the moment on when it may until it has
/// counted so far. Returns how the ends ended on each link.
fn while_it_runs(
    pair: &Pair,
    both: &mut Ends<'_>,
    links: &[Option<Plan>],
    until: u64,
) -> Vec<[Ended; 2]> {
    let (runs, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let (target, counted) = (&pair.target, &pair.counted);
    counted.store(0, Ordering::SeqCst);
    thread::scope(|scope| {
        let running = scope.spawn(|| {
            while !runs.load(Ordering::SeqCst) {
                if over.load(Ordering::SeqCst) {
                    return Ok(());
                }
                thread::yield_now();
            }
            let mut vcpu = target.create_vcpu(VcpuId(0)).unwrap();
            load(&mut vcpu, Gfn::new(0), counted);
            run_until(&mut vcpu, counted, until)
        });
        let ended = links.iter().map(|plan| {
            let (ended, _) =
                over_a_watched_link(both, [*plan, None], &mut |_| Flow::GoOn, &mut |progress| {
                    if progress.phase == Phase::PostCopy && !runs.swap(true, Ordering::SeqCst) {
                        // One page is waited for, however fast the pages come.
                        let _ = target.pre_fault_memory(Gfn::new(PAGES), 1);
                    }
                    Flow::GoOn
                });
            ended
        });
        let ended = ended.collect();
        over.store(true, Ordering::SeqCst);
        running.join().unwrap().unwrap();
        ended
    })
}

/// The guest is the target's with all of its pages.
fn arrived(pair: Pair) {
    let gone = {
        let mut pair = pair;
        let gone = pair.vcpus[0].vcpu_run().unwrap_err();
        assert_eq!(private_pages(&pair.target), private_pages(&pair.source));
        mirror_equals_secure_ept(&pair.hosts[1], &pair.target);
        pair.destroy();
        gone
    };
    assert_eq!(gone, Error::Poisoned);
}

#[test]
fn a_guest_runs_at_its_target_while_its_pages_follow_it_over_a_stream() {
    for key in [None, Some(KEY)] {
        let (pair, before) = pair(REST);
        let mut both = post_copy_ends(&pair, 0, key);
        let ended = while_it_runs(&pair, &mut both, &[None], before + 2 * PAGES);
        let [sent, received] = ended[0].each_ref().map(|ended| ended.as_ref().unwrap());
        assert_eq!((sent.phase, received.phase), (Phase::Done, Phase::Done));
        assert_eq!(sent.bytes, received.bytes);
        for progress in [sent, received] {
            // A page at which the guest was just then comes twice, and is taken once.
            assert!(progress.late >= PAGES + 1 + REST, "{progress:?}");
            assert!(progress.on_demand > 0, "{progress:?}");
            assert_eq!(progress.left, 0);
        }
        assert_eq!(received.late, PAGES + 1 + REST);
        assert_eq!(both.0.carried().pages_stopped, 0);
        drop(both);
        arrived(pair);
    }
}

#[test]
fn a_link_that_breaks_while_pages_follow_is_replaced_and_none_is_lost() {
    // In the pages of the first turns.
    for nth in [8, 9, 12, 16] {
        let (pair, before) = pair(REST);
        let mut both = post_copy_ends(&pair, 0, Some(KEY));
        let cut = Plan {
            nth,
            fate: Fate::Cut,
        };
        let links = [Some(cut), None];
        let ended = while_it_runs(&pair, &mut both, &links, before + 2 * PAGES);
        let [broken, whole] = [&ended[0], &ended[1]];
        assert!(
            broken[0].is_err_and(|error| error.is_of_the_link()),
            "{broken:?}"
        );
        let [sent, received] = whole.each_ref().map(|ended| ended.as_ref().unwrap());
        assert_eq!((sent.phase, received.phase), (Phase::Done, Phase::Done));
        // What came is not sent again, but for pages at which the guest was just then.
        assert_eq!(received.late, PAGES + 1 + REST);
        assert!(sent.late < received.late + 64, "{sent:?}");
        drop(both);
        arrived(pair);
    }
}

#[test]
fn pages_that_were_written_again_travel_before_the_guest_runs_at_its_target() {
    let (mut pair, before) = pair(REST);
    let mut vcpu = pair.vcpus.remove(0);
    let counted = pair.counted.clone();
    let mut both = post_copy_ends(&pair, 1, None);
    let mut wrote = false;
    let runs = Mutex::new(None);
    let (ended, _) = over_a_watched_link(
        &mut both,
        [None, None],
        &mut |progress| {
            // Once the round has taken pages, the guest writes some of them, and one that is new.
            if progress.phase == Phase::Copying && progress.pages > PAGES && !wrote {
                wrote = true;
                run_until(&mut vcpu, &counted, before + 3).unwrap();
                pair.source
                    .pre_fault_memory(Gfn::new(PAGES + REST + 10), 1)
                    .unwrap();
            }
            Flow::GoOn
        },
        &mut |progress: &Progress| {
            if progress.phase == Phase::PostCopy {
                runs.lock().unwrap().get_or_insert(progress.pages);
            }
            Flow::GoOn
        },
    );
    let [sent, received] = ended.map(Result::unwrap);
    assert_eq!((sent.phase, received.phase), (Phase::Done, Phase::Done));
    let carried = both.0.carried();
    assert!(carried.pages_stopped >= 3, "{carried:?}");
    assert_eq!((carried.pages_late, sent.late, received.late), (1, 1, 1));
    assert_eq!(runs.into_inner().unwrap(), Some(received.pages - 1));
    drop(both);
    pair.vcpus.push(vcpu);
    assert_eq!(private_pages(&pair.target), private_pages(&pair.source));
    let first = pair.run_target();
    assert!((before + 4..=before + 5).contains(&first), "{first}");
    arrived(pair);
}

#[test]
fn a_peer_without_post_copy_refuses_and_the_guest_runs_on() {
    let (mut pair, before) = pair(0);
    let (sender, receiver) = ends(&pair, 0, Some(KEY));
    let mut both = (sender.with_post_copy(), receiver);
    let (ended, _) = over_a_link(&mut both, [None, None]);
    let [Err(MigrateError::Refused(refusal)), Err(error)] = ended else {
        panic!("{ended:?}");
    };
    assert_eq!(refusal.reason, Reason::PostCopy);
    let said = refusal.to_string();
    assert!(said.contains("takes no guest before its pages"), "{said}");
    assert_eq!(error, MigrateError::Protocol(ProtocolError::NoPostCopy));
    assert_eq!(both.0.progress().phase, Phase::Cancelled);
    drop(both);
    assert_ne!(pair.target.step(), Step::Runnable);
    pair.run_source(before + 2 * PAGES).unwrap();
    pair.destroy();
}

#[test]
fn a_target_that_offers_post_copy_takes_a_guest_without() {
    let (mut pair, before) = pair(0);
    let (sender, receiver) = ends(&pair, 1, None);
    let mut both = (sender, receiver.with_post_copy());
    let (ended, _) = over_a_link(&mut both, [None, None]);
    let [sent, received] = ended.map(Result::unwrap);
    assert_eq!((sent.phase, received.phase), (Phase::Done, Phase::Done));
    assert_eq!((sent.late, received.late), (0, 0));
    drop(both);
    assert_eq!(pair.run_target(), before + 1);
    arrived(pair);
}

/// Both ends say that the guest is lost, and give everything back.
fn is_lost(mut pair: Pair, whys: [&str; 2]) {
    assert_eq!(pair.vcpus[0].vcpu_run().unwrap_err(), Error::Poisoned);
    for (vm, why) in [&pair.source, &pair.target].into_iter().zip(whys) {
        assert_ne!(vm.step(), Step::Runnable);
        let told = vm.explain(Error::Poisoned).to_string();
        assert!(told.contains(why), "{told}");
    }
    pair.destroy();
}

#[test]
fn ends_that_do_not_come_back_lose_the_guest_and_say_why() {
    let (pair, _) = pair(REST);
    let mut both = post_copy_ends(&pair, 0, None);
    let cut = Plan {
        nth: 9,
        fate: Fate::Cut,
    };
    let (ended, _) = over_a_link(&mut both, [Some(cut), None]);
    assert!(ended[0].is_err_and(|error| error.is_of_the_link()));
    assert_eq!(both.0.progress().phase, Phase::PostCopy);
    assert_eq!(both.1.progress().phase, Phase::PostCopy);
    assert!(both.0.progress().left > 0);
    // There is no way back, not even by the word of both.
    assert_eq!(both.0.cancel(), Err(MigrateError::WrongPhase));
    assert_eq!(both.1.give_back(), Err(MigrateError::WrongPhase));
    drop(both);
    is_lost(
        pair,
        [
            "without the target's word",
            "ended before the guest was complete",
        ],
    );
}

#[test]
fn a_source_hears_that_the_guest_is_lost_also_over_the_next_link() {
    for hears in [true, false] {
        let (pair, _) = pair(0);
        let mut both = post_copy_ends(&pair, 0, Some(KEY));
        // OPERAND_INVALID, fatal.
        let status = Injected::Status(0xe000_0100_0000_0000);
        pair.hosts[1].fail(Leaf::ImportMem, 1, 1, status);
        // Running, Wanted, and then the loss, are behind three answers.
        let lost = Plan {
            nth: if hears { usize::MAX } else { 4 },
            fate: Fate::Cut,
        };
        let (ended, kinds) = over_a_link(&mut both, [None, Some(lost)]);
        let first = ended[0];
        assert!(matches!(
            ended[1],
            Err(MigrateError::Failed {
                operation: "TDH.IMPORT.MEM",
                ..
            })
        ));
        assert_eq!(both.1.progress().phase, Phase::Lost, "{kinds:?}");
        let told = match hears {
            true => first,
            false => {
                assert!(
                    first.is_err_and(|error| error.is_of_the_link()),
                    "{first:?}"
                );
                over_a_link(&mut both, [None, None]).0[0]
            }
        };
        let Err(MigrateError::Lost(refusal)) = told else {
            panic!("{told:?}");
        };
        assert_eq!(refusal.reason, Reason::Firmware);
        assert_eq!(both.0.progress().phase, Phase::Lost);
        let (again, _) = over_a_link(&mut both, [None, None]);
        assert_eq!(again[0], Err(MigrateError::WrongPhase));
        drop(both);
        is_lost(pair, ["cannot take the pages that are left", "IMPORT.MEM"]);
    }
}

#[test]
fn a_target_without_memory_asks_again_once_it_has_some() {
    let (pair, before) = pair(0);
    let mut both = post_copy_ends(&pair, 0, None);
    let refused = Injected::Port(Error::NoMemory);
    pair.hosts[1].fail(Leaf::ImportMem, 1, 1, refused);
    let (ended, _) = over_a_link(&mut both, [None, None]);
    assert!(
        matches!(
            ended[1],
            Err(MigrateError::Failed {
                error: Error::NoMemory,
                ..
            })
        ),
        "{ended:?}"
    );
    assert_eq!(both.1.progress().phase, Phase::PostCopy);
    pair.hosts[1].heal();
    let ended = while_it_runs(&pair, &mut both, &[None], before + PAGES);
    assert!(ended[0].iter().all(Result::is_ok), "{ended:?}");
    drop(both);
    arrived(pair);
}
