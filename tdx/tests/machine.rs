//! A machine that lacks something: processors, memory, KeyIDs.

mod common;

use common::TestHost;
use common::audit::{all_accounted, mirror_equals_secure_ept};
use common::life::{create, destroy, initial_page, initialized, runnable, slot};
use kvm_ops_core::{
    Backend, CpuId, Error, Field, Gfn, InitialPageKind, Step, VcpuId, VcpuOps, VmOps,
};
use kvm_ops_tdx::TdxVm;

#[test]
fn a_package_without_an_online_processor_is_named_at_creation_and_at_the_end() {
    let host = TestHost::new();
    let offline = |cpu, off| host.platform().set_offline(cpu, off);
    let mut vm = create(&host);
    offline(2, true);
    offline(3, true);
    let named = Error::NotFound(Field::OnlineCpu, 1);
    assert_eq!(vm.vm_init(), Err(named));
    assert_eq!(named.to_string(), "no online processor in package 0x1");
    assert_eq!((vm.step(), host.taken().len()), (Step::Created, 0));
    offline(3, false);
    vm.vm_init().unwrap();

    // At the end likewise; the KeyID stays until the package is back.
    offline(3, true);
    assert_eq!(vm.mmu_release_hkid().err(), Some(named));
    assert_eq!(vm.step(), Step::Poisoned);
    offline(3, false);
    assert!(destroy(vm).is_clean());
    assert_eq!(host.live(), 0);
}

#[test]
fn the_last_processor_of_a_package_stays_while_a_key_is_in_use() {
    let host = TestHost::new();
    let vm = runnable(&host);
    let home = (0..4)
        .map(CpuId)
        .find(|cpu| {
            host.take_log();
            vm.disable_virtualization_cpu(*cpu).unwrap();
            // Only where the vCPU was is there anything to flush.
            host.take_counts().contains_key("TDH.VP.FLUSH")
        })
        .expect("the vCPU was somewhere");
    host.take_log();
    vm.disable_virtualization_cpu(home).unwrap();
    assert_eq!(host.take_log(), [], "it is gone from there");

    host.platform().set_offline(0, true);
    assert_eq!(vm.disable_virtualization_cpu(CpuId(1)), Err(Error::Busy));
    assert_eq!(vm.disable_virtualization_cpu(CpuId(2)), Ok(()));
    for cpu in [0, 4, u32::MAX] {
        let unknown = Error::Invalid(Field::Cpu, cpu.into());
        assert_eq!(vm.disable_virtualization_cpu(CpuId(cpu)), Err(unknown));
    }
    // The vCPU is on no processor: nothing to flush at the end.
    host.take_log();
    assert!(destroy(vm).is_clean());
    assert!(!host.take_counts().contains_key("TDH.VP.FLUSH"));
}

#[test]
fn a_vcpu_that_moves_is_flushed_where_it_was() {
    let host = TestHost::new();
    let mut vm = initialized(&host);
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    vm.vm_finalize().unwrap();
    host.take_log();
    for (n, cpu) in [3, 3, 0, 2, 2].into_iter().enumerate() {
        vcpu.vcpu_load(CpuId(cpu)).unwrap();
        vcpu.inject_nmi().unwrap();
        let tdvpr = host.taken().into_iter().find_map(|page| {
            host.platform()
                .vcpu(page.get() << 12)
                .and_then(|view| view.assoc_lp)
        });
        assert_eq!(tdvpr, Some(cpu as usize), "turn {n}");
    }
    let counts = host.take_counts();
    assert_eq!(counts["TDH.VP.WR"], 5);
    assert!((2..=3).contains(&counts["TDH.VP.FLUSH"]), "{counts:?}");
    let unknown = Error::Invalid(Field::Cpu, 9);
    assert_eq!(vcpu.vcpu_load(CpuId(9)), Err(unknown));
    assert_eq!(
        vcpu.load_mmu_pgd(common::root(0x1008)),
        Err(Error::Invalid(Field::HostAddress, 0x1008))
    );
    vcpu.load_mmu_pgd(common::root(0x1000)).unwrap();
    assert!(destroy(vm).is_clean());
}

#[test]
fn without_memory_every_step_can_be_repeated_once_there_is_some() {
    let host = TestHost::new();
    let mut vm = create(&host);
    let mut needed = Vec::new();
    let mut retry = |step: &mut dyn FnMut(&mut TdxVm<TestHost>) -> kvm_ops_core::Result<()>,
                     vm: &mut TdxVm<TestHost>| {
        let mut pages = 0;
        loop {
            host.limit_pages(pages);
            match step(vm) {
                Ok(()) => break,
                Err(error) => assert_eq!(error, Error::NoMemory),
            }
            host.heal();
            mirror_equals_secure_ept(&host, vm);
            pages += 1;
        }
        needed.push(pages);
        host.heal();
    };
    retry(&mut |vm| vm.vm_init(), &mut vm);
    vm.set_memory_slot(&slot(&host)).unwrap();
    retry(&mut |vm| vm.create_vcpu(VcpuId(0)).map(drop), &mut vm);
    retry(
        &mut |vm| vm.add_initial_page(&initial_page(0, InitialPageKind::Measured)),
        &mut vm,
    );
    vm.vm_finalize().unwrap();
    retry(
        &mut |vm| vm.pre_fault_memory(Gfn::new(0x1000), 1).map(drop),
        &mut vm,
    );
    assert_eq!(needed[0], 8, "scratch, TDR and six pages of TDCS");
    let report = destroy(vm);
    assert!(report.is_clean(), "{report:?}");
    all_accounted(&host, &report);
}

#[test]
fn keys_run_out_and_come_back() {
    let host = TestHost::new();
    let capacity = host.key_pool().capacity();
    let mut vms: Vec<_> = (0..capacity)
        .map(|_| {
            let mut vm = create(&host);
            vm.vm_init().unwrap();
            vm
        })
        .collect();
    let mut late = create(&host);
    assert_eq!(late.vm_init(), Err(Error::NoKeyId));
    assert_eq!(late.step(), Step::Created);
    assert!(destroy(vms.pop().unwrap()).is_clean());
    late.vm_init().unwrap();
    vms.push(late);
    for vm in vms {
        assert!(destroy(vm).is_clean());
    }
    assert_eq!(host.live(), 0);
}
