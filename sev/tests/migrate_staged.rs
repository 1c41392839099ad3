//! The staged form: a one-time token buys a context.

#[path = "common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use common::*;
use kvm_ops_core::moves::{GuestName, MoveToken, StagingTable};
use kvm_ops_core::{
    Backend, EncCmd, EncRegion, Error, Field, Gfn, Host, Hpa, PspPort, Result, Step, Tech, VcpuId,
    VmOps,
};
use kvm_ops_sev::{GuestState, Identity, SevVm};
use kvm_ops_sim::{SevSetup, SimHost};
use proptest::prelude::*;

type Sev = SevVm<SimHost>;
type Table = Arc<StagingTable>;

const EPERM: i32 = 1;
const EINVAL: i32 = 22;
/// The kinds whose guests are named by a handle.
const LEGACY: [Tech; 2] = [Tech::Sev, Tech::SevEs];

fn launched(host: &SimHost, tech: Tech, vcpus: u32, ram: &Ram) -> Sev {
    let mut vm = with_ram(host, tech, vcpus.max(1), ram);
    for i in 0..vcpus {
        drop(vm.create_vcpu(VcpuId(i)).unwrap());
    }
    vm.add_initial_page(&measured(RAM, &page(0x5a))).unwrap();
    vm.vm_finalize().unwrap();
    vm
}

fn waiting(host: &SimHost, tech: Tech, vcpus: u32) -> Sev {
    let mut vm = create(host, tech, vcpus.max(1));
    vm.vm_init().unwrap();
    for i in 0..vcpus {
        drop(vm.create_vcpu(VcpuId(i)).unwrap());
    }
    vm
}

/// Numbers as random as a test needs.
fn random() -> impl FnMut(&mut [u8]) -> Result<()> {
    static SEED: AtomicU32 = AtomicU32::new(1);
    let mut state = u64::from(SEED.fetch_add(1, Ordering::Relaxed)) << 20;
    move |out| {
        for byte in out {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            *byte = (state >> 40) as u8;
        }
        Ok(())
    }
}

fn send(vm: &mut Sev, table: &Table) -> Result<MoveToken> {
    let mut token = None;
    vm.local_send(table, &mut random(), &mut |made| {
        token = Some(*made);
        Ok(())
    })?;
    Ok(token.unwrap())
}

fn receive(vm: &mut Sev, table: &Table, token: &MoveToken) -> Result<GuestName> {
    vm.local_receive(table, token, &mut |_| Ok(()))
}

/// The name by which firmware knows the VM's guest.
fn name(vm: &Sev) -> Option<GuestName> {
    Some(match vm.identity()? {
        Identity::Handle(handle) => GuestName::Handle(handle),
        Identity::Gctx(page) => GuestName::Page(page.base()?),
    })
}

fn command(vm: &mut Sev, id: u32, data: &mut [u8]) -> i32 {
    let mut cmd = EncCmd {
        id,
        flags: 0,
        data,
        firmware_status: 0,
    };
    vm.mem_enc_op(&mut cmd)
        .map_or_else(|error| error.errno(), |()| 0)
}

/// DBG_DECRYPT of 16 bytes of the first page.
fn debug(vm: &mut Sev, ram: &Ram) -> std::result::Result<[u8; 16], i32> {
    let mut data = [0; 40];
    data[..8].copy_from_slice(&ram.address().to_le_bytes());
    data[8..16].copy_from_slice(&24u64.to_le_bytes());
    data[16..20].copy_from_slice(&16u32.to_le_bytes());
    match command(vm, 17, &mut data) {
        0 => Ok(data[24..].try_into().unwrap()),
        errno => Err(errno),
    }
}

fn everything_gone(host: &SimHost, table: &Table) {
    nothing_left(host);
    assert_eq!(host.psp().unwrap().asid_pools().leaked(), 0);
    assert!(table.is_empty());
}

fn drop_all(vms: impl IntoIterator<Item = Sev>) {
    vms.into_iter().for_each(free_clean);
}

