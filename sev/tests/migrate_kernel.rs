//! The kernel's own cases of moving and mirroring (Linux `sev_migrate_tests.c`), by number, and the
//! flaws that reading its code shows. M0 asks the processor for SEV and is every test's `host`.

#[path = "common/mod.rs"]
mod common;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::thread;

use common::*;
use kvm_ops_core::Host;
use kvm_ops_core::guest::Script;
use kvm_ops_core::{
    Backend, EncCmd, EncRegion, Error, Exit, Field, Gfn, Gpa, Level, PspPort, SevParams, Step,
    Tech, VcpuId, VcpuOps, VmOps,
};
use kvm_ops_sev::migrate::KeyAccount;
use kvm_ops_sev::{GuestState, SevVcpu, SevVm};
use kvm_ops_sim::SimHost;
use soft_amd_sp::Command;

type Sev = SevVm<SimHost>;

/// The kernel's cases, and SNP, which the kernel refuses to move.
const MOVABLE: [Tech; 3] = TECHS;
/// The kinds that have mirrors.
const MIRRORED: [Tech; 2] = [Tech::Sev, Tech::SevEs];

fn move_to(to: &mut Sev, from: &mut Sev) -> Result<(), Error> {
    Sev::move_context(from, to)
}

fn mirror_of(to: &mut Sev, owner: &mut Sev) -> Result<(), Error> {
    Sev::copy_context(owner, to)
}

fn errno(result: Result<(), Error>) -> i32 {
    result.map_or_else(|error| error.errno(), |()| 0)
}

const EINVAL: i32 = 22;
const EIO: i32 = 5;
const EBUSY: i32 = 16;

/// As the tests' `sev_vm_create`: launched, with vCPUs, not run.
fn launched(host: &SimHost, tech: Tech, vcpus: u32, ram: &Ram) -> Sev {
    let mut vm = with_ram(host, tech, vcpus.max(1), ram);
    let vcpus: Vec<_> = (0..vcpus)
        .map(|i| vm.create_vcpu(VcpuId(i)).unwrap())
        .collect();
    vm.add_initial_page(&measured(RAM, &page(0x5a))).unwrap();
    vm.vm_finalize().unwrap();
    drop(vcpus);
    vm
}

/// As the tests' `aux_vm_create`: not initialised, with vCPUs.
fn bare(host: &SimHost, tech: Tech, vcpus: u32) -> Sev {
    let mut vm = create(host, tech, vcpus.max(1));
    if vcpus > 0 {
        vm.vm_init().unwrap();
    }
    for i in 0..vcpus {
        drop(vm.create_vcpu(VcpuId(i)).unwrap());
    }
    vm
}

fn everything_gone(host: &SimHost) {
    nothing_left(host);
    assert_eq!(host.psp().unwrap().asid_pools().leaked(), 0);
}

#[test]
fn m01_a_context_moves_from_vm_to_vm_to_vm() {
    for tech in MOVABLE {
        let (host, ram) = (host(1), Ram::new(1 << 20));
        let mut from = launched(&host, tech, 2, &ram);
        let asid = from.asid();
        let mut chain = Vec::new();
        for _ in 0..3 {
            let mut to = bare(&host, tech, 2);
            assert_eq!(move_to(&mut to, &mut from), Ok(()), "{tech}");
            assert_eq!((to.asid(), to.step()), (asid, Step::Runnable));
            assert_eq!(from.account().held(), 0);
            chain.push(std::mem::replace(&mut from, to));
        }
        assert!(from.page_of(Gfn::new(RAM >> 12)).is_some());
        drop_all(chain.into_iter().chain([from]));
        everything_gone(&host);
    }
}

fn drop_all(vms: impl IntoIterator<Item = Sev>) {
    vms.into_iter().for_each(free_clean);
}

