//! Migration TDs that exchange keys, and those that do not.

mod support;

use std::sync::Mutex;

use kvm_ops::tdx::TdxVm;
use kvm_ops::tdx::migrate::Binding;
use kvm_ops::{Error, sim::SimHost};
use kvm_ops_machine::MachineError;
use kvm_ops_migtd::{ExchangeError, Failure, MigrationTd, Mismatch, Policy, Svn};
use proptest::prelude::*;
use support::{
    ATTRIBUTES, Done, SVN, Side, exchange, finish, limits, other_service, program, service, td,
};

/// The failure of a migration TD.
fn failure(done: &Done) -> Failure {
    match done {
        Err(ExchangeError::Failed(failure)) => *failure,
        other => panic!("{other:?}"),
    }
}

/// Two sides of one policy, and their bindings.
fn pair() -> ([Side; 2], [Binding; 2]) {
    let mut sides = [
        Side::new(Policy::default(), service),
        Side::new(Policy::default(), service),
    ];
    let bindings = [sides[0].bind_source(), sides[1].bind_target()];
    (sides, bindings)
}

/// Begins a migration, which needs the keys of both directions: the first bundle and, as the answer to
/// it, the token by which the target gives up.
fn begins(source: &TdxVm<SimHost>, target: &TdxVm<SimHost>) -> Result<(), Error> {
    let mut from = source.outgoing(1)?;
    let mut to = target.incoming(1)?;
    to.take(&from.begin()?)?;
    from.stop()?;
    to.take(&from.td_state()?)?;
    for vcpu in from.vcpus() {
        to.take(&from.vcpu_state(vcpu, 0)?)?;
    }
    to.take(&from.start_token()?)?;
    let token = to.abort()?;
    from.abort(Some(&token))
}

fn tds([source, target]: &[Side; 2]) -> [&TdxVm<SimHost>; 2] {
    [source, target].map(|side| side.td.as_ref().unwrap())
}

#[test]
fn two_migration_tds_exchange_the_keys_with_which_a_td_migrates() {
    let ([mut source, mut target], bindings) = pair();
    let done = exchange([&mut source, &mut target], bindings, &mut |_, message| {
        Some(message)
    });
    assert!(matches!(done, [Ok(()), Ok(())]), "{done:?}");
    let sides = [source, target];
    let [from, to] = tds(&sides);
    begins(from, to).unwrap();
    sides.into_iter().for_each(Side::destroy);
}

#[test]
fn without_an_exchange_the_module_sends_nothing() {
    let (sides, _) = pair();
    let [from, to] = tds(&sides);
    assert!(matches!(begins(from, to), Err(Error::Firmware(_))));
    sides.into_iter().for_each(Side::destroy);
}

#[test]
fn a_prebound_migration_td_is_bound_to_a_running_td_and_to_one_that_waits() {
    let mut sides = [
        Side::new(Policy::default(), service),
        Side::new(Policy::default(), service),
    ];
    let hashes = sides
        .each_mut()
        .map(|side| side.keeper.info_hash(limits()).unwrap());
    assert_eq!(hashes[0], hashes[1], "the same on every machine");
    let prebound = Side::prebound(hashes[0]);
    let mut running = td(&sides[0].host, |td| td.migration_td = prebound);
    finish(&mut running);
    let waiting = td(&sides[1].host, |td| {
        td.migration_td = prebound;
        td.arrives = true;
    });
    let bindings = [
        running.bind_migration_td(sides[0].keeper.td(), 0).unwrap(),
        waiting.bind_migration_td(sides[1].keeper.td(), 0).unwrap(),
    ];
    sides[0].td = Some(running);
    sides[1].td = Some(waiting);
    let [source, target] = &mut sides;
    let done = exchange([source, target], bindings, &mut |_, message| Some(message));
    assert!(matches!(done, [Ok(()), Ok(())]), "{done:?}");
    let [from, to] = tds(&sides);
    begins(from, to).unwrap();
    sides.into_iter().for_each(Side::destroy);
}