#[test]
fn a_staged_context_is_received_once_with_pages_regions_and_registers() {
    for tech in TECHS {
        let (host, ram, table) = (host(1), Ram::new(1 << 20), Table::default());
        let mut source = launched(&host, tech, 2, &ram);
        let region = EncRegion {
            address: ram.address(),
            bytes: PAGE,
        };
        source.mem_enc_register_region(region).unwrap();
        let named = name(&source);
        let (asid, held) = (source.asid(), source.account().held());
        let token = send(&mut source, &table).unwrap();
        assert_eq!(
            source.asid(),
            asid,
            "until it is received the context is the source's"
        );

        let mut target = waiting(&host, tech, 2);
        let received = receive(&mut target, &table, &token).unwrap();
        assert_eq!((Some(received), name(&target)), (named, named));
        assert_eq!(name(&source), None);
        assert_eq!((target.asid(), target.step()), (asid, Step::Runnable));
        assert_eq!(target.guest_state(), GuestState::Running);
        assert_eq!(
            (source.account().held(), target.account().held()),
            (0, held)
        );
        assert_eq!((source.locked_pages(), target.locked_pages()), (0, 1));
        let mut again = waiting(&host, tech, 2);
        let reused = Err(Error::NotFound(Field::Token, 0));
        assert_eq!(receive(&mut again, &table, &token), reused);
        drop_all([source, target, again]);
        everything_gone(&host, &table);
    }
}

#[test]
fn a_staged_source_takes_debug_commands_only_before_and_after_it_is_received() {
    for tech in LEGACY {
        let (host, ram, table) = (host(2), Ram::new(1 << 20), Table::default());
        let mut source = launched(&host, tech, 1, &ram);
        let mut target = with_ram(&host, tech, 1, &ram);
        drop(target.create_vcpu(VcpuId(0)).unwrap());
        let token = send(&mut source, &table).unwrap();
        for received in [false, true] {
            if received {
                receive(&mut target, &table, &token).unwrap();
            }
            for id in (0..104).filter(|id| ![17, 18].contains(id)) {
                assert_eq!(command(&mut source, id, &mut []), EPERM, "{id} {received}");
            }
            assert_eq!(
                debug(&mut source, &ram),
                Ok([0x5a; 16]),
                "received: {received}"
            );
            let region = EncRegion {
                address: ram.address(),
                bytes: PAGE,
            };
            let refused = source.mem_enc_register_region(region).unwrap_err();
            assert_eq!(refused.errno(), EPERM);
            assert!(source.pre_fault_memory(Gfn::new(RAM >> 12), 1).is_err());
            let mut third = waiting(&host, tech, 1);
            assert!(Sev::move_context(&mut source, &mut third).is_err());
            free_clean(third);
        }
        // Never by number: when the guest is gone there is nothing to debug, whoever has its handle.
        free_clean(target);
        assert!(debug(&mut source, &ram).is_err());
        free_clean(source);
        everything_gone(&host, &table);
    }
}

#[test]
fn a_source_that_is_gone_makes_its_token_worthless() {
    let (host, ram, table) = (host(3), Ram::new(1 << 20), Table::default());
    let mut source = launched(&host, Tech::Sev, 0, &ram);
    let token = send(&mut source, &table).unwrap();
    free_clean(source);
    assert!(table.is_empty());
    let mut target = waiting(&host, Tech::Sev, 0);
    let worthless = Err(Error::NotFound(Field::Token, 0));
    assert_eq!(receive(&mut target, &table, &token), worthless);
    free_clean(target);
    everything_gone(&host, &table);
}

#[test]
fn what_cannot_be_delivered_has_not_happened() {
    let (host, ram, table) = (host(4), Ram::new(1 << 20), Table::default());
    let mut source = launched(&host, Tech::Sev, 0, &ram);
    let before = source.context_facts();
    // The token does not reach its caller.
    let undelivered = source.local_send(&table, &mut random(), &mut |_| Err(Error::Busy));
    assert_eq!(undelivered, Err(Error::Busy));
    assert_eq!((source.step(), table.len()), (Step::Runnable, 0));
    assert_eq!(command(&mut source, 16, &mut [0; 12]), 0);
    // Nor does the handle: the token is good still, and both are as before.
    let token = send(&mut source, &table).unwrap();
    let mut target = waiting(&host, Tech::Sev, 0);
    let own = target.asid();
    let lost = target.local_receive(&table, &token, &mut |_| Err(Error::Busy));
    assert_eq!(lost, Err(Error::Busy));
    assert_eq!(
        (target.asid(), target.step(), table.len()),
        (own, Step::Initialized, 1)
    );
    assert_eq!(source.context_facts(), before);
    assert!(receive(&mut target, &table, &token).is_ok());
    drop_all([source, target]);
    everything_gone(&host, &table);
}