#[test]
fn m02_nothing_moves_back_to_a_vm_that_gave_its_context_away() {
    for tech in MOVABLE {
        let (host, ram) = (host(2), Ram::new(1 << 20));
        let mut from = launched(&host, tech, 1, &ram);
        let mut to = bare(&host, tech, 1);
        move_to(&mut to, &mut from).unwrap();
        assert_eq!(errno(move_to(&mut from, &mut to)), EIO);
        // The refusal cost the owner nothing.
        assert_eq!((to.step(), from.step()), (Step::Runnable, Step::Poisoned));
        let mut third = bare(&host, tech, 1);
        assert_eq!(errno(move_to(&mut third, &mut from)), EIO);
        free_clean(third);
        let mut data = [0; 64];
        let mut cmd = EncCmd {
            id: 16,
            flags: 0,
            data: &mut data,
            firmware_status: 0,
        };
        assert_eq!(errno(from.mem_enc_op(&mut cmd)), EIO);
        assert_eq!(errno(from.create_vcpu(VcpuId(0)).map(|_| ())), EIO);
        drop_all([from, to]);
        everything_gone(&host);
    }
}

#[test]
fn m03_sources_and_destinations_go_in_any_order() {
    for (tech, order) in MOVABLE
        .into_iter()
        .flat_map(|t| (0..6).map(move |o| (t, o)))
    {
        let (host, ram) = (host(3), Ram::new(1 << 20));
        let mut a = launched(&host, tech, 1, &ram);
        let (mut b, mut c) = (bare(&host, tech, 1), bare(&host, tech, 1));
        move_to(&mut b, &mut a).unwrap();
        move_to(&mut c, &mut b).unwrap();
        let mut vms = vec![a, b, c];
        let first = vms.remove(order % 3);
        drop_all([first, vms.remove(order / 3), vms.remove(0)]);
        everything_gone(&host);
    }
}

