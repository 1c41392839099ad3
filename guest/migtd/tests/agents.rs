//! Migration agents of SNP guests that judge each other, those that do not like what they see, and a guest that they carry.

mod support;

use std::collections::BTreeMap;
use std::sync::Mutex;

use kvm_ops::sev::migrate::MigrationAgent;
use kvm_ops::sev::{SevVm, SwapSlot, SwapStore};
use kvm_ops::sim::SimHost;
use kvm_ops::{
    Backend, EncParams, Error, Field, Host, Hpa, SevParams, Tech, VcpuId, VmOps, VmParams,
};
use kvm_ops_attest::snp::Roots;
use kvm_ops_migtd::agent::{AgentPolicy, LeastTcb, SnpAgent};
use kvm_ops_migtd::{ExchangeError, Failure, Mismatch};
use proptest::prelude::*;
use support::agents::{Chain, Done, Start, meet, tcb};

/// Bits of the policy: SMT, the bit that must be 1, MIGRATE_MA and DEBUG.
const BASE: u64 = 1 << 16 | 1 << 17;
const MIGRATE_MA: u64 = 1 << 18;
const DEBUG: u64 = 1 << 19;

fn failure(done: &Done) -> Failure {
    match done {
        Err(ExchangeError::Failed(failure)) => *failure,
        other => panic!("{other:?}"),
    }
}

fn honest(_: usize, message: Vec<u8>) -> Option<Vec<u8>> {
    Some(message)
}

fn pair() -> [(SimHost, SnpAgent<SimHost>); 2] {
    [Start::new(1).agent(), Start::new(2).agent()]
}

fn end(sides: [(SimHost, SnpAgent<SimHost>); 2]) {
    for (host, agent) in sides {
        assert!(agent.destroy().is_clean());
        assert_eq!(host.live_vms(), 0);
    }
}

#[derive(Default)]
struct Pages(BTreeMap<SwapSlot, Vec<u8>>);

impl SwapStore for Pages {
    fn put(&mut self, at: SwapSlot, page: &[u8]) -> kvm_ops::Result<()> {
        self.0.insert(at, page.to_vec());
        Ok(())
    }

    fn get(&mut self, at: SwapSlot, page: &mut [u8]) -> kvm_ops::Result<()> {
        let kept = self.0.get(&at);
        page.copy_from_slice(kept.ok_or(Error::NotFound(Field::Page, at.index.into()))?);
        Ok(())
    }
}

/// A VM with a vCPU and no memory but its registers, of that agent if one is named.
fn charge(host: &SimHost, agent: Option<Hpa>) -> SevVm<SimHost> {
    let params = VmParams {
        enc: EncParams::Sev(Box::new(SevParams {
            policy: Some(BASE | MIGRATE_MA),
            migration_agent: agent,
            ..SevParams::default()
        })),
        ..VmParams::new(1)
    };
    let mut vm = SevVm::create(host, host.next_vm_id(), Tech::SevSnp, &params).expect("a VM");
    vm.vm_init().expect("vm_init");
    drop(vm.create_vcpu(VcpuId(0)).expect("a vCPU"));
    vm
}

fn destroy(mut vm: SevVm<SimHost>) {
    let key = vm.mmu_release_hkid().expect("released");
    let drained = vm.drain_private(key).map_err(|(error, _)| error);
    assert!(vm.vm_free(drained.expect("drained")).is_clean());
}

#[test]
fn two_agents_of_two_platforms_agree_on_keys_and_carry_a_guest() {
    let mut sides = pair();
    let [(here, agent), (there, peer)] = &mut sides;
    let mut vm = charge(here, agent.gctx());
    vm.vm_finalize().expect("launched");
    let to = charge(there, None);
    let mut pages = Pages::default();
    // Without a peer nothing leaves.
    let refused = vm.depart(&mut pages, agent);
    assert!(matches!(refused, Err(Error::Protected(_))), "{refused:?}");
    let why = agent.take_failure();
    assert!(
        matches!(why, Some(ExchangeError::Failed(Failure::NoPeer))),
        "{why:?}"
    );
    vm.resume(&mut pages).expect("back");

    let done = meet([agent, peer], &mut honest);
    assert!(matches!(done, [Ok(_), Ok(_)]), "{done:?}");
    let image = vm.depart(&mut pages, agent).expect("departed");
    to.arrive(&image, &mut pages, peer).expect("arrived");
    vm.hand_off().expect("given up");
    to.resume(&mut pages).expect("running");
    assert_eq!(to.measurement(), vm.measurement());
    // What was sealed for the peer comes once.
    let again = charge(there, None);
    let refused = again.arrive(&image, &mut pages, peer);
    assert!(matches!(refused, Err(Error::Protected(_))), "{refused:?}");
    let why = peer.take_failure();
    assert!(
        matches!(why, Some(ExchangeError::Failed(Failure::Seal))),
        "{why:?}"
    );
    [vm, to, again].into_iter().for_each(destroy);
    end(sides);
}