#[test]
fn a_token_taken_back_lets_the_source_run_on() {
    let (host, ram, table) = (host(5), Ram::new(1 << 20), Table::default());
    let mut source = launched(&host, Tech::SevEs, 1, &ram);
    let token = send(&mut source, &table).unwrap();
    assert_eq!(source.step(), Step::Poisoned);
    source.local_cancel().unwrap();
    assert_eq!((source.step(), table.len()), (Step::Runnable, 0));
    assert!(source.local_cancel().is_err());
    let mut target = waiting(&host, Tech::SevEs, 1);
    assert!(receive(&mut target, &table, &token).is_err());
    let token = send(&mut source, &table).unwrap();
    assert!(receive(&mut target, &table, &token).is_ok());
    drop_all([target, source]);
    everything_gone(&host, &table);
}

#[test]
fn who_may_not_send_is_told_why() {
    let (host, ram, table) = (host(6), Ram::new(1 << 20), Table::default());
    let errno = |vm: &mut Sev| send(vm, &table).unwrap_err().errno();
    let mut uninitialised = create(&host, Tech::Sev, 1);
    assert_eq!(errno(&mut uninitialised), 25);
    let mut unlaunched = waiting(&host, Tech::Sev, 0);
    assert_eq!(errno(&mut unlaunched), EINVAL);
    let mut snp = with_ram(&host, Tech::SevSnp, 1, &ram);
    snp.add_initial_page(&measured(RAM, &page(1))).unwrap();
    assert_eq!(errno(&mut snp), EINVAL, "launched, but not finished");
    let mut source = launched(&host, Tech::Sev, 0, &ram);
    let mut mirror = waiting(&host, Tech::Sev, 0);
    Sev::copy_context(&mut source, &mut mirror).unwrap();
    assert_eq!(errno(&mut mirror), EINVAL);
    send(&mut source, &table).unwrap();
    assert_eq!(errno(&mut source), 17);
    drop_all([uninitialised, unlaunched, snp, mirror, source]);
    everything_gone(&host, &table);
}

#[test]
fn who_may_not_receive_leaves_the_token_good() {
    let (host, abroad, ram) = (host(7), common::host(8), Ram::new(1 << 20));
    let table = Table::default();
    let mut source = launched(&host, Tech::SevEs, 1, &ram);
    let token = send(&mut source, &table).unwrap();
    let mut with_regions = waiting(&host, Tech::SevEs, 1);
    let region = EncRegion {
        address: ram.address(),
        bytes: PAGE,
    };
    with_regions.mem_enc_register_region(region).unwrap();
    let launched_one = launched(&host, Tech::SevEs, 1, &ram);
    let foreign = waiting(&abroad, Tech::SevEs, 1);
    let (other, fewer) = (waiting(&host, Tech::Sev, 1), create(&host, Tech::SevEs, 1));
    let mut unfit = [with_regions, launched_one, other, fewer, foreign];
    for vm in &mut unfit {
        assert_eq!(receive(vm, &table, &token).unwrap_err().errno(), EINVAL);
        assert_eq!(table.len(), 1);
    }
    drop_all(unfit);
    let mut target = create(&host, Tech::SevEs, 1);
    target.vm_init().unwrap();
    drop(target.create_vcpu(VcpuId(0)).unwrap());
    assert!(receive(&mut target, &table, &token).is_ok());
    drop_all([source, target]);
    everything_gone(&host, &table);
    nothing_left(&abroad);
}

