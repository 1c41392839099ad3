//! Errors name the reason and the remedy.

mod common;

use std::error::Error as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kvm_ops_core::{
    Error, Field, Host, Irqchip, MAX_VCPUS, Missing, Tech, VcpuId, VcpuOps, VmParams, VmPort,
};
use kvm_ops_kvm::{KvmHost, Offer, OpenError};

fn refused(path: &str) -> OpenError {
    let error = KvmHost::open_path(Path::new(path)).unwrap_err();
    assert!(error.to_string().contains(path), "{error}");
    assert!(!error.to_string().ends_with('.'), "{error}");
    assert!(!error.hint().is_empty());
    error
}

#[test]
fn a_missing_device_says_how_to_get_one() {
    let error = refused("/nonexistent/kvm");
    assert!(matches!(error, OpenError::Missing { .. }));
    assert!(error.hint().contains("modprobe"));
    assert!(error.source().is_some());
    // A path through a file is missing too.
    assert!(matches!(
        refused("/dev/null/kvm"),
        OpenError::Missing { .. }
    ));
}

#[test]
fn what_is_not_kvm_is_called_so() {
    for path in ["/dev/null", "/dev/zero", "/proc/self/status", "/dev/full"] {
        let error = refused(path);
        // A file that cannot be opened for writing is an error before that.
        let known = matches!(
            error,
            OpenError::NotKvm { .. } | OpenError::Denied { .. } | OpenError::Io { .. }
        );
        assert!(known, "{path}: {error:?}");
    }
    assert!(matches!(refused("/dev/null"), OpenError::NotKvm { .. }));
    assert!(matches!(refused("/tmp"), OpenError::Io { .. }));
    let file = std::env::temp_dir().join(format!("kvm-ops-no-device-{}", std::process::id()));
    fs::write(&file, "").unwrap();
    let error = KvmHost::open_path(&file).unwrap_err();
    fs::remove_file(&file).unwrap();
    assert!(matches!(error, OpenError::NotKvm { .. }));
}

#[test]
fn no_permission_names_the_group() {
    // SAFETY: no conditions.
    if unsafe { libc::geteuid() } == 0 {
        println!("skipped: root may open everything");
        return;
    }
    let file = std::env::temp_dir().join(format!("kvm-ops-denied-{}", std::process::id()));
    fs::write(&file, "").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o0)).unwrap();
    let error = KvmHost::open_path(&file).unwrap_err();
    fs::remove_file(&file).unwrap();
    assert!(matches!(error, OpenError::Denied { .. }));
    assert!(error.hint().contains("group"));
}

#[test]
fn numbers_of_vcpus_out_of_range_are_refused_by_name() {
    let Some(host) = common::host() else { return };
    let tech = Tech::normal(host.vendor());
    let most = host.fd().get_max_vcpus() as u32;
    for vcpus in [0, most + 1, MAX_VCPUS + 1, u32::MAX] {
        let error = host.create_vm(tech, &VmParams::new(vcpus)).map(drop);
        assert_eq!(
            error,
            Err(Error::Invalid(Field::VcpuCount, vcpus.into())),
            "{vcpus}"
        );
    }
    host.create_vm(tech, &VmParams::new(most)).unwrap();
}

#[test]
fn a_vcpu_beyond_the_vms_number_or_there_already_is_refused_by_name() {
    let Some(host) = common::host() else { return };
    let vm = common::vm(&host, 2, Irqchip::None);
    for id in [2, 3, u32::MAX] {
        let refused = Err(Error::Invalid(Field::Vcpu, id.into()));
        assert_eq!(vm.create_vcpu(VcpuId(id)).map(drop), refused);
    }
    let first = vm.create_vcpu(VcpuId(1)).unwrap();
    let taken = Err(Error::Exists(Field::Vcpu, 1));
    assert_eq!(vm.create_vcpu(VcpuId(1)).map(drop), taken);
    // The kernel keeps a vCPU until its VM ends, so its number is not free again.
    first.vcpu_free().unwrap();
    assert_eq!(vm.create_vcpu(VcpuId(1)).map(drop), taken);
    vm.create_vcpu(VcpuId(0)).unwrap();
}

#[test]
fn more_than_255_vcpus_with_an_irqchip_have_wide_apic_ids() {
    let Some(host) = common::host() else { return };
    if host.fd().get_max_vcpus() < 300 {
        println!(
            "skipped: the host takes {} vCPUs",
            host.fd().get_max_vcpus()
        );
        return;
    }
    let vm = common::vm(&host, 300, Irqchip::Split);
    let vcpu = vm.create_vcpu(VcpuId(299)).unwrap();
    vm.deliver_interrupt(VcpuId(299), 0x41).unwrap();
    drop(vcpu);
}

#[test]
fn a_technology_that_the_host_lacks_is_unsupported_for_the_right_reason() {
    let Some(host) = common::host() else { return };
    let offer = host.offer();
    for tech in Tech::ALL {
        let line = offer.technology(tech).unwrap();
        let created = host.create_vm(tech, &VmParams::new(1)).map(drop);
        assert_eq!(created.is_ok(), line.is_offered(), "{tech}");
        if tech.vendor() != Some(host.vendor()) {
            assert_eq!(created, Err(Error::unsupported(Missing::Vendor, tech)));
        } else if !line.is_offered() {
            assert_eq!(created, Err(Error::unsupported(Missing::HostTech, tech)));
            assert!(!line.why_not.is_empty());
        }
    }
    assert!(
        offer
            .technology(Tech::normal(host.vendor()))
            .unwrap()
            .is_offered()
    );
}

#[test]
fn a_machine_whose_device_cannot_be_opened_offers_nothing_and_says_why() {
    let error = KvmHost::open_path(Path::new("/nonexistent/kvm")).unwrap_err();
    let offer = Offer::without_device(&error);
    assert_eq!(offer.technologies.len(), Tech::ALL.len());
    for line in &offer.technologies {
        assert!(!line.is_offered());
        for reason in &line.why_not {
            let text = reason.to_string();
            assert!(!text.is_empty() && !text.ends_with('.'), "{text}");
        }
    }
}

#[test]
fn what_capabilities_promise_was_tried_and_the_needed_ones_are_there() {
    let Some(host) = common::host() else { return };
    let capabilities = host.offer().capabilities;
    let find = |name: &str| capabilities.iter().find(|c| c.name == name).unwrap();
    assert!(find("KVM_CAP_IMMEDIATE_EXIT").is_available());
    assert!(find("KVM_CAP_MAX_VCPUS").answer >= 1);
    for name in [
        "KVM_CAP_IRQCHIP",
        "KVM_CAP_SPLIT_IRQCHIP",
        "KVM_CAP_IRQFD",
        "KVM_CAP_IOEVENTFD",
        "KVM_CAP_GUEST_MEMFD",
        "KVM_CAP_MEMORY_ATTRIBUTES",
        "KVM_CAP_PRE_FAULT_MEMORY",
    ] {
        assert!(find(name).tried.is_some(), "{name}");
    }
}

#[test]
fn each_vm_of_a_host_has_a_number_of_its_own() {
    let Some(host) = common::host() else { return };
    let other = host.clone();
    let mut numbers: Vec<u64> = (0..50)
        .map(|i| if i % 2 == 0 { &host } else { &other }.next_vm_id().0)
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 50);
}
