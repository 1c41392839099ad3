//! An embedder's own enum of back ends, used through the library's owner and its test kit.

use embedder::nested::NestedVm;
use embedder::{EnclaveVm, OurVm};
use kvm_ops::kit::{self, Subject};
use kvm_ops::sim::SimHost;
use kvm_ops::vmx::VmxVm;
use kvm_ops::{
    Exit, Host, Result, VcpuId, VcpuOps, Vendor, Vm, VmConfig, VmId, VmOps, VmParams, create_as,
};

fn vmx(host: &SimHost) -> Result<VmxVm<SimHost>> {
    VmxVm::create(host, host.next_vm_id(), &VmParams::new(2))
}

#[test]
fn one_fleet_holds_the_librarys_vms_and_our_own() {
    let host = SimHost::new(Vendor::Intel);
    let fleet: Vec<OurVm> = vec![
        vmx(&host).unwrap().into(),
        EnclaveVm::new(VmId(7), 42).into(),
    ];
    let mut ports = Vec::new();
    for vm in fleet {
        let mut vm = Vm::init(vm).unwrap();
        vm.finalize().unwrap();
        let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        match vcpu.vcpu_run().unwrap() {
            Exit::IoOut { port, .. } => ports.push(Some((port, vcpu.exit_data()[0]))),
            // There is no memory at the reset vector, and KVM ends a vCPU without code so too.
            Exit::InternalError { suberror: 1 } => ports.push(None),
            other => panic!("{other:?}"),
        }
        vcpu.vcpu_free().unwrap();
        assert!(vm.destroy().is_clean());
    }
    assert_eq!(ports, [None, Some((2, 42))]);
    assert_eq!(host.live_vms(), 0);
}

#[test]
fn a_variant_is_taken_out_again_by_its_type() {
    let vm: OurVm = EnclaveVm::new(VmId(1), 1).into();
    let vm: Result<VmxVm<SimHost>, _> = vm.try_into();
    assert!(vm.is_err());
    let vm: OurVm = EnclaveVm::new(VmId(2), 1).into();
    let vm: Result<EnclaveVm, _> = vm.try_into();
    assert_eq!(vm.unwrap().id(), VmId(2));
}

#[test]
fn the_librarys_whole_choice_may_be_one_variant() {
    let host = SimHost::new(Vendor::Intel);
    let library: Vm<NestedVm> = create_as(&host, &VmConfig::normal()).unwrap();
    let own = Vm::<NestedVm>::init(EnclaveVm::new(VmId(3), 5).into()).unwrap();
    let techs: Vec<_> = [library, own]
        .into_iter()
        .map(|vm| {
            let tech = vm.tech().name();
            assert!(vm.destroy().is_clean());
            tech
        })
        .collect();
    assert_eq!(techs, ["vmx", "enclave"]);
}

/// What the kit is run on: one kind of VM in our enum.
struct Source<F>(F, SimHost);

impl<F: FnMut(&SimHost) -> Result<OurVm>> Subject for Source<F> {
    type Vm = OurVm;

    fn create(&mut self) -> Result<OurVm> {
        (self.0)(&self.1)
    }

    fn live(&mut self) -> Option<u64> {
        Some(self.1.live_vms() as u64)
    }
}

#[test]
fn both_pass_the_librarys_test_kit_through_our_enum() {
    let host = SimHost::new(Vendor::Intel);
    let report = kit::run(&mut Source(
        |host: &SimHost| Ok(vmx(host)?.into()),
        host.clone(),
    ));
    assert!(report.passed(), "{report}");

    let mut number = 0;
    let enclave = move |_: &SimHost| {
        number += 1;
        Ok(EnclaveVm::new(VmId(number), 9).into())
    };
    let report = kit::run(&mut Source(enclave, host));
    assert!(report.passed(), "{report}");
}