#[test]
fn a_token_close_to_the_right_one_is_as_wrong_as_any() {
    let (host, ram, table) = (host(9), Ram::new(1 << 20), Table::default());
    let mut source = launched(&host, Tech::Sev, 0, &ram);
    let token = send(&mut source, &table).unwrap().to_bytes();
    let mut target = waiting(&host, Tech::Sev, 0);
    for bit in 0..128 {
        let mut close = token;
        close[bit / 8] ^= 1 << (bit % 8);
        assert!(receive(&mut target, &table, &MoveToken::from_bytes(close)).is_err());
    }
    // On another machine's table it is nothing.
    assert!(
        receive(
            &mut target,
            &Table::default(),
            &MoveToken::from_bytes(token)
        )
        .is_err()
    );
    assert!(receive(&mut target, &table, &MoveToken::from_bytes(token)).is_ok());
    drop_all([source, target]);
    everything_gone(&host, &table);
}

#[test]
fn one_of_many_receivers_gets_it() {
    for _ in 0..20 {
        let (host, ram, table) = (host(10), Ram::new(1 << 20), Table::default());
        let mut source = launched(&host, Tech::Sev, 0, &ram);
        let token = send(&mut source, &table).unwrap();
        let mut targets: Vec<_> = (0..3).map(|_| waiting(&host, Tech::Sev, 0)).collect();
        let got: usize = thread::scope(|scope| {
            let threads: Vec<_> = targets
                .iter_mut()
                .map(|vm| scope.spawn(|| usize::from(receive(vm, &table, &token).is_ok())))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(got, 1);
        drop_all(targets.into_iter().chain([source]));
        everything_gone(&host, &table);
    }
}

#[test]
fn a_source_that_goes_while_it_is_received_loses_nothing_twice() {
    for round in 0..60 {
        let (host, ram, table) = (host(11), Ram::new(1 << 20), Table::default());
        let mut source = launched(&host, Tech::Sev, 0, &ram);
        let token = send(&mut source, &table).unwrap();
        let mut target = waiting(&host, Tech::Sev, 0);
        let (report, received) = thread::scope(|scope| {
            let going = scope.spawn(|| free(source));
            let refuse = round % 3 == 0;
            let received = target.local_receive(&table, &token, &mut |_| match refuse {
                true => Err(Error::Busy),
                false => Ok(()),
            });
            (going.join().unwrap(), received)
        });
        let keys = free(target).keys_freed;
        assert!(report.is_clean());
        // The target's own unused key never reached firmware; the guest's is freed by one of both.
        assert!(received.is_err() || report.keys_freed == 0);
        assert!(report.keys_freed + keys >= 1);
        everything_gone(&host, &table);
    }
}

/// An act of a history on one of four VMs.
#[derive(Clone, Copy, Debug)]
enum Act {
    Send,
    Cancel,
    Receive(usize),
    ReceiveUndelivered(usize),
    MoveTo(usize),
    Mirror(usize),
    Replace,
    FailNext(u8),
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::Send),
        1 => Just(Act::Cancel),
        3 => (0..4usize).prop_map(Act::Receive),
        1 => (0..4usize).prop_map(Act::ReceiveUndelivered),
        3 => (0..4usize).prop_map(Act::MoveTo),
        2 => (0..4usize).prop_map(Act::Mirror),
        2 => Just(Act::Replace),
        1 => any::<u8>().prop_map(Act::FailNext),
    ]
}