/// Two agents that do not agree: the failure of each.
fn refused(source: Start, target: Start) -> [Failure; 2] {
    let mut sides = [source.agent(), target.agent()];
    let [(_, agent), (_, peer)] = &mut sides;
    let done = meet([agent, peer], &mut honest);
    let failures = done.each_ref().map(failure);
    // Neither carries anything.
    for agent in [agent, peer] {
        assert!(agent.import(Hpa::new(0x1000), &[0; 200]).is_err());
        let why = agent.take_failure();
        assert!(
            matches!(why, Some(ExchangeError::Failed(Failure::NoPeer))),
            "{why:?}"
        );
    }
    end(sides);
    failures
}

/// The target is what the source does not want.
fn source_refuses(change: impl FnOnce(&mut Start)) -> Failure {
    let mut target = Start::new(2);
    change(&mut target);
    let [at_source, at_target] = refused(Start::new(1), target);
    assert!(matches!(at_target, Failure::Refused(_)), "{at_target}");
    at_source
}

/// The source is what the target does not want.
fn target_refuses(change: impl FnOnce(&mut Start)) -> Failure {
    let mut source = Start::new(1);
    change(&mut source);
    let [at_source, at_target] = refused(source, Start::new(2));
    assert!(matches!(at_source, Failure::Refused(_)), "{at_source}");
    at_target
}

#[test]
fn an_agent_of_another_measurement_is_refused() {
    let lax = |start: &mut Start| start.policy.policy_forbidden = 0;
    let mismatch = Failure::Policy(Mismatch::Measurement);
    assert_eq!(source_refuses(lax), mismatch);
    // A source judges first: one that wants this very target is another agent than that, which refuses it.
    let (_host, known) = Start::new(2).agent();
    let measurement = *known.vm().measurement().expect("launched").bytes();
    assert!(known.destroy().is_clean());
    let wants = |start: &mut Start| start.policy.measurement = Some(measurement);
    assert_eq!(target_refuses(wants), mismatch);
}

#[test]
fn an_agent_that_its_host_may_debug_or_that_may_leave_is_refused_whatever_its_measurement() {
    for bit in [DEBUG, MIGRATE_MA] {
        let may = |start: &mut Start| start.params.policy = Some(BASE | bit);
        let mismatch = Failure::Policy(Mismatch::GuestPolicy);
        assert_eq!(source_refuses(may), mismatch);
        assert_eq!(target_refuses(may), mismatch);
    }
}

#[test]
fn an_agent_on_an_older_platform_is_refused() {
    let older = |start: &mut Start| start.snp = 21;
    assert_eq!(source_refuses(older), Failure::Policy(Mismatch::Tcb));
    // Nothing is too old for an older one: the newer refuses.
    assert_eq!(target_refuses(older), Failure::Policy(Mismatch::Tcb));
    let strict = AgentPolicy {
        tcb: LeastTcb::AtLeast(tcb(23)),
        ..AgentPolicy::default()
    };
    let start = |seed| Start {
        policy: strict,
        ..Start::new(seed)
    };
    let [at_source, _] = refused(start(1), start(2));
    assert_eq!(at_source, Failure::Policy(Mismatch::Tcb));
}

