//! Many guests on one machine: ASIDs that run out and come back, and lives from several threads.

mod common;

use common::{C, RAM, Ram, TECHS, create, host, host_from, measured, page, platform, sp, with_ram};
use kvm_ops_core::guest::Script;
use kvm_ops_core::{Error, Exit, Gpa, Host, Missing, PspPort, Tech, VcpuOps, VmOps, VmParams};
use kvm_ops_sev::SevVm;
use kvm_ops_sim::{SevSetup, SimHost};
use soft_amd_sp::{Command, Instruction};

fn launched(host: &SimHost, tech: Tech) -> Result<SevVm<SimHost>, Error> {
    let mut vm = create(host, tech, 1);
    vm.vm_init()?;
    vm.vm_finalize().unwrap();
    Ok(vm)
}

fn flushes(host: &SimHost) -> u64 {
    let counters = sp(host).counters();
    counters.calls(Command::SNP_DF_FLUSH) + counters.calls(Command::DF_FLUSH)
}

#[test]
fn asids_run_out_by_kind_and_come_back_with_exactly_one_flush() {
    for setup in [
        SevSetup::new(platform(1)),
        SevSetup::new(platform(1)).without_snp(),
        SevSetup::new(platform(1)).ciphertext_hiding(2),
    ] {
        let host = host_from(setup);
        let pools = host.psp().unwrap().asid_pools();
        let mut all = Vec::new();
        for tech in TECHS
            .into_iter()
            .filter(|tech| !pools.range(*tech).is_empty())
        {
            loop {
                match launched(&host, tech) {
                    Ok(vm) => {
                        assert!(pools.range(tech).contains(&vm.asid().unwrap().0));
                        all.push(vm);
                    }
                    Err(error) => {
                        assert_eq!(error, Error::NoKeyId);
                        break;
                    }
                }
            }
        }
        assert_eq!((all.len(), pools.in_use()), (7, 7));
        let before = flushes(&host);
        let wbinvds = sp(&host).counters().calls(Instruction::Wbinvd);
        all.into_iter().for_each(common::free_clean);
        let at_teardown = sp(&host).counters().calls(Instruction::Wbinvd) - wbinvds;
        assert_eq!((pools.in_use(), pools.used_up()), (0, 7));
        assert_eq!(
            flushes(&host),
            before,
            "nothing is flushed before it is needed"
        );
        let again: Vec<_> = (0..4)
            .map(|_| launched(&host, Tech::Sev).unwrap())
            .collect();
        let es = launched(&host, Tech::SevEs).unwrap();
        assert_eq!(flushes(&host), before + 1);
        assert_eq!(pools.flushes(), 1);
        let one_flush = sp(&host).counters().calls(Instruction::Wbinvd) - wbinvds - at_teardown;
        assert_eq!(one_flush, 2, "once on each core");
        again.into_iter().for_each(common::free_clean);
        common::free_clean(es);
        common::nothing_left(&host);
    }
}

#[test]
fn a_kind_without_asids_is_not_offered() {
    let host = host_from(SevSetup::new(platform(2)).without_snp());
    let created = SevVm::create(&host, host.next_vm_id(), Tech::SevSnp, &VmParams::new(1));
    let missing = Error::unsupported(Missing::HostTech, Tech::SevSnp);
    assert_eq!(created.err(), Some(missing));
    let host = host_from(SevSetup::new(platform(2)).ciphertext_hiding(3));
    let created = SevVm::create(&host, host.next_vm_id(), Tech::SevEs, &VmParams::new(1));
    let missing = Error::unsupported(Missing::HostTech, Tech::SevEs);
    assert_eq!(created.err(), Some(missing));
}

#[test]
fn an_asid_that_firmware_keeps_is_never_leased_again() {
    for (tech, command) in [
        (Tech::Sev, Command::DEACTIVATE),
        (Tech::SevSnp, Command::SNP_DECOMMISSION),
    ] {
        let host = host(3);
        let pools = host.psp().unwrap().asid_pools();
        let kept = launched(&host, tech).unwrap();
        let asid = kept.asid().unwrap();
        sp(&host).fail_next(command, soft_amd_sp::Status::HWERROR_UNSAFE);
        assert!(!common::free(kept).is_clean());
        for _ in 0..10 {
            let vm = launched(&host, tech).unwrap();
            assert_ne!(vm.asid(), Some(asid));
            common::free_clean(vm);
        }
        assert_eq!((pools.leaked(), pools.in_use()), (1, 1));
    }
}

#[test]
fn many_guests_live_and_die_on_many_threads_and_nothing_is_left() {
    let host = host_from(SevSetup::new(platform(4).asids(9, 16).memory(64 << 20)));
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let host = host.clone();
            scope.spawn(move || {
                for round in 0..12_u8 {
                    let tech = TECHS[usize::from(thread + round) % 3];
                    let ram = Ram::new(0x4000);
                    let byte = thread * 16 + round;
                    let mut vm = with_ram(&host, tech, 1, &ram);
                    let mut vcpu = common::vcpu(&vm, 0);
                    vm.add_initial_page(&measured(RAM, &page(byte))).unwrap();
                    vm.vm_finalize().unwrap();
                    let gpa = Gpa::new(C | RAM);
                    let log = common::outcomes(
                        &vm,
                        &mut vcpu,
                        vec![kvm_ops_core::guest::Action::Read { gpa, len: 1 }],
                    );
                    assert_eq!(log, [format!("Data([{byte}])")]);
                    drop(vcpu);
                    common::free_clean(vm);
                }
            });
        }
    });
    common::nothing_left(&host);
}

#[test]
fn several_vcpus_fault_the_same_memory_in_while_the_host_takes_it_away() {
    let (host, ram) = (host(5), Ram::new(0x10000));
    for tech in [Tech::SevSnp, Tech::SevEs] {
        let mut owned = with_ram(&host, tech, 3, &ram);
        let vcpus: Vec<_> = (0..3).map(|id| common::vcpu(&owned, id)).collect();
        owned.vm_finalize().unwrap();
        let vm = &owned;
        std::thread::scope(|scope| {
            for mut vcpu in vcpus {
                scope.spawn(move || {
                    for round in 0..30_u64 {
                        let at = Gpa::new(C + RAM + round % 16 * 4096);
                        common::load(&mut vcpu, Script::new().write(at, b"x").read(at, 1));
                        loop {
                            match vcpu.vcpu_run().unwrap() {
                                Exit::Shutdown => break,
                                // Shared at that moment: convert it back, as VMMs do.
                                Exit::MemoryFault { gpa, access, .. } => {
                                    let gfn = kvm_ops_core::Gfn::containing(gpa);
                                    vm.set_memory_attributes(gfn, 1, access).unwrap();
                                }
                                other => panic!("{other:?}"),
                            }
                        }
                    }
                });
            }
            for round in 0..60_u64 {
                let gfn = kvm_ops_core::Gfn::new((RAM >> 12) + round % 16);
                let to = kvm_ops_core::Privacy::Shared;
                vm.set_memory_attributes(gfn, 1, to).unwrap();
                std::thread::yield_now();
            }
        });
        common::free_clean(owned);
        common::nothing_left(&host);
    }
}