#[test]
fn another_migration_td_than_the_prebound_one_is_not_bound() {
    const SERVTD_INFO_HASH_MISMATCH: u64 = 0xc000_0d03;
    let mut side = Side::new(Policy::default(), service);
    let hash = side.keeper.info_hash(limits()).unwrap();
    let lax = Policy {
        svn: Svn::AtLeast([0; 16]),
        ..Policy::default()
    };
    let other = MigrationTd::start(&side.host, program(lax), service(&side.host)).unwrap();
    let mut running = td(&side.host, |td| td.migration_td = Side::prebound(hash));
    finish(&mut running);
    match running.bind_migration_td(other.td(), 0) {
        Err(Error::Firmware(status)) => {
            assert_eq!(status >> 32, SERVTD_INFO_HASH_MISMATCH, "{status:#x}");
        }
        bound => panic!("{bound:?}"),
    }
    running.bind_migration_td(side.keeper.td(), 0).unwrap();
    side.td = Some(running);
    assert!(other.destroy().is_clean());
    side.destroy();
}

#[test]
fn a_td_that_was_never_bound_before_its_launch_ended_is_not_bound_later() {
    let mut side = Side::new(Policy::default(), service);
    let mut running = td(&side.host, |_| ());
    finish(&mut running);
    let bound = running.bind_migration_td(side.keeper.td(), 0);
    assert!(matches!(bound, Err(Error::Firmware(_))), "{bound:?}");
    side.td = Some(running);
    side.destroy();
}

/// Exchanges between sides of these policies, of which the target's quotes come from `service`.
fn refused(
    policies: [Policy; 2],
    service_of_target: impl FnOnce(&SimHost) -> support::Service,
) -> [Failure; 2] {
    let [at_source, at_target] = policies;
    let mut source = Side::new(at_source, service);
    let mut target = Side::new(at_target, service_of_target);
    let bindings = [source.bind_source(), target.bind_target()];
    let done = exchange([&mut source, &mut target], bindings, &mut |_, message| {
        Some(message)
    });
    let failures = done.each_ref().map(failure);
    let sides = [source, target];
    let [from, to] = tds(&sides);
    assert!(begins(from, to).is_err(), "no key was set");
    sides.into_iter().for_each(Side::destroy);
    failures
}

#[test]
fn a_migration_td_of_another_policy_is_another_one() {
    let lax = Policy {
        attributes_forbidden: 0,
        ..Policy::default()
    };
    let mismatch = Failure::Policy(Mismatch::Mrtd);
    let told = Failure::Refused(7);
    assert_eq!(refused([Policy::default(), lax], service), [mismatch, told]);
}

#[test]
fn an_authentic_peer_that_is_debugged_or_older_is_refused() {
    let told = Failure::Refused(7);
    let debugged = |host: &SimHost| other_service(host, |body| body[ATTRIBUTES] |= 1);
    let policies = [Policy::default(); 2];
    let forbidden = Failure::Policy(Mismatch::Forbidden);
    assert_eq!(refused(policies, debugged), [forbidden, told]);
    let older = |host: &SimHost| other_service(host, |body| body[SVN] -= 1);
    let too_old = Failure::Policy(Mismatch::Svn(0));
    assert_eq!(refused(policies, older), [too_old, told]);
}

#[test]
fn a_host_without_quotes_exchanges_no_keys() {
    let none = |_: &SimHost| -> support::Service {
        Box::new(|_| Err(kvm_ops_machine::NoQuote::Unavailable))
    };
    let [at_source, at_target] = refused([Policy::default(); 2], none);
    assert_eq!(at_target, Failure::NoQuote(0x8000_0000_0000_0001));
    assert_eq!(at_source, Failure::Refused(10));
}

#[test]
fn a_quote_that_is_none_is_not_believed() {
    let nonsense = |_: &SimHost| -> support::Service { Box::new(|_| Ok(vec![4; 5000])) };
    let failures = refused([Policy::default(); 2], nonsense);
    assert_eq!(failures, [Failure::Evidence, Failure::Refused(5)]);
}

/// The messages of an exchange that went well, in order.
fn recorded([source, target]: [&mut Side; 2], bindings: [Binding; 2]) -> Vec<Vec<u8>> {
    let messages = Mutex::new(Vec::new());
    let done = exchange([source, target], bindings, &mut |_, message: Vec<u8>| {
        messages.lock().unwrap().push(message.clone());
        Some(message)
    });
    assert!(matches!(done, [Ok(()), Ok(())]), "{done:?}");
    messages.into_inner().unwrap()
}

/// Bytes of a Reply before its quote: kind, version, key.
const KEY: std::ops::Range<usize> = 3..68;

