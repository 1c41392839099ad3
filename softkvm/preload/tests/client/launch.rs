//! Launches: the measurement, the digest, and the life around them.

use kvm_ops::{
    Error, Gfn, Privacy, SevParams, SharedMask, Step, Tech, VcpuId, VcpuOps, VmOps, create,
};
use soft_amd_sp::measure::Launch;

use crate::common::inside;
use crate::guest::*;

const POLICY_ES: u32 = 1 << 2;

#[test]
fn the_measurement_of_an_sev_guest_proves_the_digest_that_measure_prints() {
    if !inside("launch::the_measurement_of_an_sev_guest_proves_the_digest_that_measure_prints") {
        return;
    }
    let image: Vec<u8> = (0..PAGES).flat_map(contents).collect();
    let digest = Launch::new(&image).sev().unwrap();
    assert_eq!(digest, sev_digest(0));
    let (twin, memory) = (Twin::new(), memory());
    let owner = twin.owner(0);
    let mut vm = create(&host(), &config(Tech::Sev, with_session(&owner, 0))).unwrap();
    vm.set_memory_slot(slot(&memory)).unwrap();
    let _vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    add_pages(&mut vm);
    vm.finalize().unwrap();
    let measurement = vm.measurement().unwrap();
    assert!(twin.expects(&owner, &digest, measurement.bytes()));
    let mut other = digest;
    other[0] ^= 1;
    assert!(!twin.expects(&owner, &other, measurement.bytes()));
    assert!(vm.destroy().is_clean());
}

#[test]
fn the_measurement_of_an_sev_es_guest_has_its_vcpus_in_it() {
    if !inside("launch::the_measurement_of_an_sev_es_guest_has_its_vcpus_in_it") {
        return;
    }
    let (twin, memory) = (Twin::new(), memory());
    let owner = twin.owner(POLICY_ES);
    let params = with_session(&owner, POLICY_ES);
    for vcpus in [1, 2] {
        let mut vm = create(&host(), &config(Tech::SevEs, params.clone())).unwrap();
        vm.set_memory_slot(slot(&memory)).unwrap();
        let handles: Vec<_> = (0..vcpus)
            .map(|id| vm.create_vcpu(VcpuId(id)).unwrap())
            .collect();
        add_pages(&mut vm);
        vm.finalize().unwrap();
        let measurement = vm.measurement().unwrap();
        for other in 0..3 {
            let proves = twin.expects(&owner, &sev_digest(other), measurement.bytes());
            assert_eq!(proves, other == vcpus, "{vcpus} {other}");
        }
        drop(handles);
        assert!(vm.destroy().is_clean());
    }
}

#[test]
fn firmware_finds_the_digest_of_an_snp_guest_equal_to_the_computed_one() {
    if !inside("launch::firmware_finds_the_digest_of_an_snp_guest_equal_to_the_computed_one") {
        return;
    }
    let memory = memory();
    let launch = |digest, vcpus: u32| {
        let mut vm = create(&host(), &config(Tech::SevSnp, with_id_block(digest))).unwrap();
        vm.set_memory_slot(slot(&memory)).unwrap();
        let handles: Vec<_> = (0..vcpus)
            .map(|id| vm.create_vcpu(VcpuId(id)).unwrap())
            .collect();
        add_pages(&mut vm);
        let finished = vm.finalize();
        let why = finished.map_err(|error| vm.explain(error).to_string());
        drop(handles);
        assert!(vm.destroy().is_clean());
        why
    };
    for vcpus in [1, 2] {
        assert_eq!(launch(snp_digest(vcpus), vcpus), Ok(()));
        let refused = launch(snp_digest(vcpus + 1), vcpus).unwrap_err();
        assert!(
            refused.contains("SNP_LAUNCH_FINISH answered BAD_MEASUREMENT (0xb)"),
            "{refused}"
        );
    }
}

#[test]
fn registers_are_the_hosts_until_the_launch_measures_them() {
    if !inside("launch::registers_are_the_hosts_until_the_launch_measures_them") {
        return;
    }
    for tech in TECHS {
        let memory = memory();
        let mut vm = create(&host(), &config(tech, SevParams::default())).unwrap();
        vm.set_memory_slot(slot(&memory)).unwrap();
        let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        let regs = vcpu.regs().unwrap();
        assert_eq!(regs.rip, 0xfff0);
        vcpu.set_regs(&regs).unwrap();
        let early = vcpu.vcpu_run();
        assert_eq!(early, Err(Error::WrongState(Step::Initialized)));
        add_pages(&mut vm);
        vm.finalize().unwrap();
        assert_eq!(vm.step(), Step::Runnable);
        let secret = tech != Tech::Sev;
        assert_eq!(vcpu.regs().is_err(), secret, "{tech}");
        if secret {
            assert!(matches!(vcpu.set_regs(&regs), Err(Error::Protected(_))));
            assert!(matches!(vcpu.sregs(), Err(Error::Protected(_))));
            assert_eq!(
                vm.create_vcpu(VcpuId(1)).err(),
                Some(Error::WrongState(Step::Runnable))
            );
        }
        drop(vcpu);
        assert!(vm.destroy().is_clean());
    }
}

#[test]
fn a_guest_says_which_bit_is_its_c_bit_and_its_memory_begins_private() {
    if !inside("launch::a_guest_says_which_bit_is_its_c_bit_and_its_memory_begins_private") {
        return;
    }
    for tech in TECHS {
        let memory = memory();
        let vm = launched(&host(), tech, &memory);
        assert_eq!(vm.shared_mask(), SharedMask::private_bit(51).unwrap());
        let first = Gfn::new(START / 4096);
        assert_eq!(vm.back_end().privacy(first), Privacy::Private);
        assert_eq!(vm.back_end().tech(), tech);
    }
}