#[test]
fn m04_moves_of_three_threads_in_a_ring_end_and_leave_one_owner_each() {
    let (host, ram) = (host(4), Ram::new(1 << 20));
    let vms: Vec<_> = (0..3)
        .map(|_| Mutex::new(launched(&host, Tech::Sev, 0, &ram)))
        .collect();
    let empty: Vec<_> = (0..2)
        .map(|_| Mutex::new(bare(&host, Tech::Sev, 0)))
        .collect();
    let all: Vec<_> = vms.iter().chain(&empty).collect();
    let moved = thread::scope(|scope| {
        let threads: Vec<_> = (0..3usize)
            .map(|n| {
                let all = &all;
                scope.spawn(move || {
                    let mut moved = 0;
                    for i in 0..10_000usize {
                        let (to, from) = (all[n], all[(i + n) % all.len()]);
                        if std::ptr::eq(to, from) {
                            continue;
                        }
                        let (Ok(mut to), Ok(mut from)) = (to.try_lock(), from.try_lock()) else {
                            continue;
                        };
                        moved += u32::from(move_to(&mut to, &mut from).is_ok());
                        // The other way, into a VM that waits for one.
                        let away = all[3 + i % 2];
                        if let Ok(mut away) = away.try_lock() {
                            moved += u32::from(move_to(&mut away, &mut to).is_ok());
                        }
                    }
                    moved
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum::<u32>()
    });
    // Three contexts, two VMs to go to, and no way back: M2. Fewer, where a thread that is off its
    // processor holds a lock for as long as the others try.
    assert!(moved <= 2, "{moved}");
    let vms: Vec<_> = vms
        .into_iter()
        .chain(empty)
        .map(|m| m.into_inner().unwrap())
        .collect();
    let owners: BTreeSet<_> = vms
        .iter()
        .filter_map(|vm| vm.identity().map(|_| vm.asid()))
        .collect();
    assert_eq!(owners.len(), 3);
    assert_eq!(sp(&host).snapshot().guests.len(), 3);
    drop_all(vms);
    everything_gone(&host);
}

// M5, a source that is no SEV VM, needs a VM of another technology: tests/migrate.rs of kvm-ops.

#[test]
fn m06_m07_a_context_fits_no_vm_of_another_kind() {
    let (host, ram) = (host(6), Ram::new(1 << 20));
    for (to_tech, from_tech) in [
        (Tech::Sev, Tech::SevEs),
        (Tech::SevEs, Tech::Sev),
        (Tech::SevEs, Tech::SevSnp),
        (Tech::SevSnp, Tech::SevEs),
    ] {
        let mut from = launched(&host, from_tech, 1, &ram);
        let mut launched_one = launched(&host, to_tech, 1, &ram);
        let mut fresh = bare(&host, to_tech, 1);
        assert_eq!(errno(move_to(&mut launched_one, &mut from)), EINVAL);
        assert_eq!(errno(move_to(&mut fresh, &mut from)), EINVAL);
        assert_eq!(from.step(), Step::Runnable);
        drop_all([from, launched_one, fresh]);
    }
    everything_gone(&host);
}

#[test]
fn m08_encrypted_registers_move_only_to_as_many_vcpus() {
    let (host, ram) = (host(8), Ram::new(1 << 20));
    for tech in [Tech::SevEs, Tech::SevSnp] {
        let mut from = launched(&host, tech, 4, &ram);
        for vcpus in [0, 3] {
            let mut to = bare(&host, tech, vcpus);
            assert_eq!(errno(move_to(&mut to, &mut from)), EINVAL);
            assert_eq!(
                (from.step(), from.guest_state()),
                (Step::Runnable, GuestState::Running)
            );
            free_clean(to);
        }
        free_clean(from);
    }
    // Without encrypted registers the number does not matter.
    let mut plain = launched(&host, Tech::Sev, 4, &ram);
    let mut to = bare(&host, Tech::Sev, 0);
    assert_eq!(move_to(&mut to, &mut plain), Ok(()));
    drop_all([plain, to]);
    everything_gone(&host);
}

#[test]
fn m09_registers_that_are_not_encrypted_yet_do_not_move() {
    for tech in [Tech::SevEs, Tech::SevSnp] {
        let (host, ram) = (host(9), Ram::new(1 << 20));
        let mut from = with_ram(&host, tech, 1, &ram);
        drop(from.create_vcpu(VcpuId(0)).unwrap());
        from.add_initial_page(&measured(RAM, &page(1))).unwrap();
        // As many vCPUs: what is missing is LAUNCH_UPDATE_VMSA alone, which the kernel's case mixes.
        let mut to = bare(&host, tech, 1);
        assert_eq!(errno(move_to(&mut to, &mut from)), EINVAL);
        assert_eq!(from.step(), Step::Initialized);
        from.vm_finalize().unwrap();
        assert_eq!(move_to(&mut to, &mut from), Ok(()));
        drop_all([from, to]);
        everything_gone(&host);
    }
}

#[test]
fn m10_mirrors_and_owners_move_in_turns() {
    let (host, ram) = (host(10), Ram::new(1 << 20));
    let mut owner = launched(&host, Tech::Sev, 0, &ram);
    let [
        mut mirror,
        mut dst_m,
        mut dst,
        mut dst2,
        mut dst2_m,
        mut dst3_m,
        mut dst3,
    ] = [(); 7].map(|()| bare(&host, Tech::Sev, 0));
    assert_eq!(mirror_of(&mut mirror, &mut owner), Ok(()));
    assert_eq!(move_to(&mut dst_m, &mut mirror), Ok(()));
    assert_eq!(move_to(&mut dst, &mut owner), Ok(()));
    assert_eq!(move_to(&mut dst2, &mut dst), Ok(()));
    assert_eq!(move_to(&mut dst2_m, &mut dst_m), Ok(()));
    assert_eq!(move_to(&mut dst3_m, &mut dst2_m), Ok(()));
    assert_eq!(move_to(&mut dst3, &mut dst2), Ok(()));
    assert_eq!(dst3_m.asid(), dst3.asid());
    drop_all([dst, owner, dst2, dst3, mirror, dst_m, dst2_m]);
    // The context lives as long as its last mirror.
    assert_eq!(sp(&host).snapshot().guests.len(), 1);
    let report = free(dst3_m);
    assert_eq!(
        (report.keys_freed, report.pages_freed, report.leaks.len()),
        (1, 1, 0)
    );
    everything_gone(&host);
}

#[test]
fn m11_a_mirror_goes_before_its_owner() {
    let (host, ram) = (host(11), Ram::new(1 << 20));
    let mut owner = launched(&host, Tech::Sev, 0, &ram);
    let [mut mirror, mut dst_m, mut dst] = [(); 3].map(|()| bare(&host, Tech::Sev, 0));
    assert_eq!(mirror_of(&mut mirror, &mut owner), Ok(()));
    assert_eq!(move_to(&mut dst_m, &mut mirror), Ok(()));
    assert_eq!(move_to(&mut dst, &mut owner), Ok(()));
    for vm in [mirror, dst_m] {
        let report = free(vm);
        assert_eq!(
            (report.keys_freed, report.pages_freed, report.leaks.len()),
            (0, 0, 0)
        );
    }
    assert_eq!(free(dst).keys_freed, 1);
    free_clean(owner);
    everything_gone(&host);
}

#[test]
fn m12_a_mirror_gets_vcpus_of_its_own() {
    for tech in MIRRORED {
        let (host, ram) = (host(12), Ram::new(1 << 20));
        let mut owner = with_ram(&host, tech, 4, &ram);
        owner.add_initial_page(&measured(RAM, &page(1))).unwrap();
        let mut mirror = create(&host, tech, 4);
        assert_eq!(mirror_of(&mut mirror, &mut owner), Ok(()), "{tech}");
        let mut vcpus: Vec<_> = (0..4)
            .map(|i| mirror.create_vcpu(VcpuId(i)).unwrap())
            .collect();
        if tech == Tech::SevEs {
            // Registers that were not measured are the host's choice: they do not run.
            let unmeasured = Err(Error::WrongState(Step::Runnable));
            assert_eq!(vcpus[0].vcpu_run(), unmeasured);
            let mut cmd = EncCmd {
                id: 4,
                flags: 0,
                data: &mut [],
                firmware_status: 0,
            };
            assert_eq!(mirror.mem_enc_op(&mut cmd), Ok(()));
            assert!(vcpus.iter().all(SevVcpu::is_protected));
        }
        drop(vcpus);
        drop_all([mirror, owner]);
        everything_gone(&host);
    }
}

#[test]
fn m13_m14_a_mirror_may_ask_for_four_commands() {
    for tech in MIRRORED {
        let (host, ram) = (host(13), Ram::new(1 << 20));
        let mut owner = launched(&host, tech, 0, &ram);
        let mut mirror = bare(&host, tech, 0);
        mirror_of(&mut mirror, &mut owner).unwrap();
        for id in (0..104).filter(|id| ![4, 16, 17, 18].contains(id)) {
            let mut cmd = EncCmd {
                id,
                flags: 0,
                data: &mut [],
                firmware_status: 0,
            };
            assert_eq!(errno(mirror.mem_enc_op(&mut cmd)), EINVAL, "{id}");
        }
        let mut data = [0; 12];
        let mut cmd = EncCmd {
            id: 16,
            flags: 0,
            data: &mut data,
            firmware_status: 0,
        };
        assert_eq!(mirror.mem_enc_op(&mut cmd), Ok(()));
        let region = EncRegion {
            address: ram.address(),
            bytes: PAGE,
        };
        assert_eq!(errno(mirror.mem_enc_register_region(region)), EINVAL);
        drop_all([owner, mirror]);
        everything_gone(&host);
    }
}

// M15, a VM that is to be its own mirror, does not compile: see `kvm_ops_sev::migrate`.

// M16, an owner that is no SEV VM: tests/migrate.rs of kvm-ops.

#[test]
fn m17_a_vm_with_vcpus_becomes_no_mirror() {
    let (host, ram) = (host(17), Ram::new(1 << 20));
    let mut owner = launched(&host, Tech::Sev, 1, &ram);
    let mut mirror = bare(&host, Tech::Sev, 1);
    assert_eq!(errno(mirror_of(&mut mirror, &mut owner)), EINVAL);
    drop_all([owner, mirror]);
    everything_gone(&host);
}

#[test]
fn m18_m19_a_mirror_is_of_its_owners_kind() {
    let (host, ram) = (host(18), Ram::new(1 << 20));
    for (to, from) in [(Tech::Sev, Tech::SevEs), (Tech::SevEs, Tech::Sev)] {
        let (mut owner, mut mirror) = (launched(&host, from, 0, &ram), bare(&host, to, 0));
        assert_eq!(errno(mirror_of(&mut mirror, &mut owner)), EINVAL);
        // Nor is a mirror anyone's owner.
        let (mut good, mut third) = (bare(&host, from, 0), bare(&host, from, 0));
        mirror_of(&mut good, &mut owner).unwrap();
        assert_eq!(errno(mirror_of(&mut third, &mut good)), EINVAL);
        drop_all([owner, mirror, good, third]);
    }
    everything_gone(&host);
}

#[test]
fn vms_of_other_machines_and_mirrors_of_snp_guests_are_refused() {
    let (host, other, ram) = (host(19), common::host(20), Ram::new(1 << 20));
    let mut snp = launched(&host, Tech::SevSnp, 0, &ram);
    let mut other_snp = bare(&host, Tech::SevSnp, 0);
    assert_eq!(errno(mirror_of(&mut other_snp, &mut snp)), EINVAL);
    for tech in MOVABLE {
        let mut from = launched(&host, tech, 1, &ram);
        let mut abroad = bare(&other, tech, 1);
        assert_eq!(errno(move_to(&mut abroad, &mut from)), EINVAL);
        assert_eq!(errno(mirror_of(&mut abroad, &mut from)), EINVAL);
        drop_all([from, abroad]);
    }
    drop_all([snp, other_snp]);
    everything_gone(&host);
    everything_gone(&other);
}

#[test]
fn the_cost_does_not_grow_with_the_guest() {
    let mut counts = Vec::new();
    for (tech, pages) in MOVABLE
        .into_iter()
        .flat_map(|tech| [1u64, 64, 1024].map(|pages| (tech, pages)))
    {
        let (host, ram) = (host(21), Ram::new(8 << 20));
        let mut from = launched(&host, tech, 1, &ram);
        assert_eq!(
            from.pre_fault_memory(Gfn::new((RAM >> 12) + 1), pages),
            Ok(pages)
        );
        let mut to = with_ram(&host, tech, 1, &ram);
        drop(to.create_vcpu(VcpuId(0)).unwrap());
        let held = from.account().held();
        let before = sp(&host).counters().iter().map(|(_, _, n)| n).sum::<u64>();
        move_to(&mut to, &mut from).unwrap();
        counts.push(sp(&host).counters().iter().map(|(_, _, n)| n).sum::<u64>() - before);
        assert_eq!((from.account().held(), to.account().held()), (0, held));
        assert!(held > pages);
        drop_all([from, to]);
        everything_gone(&host);
    }
    assert_eq!(counts, [0; 9], "commands and instructions of the machine");
}

#[test]
fn the_guest_runs_on_where_its_context_went() {
    for tech in MOVABLE {
        let (host, ram) = (host(22), Ram::new(1 << 20));
        let mut from = with_ram(&host, tech, 1, &ram);
        let mut source_vcpu = from.create_vcpu(VcpuId(0)).unwrap();
        from.add_initial_page(&measured(RAM, &page(0x11))).unwrap();
        from.vm_finalize().unwrap();
        let secret = Gpa::new(C | (RAM + 0x1008));
        let secret_page = Gpa::new(RAM + 0x1000);
        let accepted = match tech {
            Tech::SevSnp => Script::new().accept(secret_page, Level::Size4K),
            _ => Script::new(),
        };
        common::load(&mut source_vcpu, accepted.write(secret, b"kept"));
        run(&from, &mut source_vcpu);

        let mut to = with_ram(&host, tech, 1, &ram);
        let mut vcpu = to.create_vcpu(VcpuId(0)).unwrap();
        move_to(&mut to, &mut from).unwrap();
        assert_eq!(source_vcpu.vcpu_run().unwrap_err(), Error::Poisoned);
        assert_eq!(vcpu.is_protected(), tech != Tech::Sev);
        let (probe, log) = Probe::new(vec![kvm_ops_core::guest::Action::Read {
            gpa: secret,
            len: 4,
        }]);
        common::load(&mut vcpu, probe);
        run(&to, &mut vcpu);
        assert_eq!(log.lock().unwrap()[0], format!("Data({:?})", b"kept"));
        drop((vcpu, source_vcpu));
        drop_all([to, from]);
        everything_gone(&host);
    }
}

#[test]
fn a_mirror_sees_its_owners_pages_and_loses_them_with_it() {
    let (host, ram) = (host(23), Ram::new(1 << 20));
    let mut owner = launched(&host, Tech::Sev, 0, &ram);
    let mut mirror = with_ram(&host, Tech::Sev, 1, &ram);
    mirror_of(&mut mirror, &mut owner).unwrap();
    let mut vcpu = mirror.create_vcpu(VcpuId(0)).unwrap();
    let read = kvm_ops_core::guest::Action::Read {
        gpa: Gpa::new(C | RAM),
        len: 2,
    };
    let (probe, log) = Probe::new(vec![read]);
    common::load(&mut vcpu, probe);
    run(&mirror, &mut vcpu);
    assert_eq!(log.lock().unwrap()[0], "Data([90, 90])");
    // The owner gives the page up: the mirror's mapping goes first.
    let first = Gfn::new(RAM >> 12);
    assert_eq!(
        owner.set_memory_attributes(first, 1, kvm_ops_core::Privacy::Shared),
        Ok(1)
    );
    let (probe, _) = Probe::new(vec![read]);
    common::load(&mut vcpu, probe);
    assert!(matches!(vcpu.vcpu_run(), Ok(Exit::MemoryFault { .. })));
    drop(vcpu);
    drop_all([mirror, owner]);
    everything_gone(&host);
}

// --- What reading the kernel's code shows (7.1.5), each of which is not so here ---

fn with_params(host: &SimHost, tech: Tech, sev: SevParams) -> Sev {
    let mut vm = SevVm::create(host, host.next_vm_id(), tech, &params(1, sev)).unwrap();
    vm.vm_init().unwrap();
    vm
}

#[test]
fn flaw_3_policy_features_and_ghcb_version_go_with_the_context_and_the_vm_runs() {
    let (host, ram) = (host(30), Ram::new(1 << 20));
    let sev = SevParams {
        policy: Some(0b101),
        vmsa_features: 1 << 5,
        ghcb_version: 2,
        ..SevParams::default()
    };
    let mut from = with_params(&host, Tech::SevEs, sev);
    from.set_memory_slot(&ram.slot(0, RAM)).unwrap();
    drop(from.create_vcpu(VcpuId(0)).unwrap());
    from.add_initial_page(&measured(RAM, &page(3))).unwrap();
    from.vm_finalize().unwrap();
    let facts = from.context_facts().unwrap();
    let other = SevParams {
        ghcb_version: 1,
        ..SevParams::default()
    };
    let mut to = with_params(&host, Tech::SevEs, other);
    to.set_memory_slot(&ram.slot(0, RAM)).unwrap();
    let mut vcpu = to.create_vcpu(VcpuId(0)).unwrap();
    move_to(&mut to, &mut from).unwrap();
    assert_eq!(to.context_facts(), Some(facts));
    assert_eq!(
        (facts.policy, facts.vmsa_features, facts.ghcb_version),
        (0b101, 1 << 5, 2)
    );
    // "No debugging" holds still, here and in firmware.
    let mut data = [0; 64];
    data[..8].copy_from_slice(&ram.address().to_le_bytes());
    data[8..16].copy_from_slice(&32u64.to_le_bytes());
    data[16..20].copy_from_slice(&16u32.to_le_bytes());
    let mut cmd = EncCmd {
        id: 17,
        flags: 0,
        data: &mut data,
        firmware_status: 0,
    };
    assert_eq!(errno(to.mem_enc_op(&mut cmd)), EIO);
    assert_eq!(cmd.firmware_status, 7);
    // Firmware commands reach the same mailbox, and the guest runs.
    assert_eq!(to.guest_status().unwrap().policy, 0b101);
    common::load(&mut vcpu, Script::new());
    run(&to, &mut vcpu);
    drop(vcpu);
    drop_all([from, to]);
    everything_gone(&host);
}

#[test]
fn flaw_4_a_key_that_moves_between_accounts_is_charged_as_what_it_is() {
    for tech in MOVABLE {
        let (host, ram) = (host(31), Ram::new(1 << 20));
        let accounts = [(); 2].map(|()| Arc::new(KeyAccount::new(2, 2)));
        let mut from = launched(&host, tech, 1, &ram);
        let mut to = bare(&host, tech, 1);
        from.charge_to(&accounts[0]).unwrap();
        to.charge_to(&accounts[1]).unwrap();
        move_to(&mut to, &mut from).unwrap();
        for (at, used) in [(0, 0), (1, 1)] {
            for kind in MOVABLE {
                // SEV-ES and SNP share their ASIDs.
                let same = (kind == Tech::Sev) == (tech == Tech::Sev);
                assert_eq!(accounts[at].used(kind), if same { used } else { 0 });
            }
        }
        drop_all([from, to]);
        assert!(
            accounts
                .iter()
                .all(|a| MOVABLE.iter().all(|kind| a.used(*kind) == 0))
        );
        everything_gone(&host);
    }
}

#[test]
fn flaw_4_an_account_that_cannot_pay_refuses_and_nothing_changes() {
    let (host, ram) = (host(32), Ram::new(1 << 20));
    let rich = Arc::new(KeyAccount::new(1, 1));
    let poor = Arc::new(KeyAccount::new(0, 0));
    let mut from = launched(&host, Tech::Sev, 1, &ram);
    from.charge_to(&rich).unwrap();
    // Not initialised: it has no key that it pays for.
    let mut to = create(&host, Tech::Sev, 1);
    to.charge_to(&poor).unwrap();
    assert_eq!(errno(move_to(&mut to, &mut from)), EBUSY);
    assert_eq!((rich.used(Tech::Sev), poor.used(Tech::Sev)), (1, 0));
    assert_eq!((from.step(), to.step()), (Step::Runnable, Step::Created));
    drop_all([from, to]);
    assert_eq!(rich.used(Tech::Sev), 0);
    everything_gone(&host);
}

#[test]
fn flaw_5_a_mirror_pays_for_nothing_wherever_it_moves() {
    let (host, ram) = (host(33), Ram::new(1 << 20));
    let accounts = [(); 3].map(|()| Arc::new(KeyAccount::new(4, 4)));
    let mut owner = launched(&host, Tech::Sev, 0, &ram);
    let (mut mirror, mut moved) = (bare(&host, Tech::Sev, 0), bare(&host, Tech::Sev, 0));
    owner.charge_to(&accounts[0]).unwrap();
    mirror.charge_to(&accounts[1]).unwrap();
    moved.charge_to(&accounts[2]).unwrap();
    mirror_of(&mut mirror, &mut owner).unwrap();
    move_to(&mut moved, &mut mirror).unwrap();
    assert_eq!(accounts.each_ref().map(|a| a.used(Tech::Sev)), [1, 0, 0]);
    drop_all([mirror, moved, owner]);
    assert_eq!(accounts.each_ref().map(|a| a.used(Tech::Sev)), [0, 0, 0]);
    everything_gone(&host);
}

#[test]
fn flaw_6_a_source_keeps_nothing_that_its_end_would_miss() {
    let (host, ram) = (host(34), Ram::new(1 << 20));
    let mut from = launched(&host, Tech::SevEs, 1, &ram);
    let region = EncRegion {
        address: ram.address(),
        bytes: 3 * PAGE,
    };
    from.mem_enc_register_region(region).unwrap();
    let held = from.account().held();
    let mut to = bare(&host, Tech::SevEs, 1);
    move_to(&mut to, &mut from).unwrap();
    assert_eq!((from.account().held(), from.locked_pages()), (0, 0));
    assert_eq!((to.account().held(), to.locked_pages()), (held, 3));
    assert_eq!((from.asid(), from.identity()), (None, None));
    // It freed only the buffers of its launch, before the move.
    let buffers = from.account().freed;
    let report = free(from);
    assert_eq!((report.pages_freed, report.keys_freed), (buffers, 0));
    assert_eq!(to.mem_enc_unregister_region(region), Ok(()));
    let report = free(to);
    assert_eq!((report.pages_freed, report.keys_freed), (held, 1));
    everything_gone(&host);
}

#[test]
fn flaw_7_a_dead_source_stays_dead_however_often_it_is_asked() {
    let (host, ram) = (host(35), Ram::new(1 << 20));
    let mut from = with_ram(&host, Tech::Sev, 1, &ram);
    let mut vcpu = from.create_vcpu(VcpuId(0)).unwrap();
    from.add_initial_page(&measured(RAM, &page(3))).unwrap();
    from.vm_finalize().unwrap();
    let mut to = bare(&host, Tech::Sev, 0);
    move_to(&mut to, &mut from).unwrap();
    for _ in 0..3 {
        assert_eq!(vcpu.vcpu_run().unwrap_err(), Error::Poisoned);
        assert_eq!(errno(from.set_memory_slot(&ram.slot(1, 0))), EIO);
    }
    drop(vcpu);
    drop_all([from, to]);
    everything_gone(&host);
}

#[test]
fn flaw_8_the_same_mistake_has_the_same_errno_everywhere() {
    let (host, ram) = (host(36), Ram::new(1 << 20));
    let mut empty = create(&host, Tech::Sev, 1);
    let mut other = bare(&host, Tech::Sev, 0);
    // No context to give: EINVAL to both capabilities.
    assert_eq!(errno(move_to(&mut other, &mut empty)), EINVAL);
    assert_eq!(errno(mirror_of(&mut other, &mut empty)), EINVAL);
    let mut launched_one = launched(&host, Tech::Sev, 0, &ram);
    let mut source = launched(&host, Tech::Sev, 0, &ram);
    assert_eq!(errno(move_to(&mut launched_one, &mut source)), EINVAL);
    assert_eq!(errno(mirror_of(&mut launched_one, &mut source)), EINVAL);
    drop_all([empty, other, launched_one, source]);
    everything_gone(&host);
}

#[test]
fn a_source_whose_move_was_refused_runs_on() {
    let (host, ram) = (host(37), Ram::new(1 << 20));
    let mut from = with_ram(&host, Tech::Sev, 1, &ram);
    let mut vcpu = from.create_vcpu(VcpuId(0)).unwrap();
    from.vm_finalize().unwrap();
    let mut to = launched(&host, Tech::Sev, 0, &ram);
    assert_eq!(errno(move_to(&mut to, &mut from)), EINVAL);
    assert_eq!(from.step(), Step::Runnable);
    common::load(&mut vcpu, Script::new());
    // The stop's kick, then the guest.
    assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted));
    run(&from, &mut vcpu);
    drop(vcpu);
    drop_all([from, to]);
    everything_gone(&host);
}

#[test]
fn every_command_may_fail_and_a_move_needs_none_of_them() {
    let (host, ram) = (host(38), Ram::new(1 << 20));
    let mut from = launched(&host, Tech::Sev, 1, &ram);
    let mut to = bare(&host, Tech::Sev, 0);
    for command in Command::ALL {
        sp(&host).fail_next(*command, soft_amd_sp::Status::HWERROR_PLATFORM);
    }
    assert_eq!(move_to(&mut to, &mut from), Ok(()));
    sp(&host).clear_failures();
    drop_all([from, to]);
    everything_gone(&host);
}

#[test]
fn a_vm_that_is_running_is_stopped_for_its_move_and_finds_itself_dead() {
    let (host, ram) = (host(39), Ram::new(1 << 20));
    let mut from = with_ram(&host, Tech::Sev, 1, &ram);
    let mut vcpu = from.create_vcpu(VcpuId(0)).unwrap();
    from.add_initial_page(&measured(RAM, &page(3))).unwrap();
    from.vm_finalize().unwrap();
    let spin = kvm_ops_core::guest::FnProgram(|_: kvm_ops_core::guest::Outcome<'_>| {
        kvm_ops_core::guest::Action::Read {
            gpa: Gpa::new(C | RAM),
            len: 8,
        }
    });
    common::load(&mut vcpu, spin);
    let mut to = bare(&host, Tech::Sev, 0);
    thread::scope(|scope| {
        let runner = scope.spawn(|| {
            loop {
                match vcpu.vcpu_run() {
                    Ok(_) | Err(Error::Busy) => {}
                    Err(error) => return error,
                }
            }
        });
        thread::sleep(std::time::Duration::from_millis(5));
        move_to(&mut to, &mut from).unwrap();
        assert_eq!(runner.join().unwrap(), Error::Poisoned);
    });
    drop(vcpu);
    drop_all([from, to]);
    everything_gone(&host);
}

#[test]
fn invalid_names_the_vm_that_does_not_fit() {
    let (host, ram) = (host(40), Ram::new(1 << 20));
    let mut from = launched(&host, Tech::Sev, 0, &ram);
    let mut to = launched(&host, Tech::Sev, 0, &ram);
    let id = to.id().0;
    assert_eq!(
        move_to(&mut to, &mut from),
        Err(Error::Invalid(Field::Vm, id))
    );
    drop_all([from, to]);
    everything_gone(&host);
}
