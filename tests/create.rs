//! The choice of technology: the technology that each configuration gets on each host, and the
//! refusals.
#![cfg(all(feature = "intel", feature = "amd", feature = "sim"))]

use kvm_ops::sim::SimHost;
use kvm_ops::{
    Error, Field, Kind, MAX_VCPUS, Missing, Step, Tech, Vendor, VmConfig, VmOps, create,
};

#[test]
fn every_kind_on_every_vendor_is_the_technology_it_names_or_a_reason() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let host = SimHost::new(vendor);
        for kind in Tech::ALL.into_iter().map(Kind::Of).chain([Kind::Normal]) {
            let tech = kind.tech(vendor);
            let expected = match tech {
                _ if tech.vendor() != Some(vendor) => {
                    Err(Error::unsupported(Missing::Vendor, tech))
                }
                _ => Ok((tech, Step::Initialized)),
            };
            let created = create(&host, &VmConfig::new(kind)).map_err(Error::from);
            assert_eq!(
                created.map(|vm| (vm.tech(), vm.step())),
                expected,
                "{kind} on {vendor}"
            );
            assert_eq!(host.live_vms(), 0, "{kind} on {vendor}");
        }
    }
}

#[test]
fn numbers_of_vcpus_out_of_range_are_refused_by_value() {
    let host = SimHost::new(Vendor::Intel);
    for vcpus in [0, MAX_VCPUS + 1, u32::MAX] {
        for kind in [Kind::Normal, Kind::Of(Tech::Tdx)] {
            let refused = create(&host, &VmConfig::new(kind).vcpus(vcpus)).err();
            let refused = refused.map(|failed| failed.error);
            assert_eq!(
                refused,
                Some(Error::Invalid(Field::VcpuCount, vcpus.into()))
            );
        }
    }
    assert!(create(&host, &VmConfig::normal().vcpus(MAX_VCPUS)).is_ok());
}

#[test]
fn dropping_a_vm_takes_the_teardown_that_destroy_reports() {
    let host = SimHost::new(Vendor::Amd);
    let vm = create(&host, &VmConfig::normal()).unwrap();
    assert_eq!(host.live_vms(), 1);
    drop(vm);
    assert_eq!(host.live_vms(), 0);

    let mut vm = create(&host, &VmConfig::normal()).unwrap();
    vm.finalize().unwrap();
    let id = vm.back_end().id();
    let report = vm.destroy();
    assert_eq!(
        (report.vm, report.tech, report.is_clean()),
        (id, Tech::Svm, true)
    );
}