#[test]
fn what_was_recorded_of_one_exchange_is_refused_in_the_next() {
    let ([mut source, mut target], bindings) = pair();
    let old = recorded([&mut source, &mut target], bindings);
    assert_eq!(old.len(), 5);
    // The whole message; its failure at the source and at the target.
    let replayed = [
        // With the old key the target's answer fits, and the source's next message does not.
        (0, [Failure::Binding, Failure::Refused(6)]),
        (1, [Failure::Binding, Failure::Refused(6)]),
        (2, [Failure::Refused(6), Failure::Binding]),
        (3, [Failure::Seal, Failure::Refused(8)]),
    ];
    for (nth, expected) in replayed {
        let done = exchange(
            [&mut source, &mut target],
            bindings,
            &mut |n, message| match n == nth {
                true => Some(old[nth].clone()),
                false => Some(message),
            },
        );
        assert_eq!(done.each_ref().map(failure), expected, "message {nth}");
    }
    // The old quote beside the new key.
    let done = exchange(
        [&mut source, &mut target],
        bindings,
        &mut |n, message| match n {
            1 => Some([&message[..KEY.end], &old[1][KEY.end..]].concat()),
            _ => Some(message),
        },
    );
    assert_eq!(failure(&done[0]), Failure::Binding);
    // The last message: the target believes only what is sealed in this exchange.
    let done = exchange(
        [&mut source, &mut target],
        bindings,
        &mut |n, message| match n {
            4 => Some(old[4].clone()),
            _ => Some(message),
        },
    );
    assert!(done[0].is_ok());
    assert_eq!(failure(&done[1]), Failure::Seal);
    [source, target].into_iter().for_each(Side::destroy);
}

#[test]
fn a_message_that_comes_back_to_its_sender_is_refused() {
    let ([mut source, mut target], bindings) = pair();
    let mut hello = Vec::new();
    let done = exchange([&mut source, &mut target], bindings, &mut |n, message| {
        if n == 0 {
            hello = message.clone();
        }
        match n {
            1 => Some(hello.clone()),
            _ => Some(message),
        }
    });
    assert_eq!(failure(&done[0]), Failure::Message);
    [source, target].into_iter().for_each(Side::destroy);
}

#[test]
fn a_link_that_ends_anywhere_ends_the_exchange_and_the_next_one_succeeds() {
    let ([mut source, mut target], bindings) = pair();
    for last in 0..5 {
        let done = exchange([&mut source, &mut target], bindings, &mut |n, message| {
            (n < last).then_some(message)
        });
        // The source has nothing to wait for after its last message.
        let waits = [last < 4, true];
        for (done, waits) in done.iter().zip(waits) {
            match done {
                Err(ExchangeError::Link(_)) => assert!(waits),
                Ok(()) => assert!(!waits),
                other => panic!("after {last} messages: {other:?}"),
            }
        }
    }
    recorded([&mut source, &mut target], bindings);
    let sides = [source, target];
    let [from, to] = tds(&sides);
    begins(from, to).unwrap();
    sides.into_iter().for_each(Side::destroy);
}

#[test]
fn a_binding_of_another_td_is_the_modules_to_refuse() {
    let ([mut source, mut target], [at_source, at_target]) = pair();
    let foreign = Binding {
        uuid: [1, 2, 3, 4],
        ..at_source
    };
    let done = exchange(
        [&mut source, &mut target],
        [foreign, at_target],
        &mut |_, message| Some(message),
    );
    assert!(matches!(failure(&done[0]), Failure::Module(_)), "{done:?}");
    assert_eq!(failure(&done[1]), Failure::Refused(9));
    [source, target].into_iter().for_each(Side::destroy);
}

#[test]
fn a_migration_td_that_cannot_be_built_is_an_error() {
    let host = SimHost::new(kvm_ops::Vendor::Amd);
    let service: support::Service = Box::new(|_| Err(kvm_ops_machine::NoQuote::Unavailable));
    let built = MigrationTd::start(&host, program(Policy::default()), service);
    assert!(matches!(built.err(), Some(MachineError::Create(_))));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_byte_anywhere_leaves_one_end_without_keys(
        changes in proptest::collection::vec((0..5usize, any::<u32>(), 1..=255u8), 4),
    ) {
        let ([mut source, mut target], bindings) = pair();
        for (nth, at, change) in changes {
            let done = exchange([&mut source, &mut target], bindings, &mut |n, mut message| {
                if n == nth {
                    let at = at as usize % message.len();
                    message[at] ^= change;
                }
                Some(message)
            });
            // The end that the message went to notices at the latest.
            let receiver = &done[1 - nth % 2];
            prop_assert!(receiver.is_err(), "message {} byte {}: {:?}", nth, at, done);
        }
        [source, target].into_iter().for_each(Side::destroy);
    }
}