#[test]
fn a_chain_that_does_not_end_at_a_trusted_root_is_not_believed() {
    let chains: [fn(&SimHost) -> Vec<u8>; 5] = [
        |host| Chain::of(host).forged().table(),
        |host| Chain::of(host).revoked().table(),
        // Of another chip.
        |_| Chain::of(&support::agents::host(9, 22)).table(),
        |_| Vec::from([0; 24]),
        |_| vec![0xff; 3000],
    ];
    for chain in chains {
        assert_eq!(
            source_refuses(|start| start.chain = chain),
            Failure::Evidence
        );
        assert_eq!(
            target_refuses(|start| start.chain = chain),
            Failure::Evidence
        );
    }
    // The judge trusts others, or lives in another time.
    let strangers = Start {
        roots: Roots::amd(),
        ..Start::new(1)
    };
    assert_eq!(refused(strangers, Start::new(2))[0], Failure::Evidence);
    let late = Start {
        now: 4_000_000_000,
        ..Start::new(1)
    };
    assert_eq!(refused(late, Start::new(2))[0], Failure::Evidence);
}

/// The messages of an exchange that went well, in order.
fn recorded(agents: [&mut SnpAgent<SimHost>; 2]) -> Vec<Vec<u8>> {
    let messages = Mutex::new(Vec::new());
    let done = meet(agents, &mut |_, message: Vec<u8>| {
        messages.lock().unwrap().push(message.clone());
        Some(message)
    });
    assert!(matches!(done, [Ok(_), Ok(_)]), "{done:?}");
    messages.into_inner().unwrap()
}

/// Bytes of a Reply before its evidence: kind, version, key.
const KEY: usize = 68;

#[test]
fn what_was_recorded_of_one_exchange_is_refused_in_the_next() {
    let mut sides = pair();
    let [(_, agent), (_, peer)] = &mut sides;
    let old = recorded([agent, peer]);
    assert_eq!(old.len(), 5);
    let replayed = [
        // With the old key the target's answer fits, and the source's next message does not.
        (0, [Failure::Binding, Failure::Refused(6)]),
        (1, [Failure::Binding, Failure::Refused(6)]),
        (2, [Failure::Refused(6), Failure::Binding]),
        (3, [Failure::Seal, Failure::Refused(8)]),
    ];
    for (nth, expected) in replayed {
        let done = meet([agent, peer], &mut |n, message| match n == nth {
            true => Some(old[nth].clone()),
            false => Some(message),
        });
        assert_eq!(done.each_ref().map(failure), expected, "message {nth}");
    }
    // The old report beside the new key.
    let done = meet([agent, peer], &mut |n, message| match n {
        1 => Some([&message[..KEY], &old[1][KEY..]].concat()),
        _ => Some(message),
    });
    assert_eq!(failure(&done[0]), Failure::Binding);
    let done = meet([agent, peer], &mut |n, message| match n {
        4 => Some(old[4].clone()),
        _ => Some(message),
    });
    assert!(done[0].is_ok());
    assert_eq!(failure(&done[1]), Failure::Seal);
    end(sides);
}

#[test]
fn a_link_that_ends_anywhere_ends_the_exchange_and_the_next_one_succeeds() {
    let mut sides = pair();
    let [(_, agent), (_, peer)] = &mut sides;
    for last in 0..5 {
        let done = meet([agent, peer], &mut |n, message| {
            (n < last).then_some(message)
        });
        // The source has nothing to wait for after its last message.
        let waits = [last < 4, true];
        for (done, waits) in done.iter().zip(waits) {
            match done {
                Err(ExchangeError::Link(_)) => assert!(waits),
                Ok(_) => assert!(!waits),
                other => panic!("after {last} messages: {other:?}"),
            }
        }
    }
    recorded([agent, peer]);
    end(sides);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_byte_anywhere_leaves_one_end_without_keys(
        changes in proptest::collection::vec((0..5usize, any::<u32>(), 1..=255u8), 4),
    ) {
        let mut sides = pair();
        let [(_, agent), (_, peer)] = &mut sides;
        for (nth, at, change) in changes {
            let done = meet([agent, peer], &mut |n, mut message| {
                if n == nth {
                    let at = at as usize % message.len();
                    message[at] ^= change;
                }
                Some(message)
            });
            // The end that the message went to notices, or the other by what that says.
            prop_assert!(done.iter().any(Result::is_err), "message {} byte {}: {:?}", nth, at, done);
        }
        end(sides);
    }
}