/// Found by the histories below: the mirrors of a receiver would have kept a context that is replaced.
#[test]
fn a_vm_with_mirrors_receives_no_context() {
    let (host, ram, table) = (host(13), Ram::new(1 << 20), Table::default());
    let mut source = launched(&host, Tech::Sev, 0, &ram);
    let mut receiver = waiting(&host, Tech::Sev, 0);
    let mut mirror = waiting(&host, Tech::Sev, 0);
    Sev::copy_context(&mut receiver, &mut mirror).unwrap();
    let moved = Sev::move_context(&mut source, &mut receiver);
    assert_eq!(moved.unwrap_err().errno(), EINVAL);
    drop_all([source, receiver, mirror]);
    everything_gone(&host, &table);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done in whatever order, and whatever command fails: each guest that firmware
    /// knows has one VM that owns it, mirrors aside, and in the end nothing is left but leaks that
    /// are listed.
    #[test]
    fn one_owner_at_every_moment(
        snp in any::<bool>(),
        history in proptest::collection::vec((0..4usize, any_act()), 1..40),
    ) {
        let tech = if snp { Tech::SevSnp } else { Tech::Sev };
        // Four VMs, and one that replaces another.
        let setup = SevSetup::new(platform(12).asids(6, 12));
        let (host, ram, table) = (host_from(setup), Ram::new(1 << 20), Table::default());
        let mut vms: Vec<Sev> = vec![launched(&host, tech, 0, &ram)];
        vms.extend((0..3).map(|_| waiting(&host, tech, 0)));
        let mut tokens: Vec<MoveToken> = Vec::new();
        let mut leaks = 0;
        for (at, act) in history {
            match act {
                Act::Send => tokens.extend(send(&mut vms[at], &table)),
                Act::Cancel => { let _ = vms[at].local_cancel(); }
                Act::Receive(n) | Act::ReceiveUndelivered(n) if !tokens.is_empty() => {
                    let token = tokens[n % tokens.len()];
                    let fails = matches!(act, Act::ReceiveUndelivered(_));
                    let _ = vms[at].local_receive(&table, &token, &mut |_| match fails {
                        true => Err(Error::Busy),
                        false => Ok(()),
                    });
                }
                Act::MoveTo(to) if to != at => {
                    let [from, to] = vms.get_disjoint_mut([at, to]).unwrap();
                    let before = from.context_facts();
                    if Sev::move_context(from, to).is_err() {
                        prop_assert_eq!(from.context_facts(), before);
                    }
                }
                Act::Mirror(to) if to != at => {
                    let [owner, mirror] = vms.get_disjoint_mut([at, to]).unwrap();
                    let _ = Sev::copy_context(owner, mirror);
                }
                Act::Replace => {
                    let mut new = create(&host, tech, 1);
                    if new.vm_init().is_ok() {
                        let _ = new.set_memory_slot(&ram.slot(0, RAM));
                        if new.add_initial_page(&measured(RAM, &page(1))).is_ok() {
                            let _ = new.vm_finalize();
                        }
                    }
                    leaks += free(std::mem::replace(&mut vms[at], new)).leaks.len();
                }
                Act::FailNext(n) => {
                    let all = soft_amd_sp::Command::ALL;
                    let command = all[usize::from(n) % all.len()];
                    sp(&host).fail_next(command, soft_amd_sp::Status::RESOURCE_LIMIT);
                }
                _ => {}
            }
            check_owners(&host, &vms, leaks)?;
        }
        sp(&host).clear_failures();
        for vm in vms {
            leaks += free(vm).leaks.len();
        }
        prop_assert!(table.is_empty());
        prop_assert!(guests(&host).len() <= leaks);
        if leaks == 0 {
            everything_gone(&host, &table);
        }
    }
}

/// The guests that firmware knows.
fn guests(host: &SimHost) -> Vec<GuestName> {
    let snapshot = sp(host).snapshot();
    let legacy = snapshot
        .guests
        .iter()
        .map(|guest| GuestName::Handle(guest.handle));
    let snp = snapshot.snp_guests.iter();
    let snp = snp.map(|guest| GuestName::Page(Hpa::new(guest.context)));
    legacy.chain(snp).collect()
}

fn check_owners(
    host: &SimHost,
    vms: &[Sev],
    leaks: usize,
) -> std::result::Result<(), TestCaseError> {
    let guests = guests(host);
    let mut owned = 0;
    for guest in &guests {
        let holders: Vec<_> = vms.iter().filter(|vm| name(vm) == Some(*guest)).collect();
        let owners = holders.iter().filter(|vm| !vm.is_mirror()).count();
        prop_assert!(owners <= 1, "guest {guest:?} has {owners} owners");
        // Without an owner there are mirrors that keep its estate, or firmware kept it for good.
        owned += usize::from(!holders.is_empty());
    }
    prop_assert!(
        guests.len() - owned <= leaks,
        "{} guests, {owned} owned",
        guests.len()
    );
    let pages: u64 = vms.iter().map(|vm| vm.account().held()).sum();
    let out = host.pages().unwrap().frames_out();
    let estates = vms.iter().any(Sev::is_mirror);
    prop_assert!(
        pages == out || leaks > 0 || estates,
        "{pages} on the books, {out} out"
    );
    Ok(())
}
