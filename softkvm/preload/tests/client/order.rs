//! The order of the calls of a launch. docs/kvm-client.md explains where it differs from QEMU's.

use kvm_ops::{Kind, SevParams, Tech, VcpuId, VmConfig, create};

use crate::common::again;
use crate::guest::*;

/// The calls that matter to a launch, in a line each.
fn calls(log: &str) -> Vec<String> {
    const MATTER: [&str; 9] = [
        "KVM_CREATE_VM",
        "KVM_CREATE_VCPU",
        "KVM_ENABLE_CAP",
        "KVM_MEMORY_ENCRYPT_",
        "KVM_SET_USER_MEMORY_REGION",
        "KVM_CREATE_GUEST_MEMFD",
        "KVM_SET_MEMORY_ATTRIBUTES",
        "KVM_SET_CPUID2",
        "KVM_RUN",
    ];
    let mut calls: Vec<String> = Vec::new();
    for line in log.lines() {
        let Some((call, _)) = line.split_once(" = ") else {
            continue;
        };
        let mut parts = call.splitn(3, ", ");
        let (_, Some(name), argument) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        if !MATTER.iter().any(|matter| name.starts_with(matter)) {
            continue;
        }
        let argument = argument.unwrap_or_default().trim_end_matches(')');
        let command = argument.split(' ').next().unwrap_or_default();
        let text = match name {
            "KVM_MEMORY_ENCRYPT_OP" => command.trim_matches(['{', ',']).to_owned(),
            name => name.to_owned(),
        };
        // Pages and vCPUs repeat.
        if calls.last() != Some(&text) {
            calls.push(text);
        }
    }
    calls
}

fn launch(tech: Tech) {
    let memory = memory();
    let config = match tech {
        Tech::Tdx => VmConfig::new(Kind::Of(tech)),
        _ => config(tech, SevParams::default()),
    };
    let mut vm = create(&host(), &config).unwrap();
    vm.set_memory_slot(slot(&memory)).unwrap();
    let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    add_pages(&mut vm);
    vm.finalize().unwrap();
    drop(vcpu);
    assert!(vm.destroy().is_clean());
}

#[track_caller]
fn check(test: &str, tech: Tech, expected: &[&str]) {
    let vendor = match tech {
        Tech::Tdx => "intel",
        _ => "amd",
    };
    match again(test, vendor) {
        None => launch(tech),
        Some(log) => assert_eq!(calls(&log), expected, "{log}"),
    }
}

#[test]
fn sev() {
    check(
        "order::sev",
        Tech::Sev,
        &[
            "KVM_CREATE_VM",
            // Payloads of exceptions, and triple faults as events.
            "KVM_ENABLE_CAP",
            "KVM_SEV_INIT2",
            "KVM_ENABLE_CAP",
            "KVM_SET_USER_MEMORY_REGION",
            "KVM_MEMORY_ENCRYPT_REG_REGION",
            "KVM_CREATE_VCPU",
            "KVM_SET_CPUID2",
            "KVM_SEV_LAUNCH_START",
            "KVM_SEV_LAUNCH_UPDATE_DATA",
            "KVM_SEV_LAUNCH_MEASURE",
            "KVM_SEV_LAUNCH_FINISH",
            // The end: the kernel unpins memory with the VM.
            "KVM_SET_USER_MEMORY_REGION",
        ],
    );
}

#[test]
fn sev_es() {
    check(
        "order::sev_es",
        Tech::SevEs,
        &[
            "KVM_CREATE_VM",
            // Payloads of exceptions, and triple faults as events.
            "KVM_ENABLE_CAP",
            "KVM_SEV_INIT2",
            "KVM_ENABLE_CAP",
            "KVM_SET_USER_MEMORY_REGION",
            "KVM_MEMORY_ENCRYPT_REG_REGION",
            "KVM_CREATE_VCPU",
            "KVM_SET_CPUID2",
            "KVM_SEV_LAUNCH_START",
            "KVM_SEV_LAUNCH_UPDATE_DATA",
            "KVM_SEV_LAUNCH_UPDATE_VMSA",
            "KVM_SEV_LAUNCH_MEASURE",
            "KVM_SEV_LAUNCH_FINISH",
            // The end: the kernel unpins memory with the VM.
            "KVM_SET_USER_MEMORY_REGION",
        ],
    );
}

#[test]
fn snp() {
    check(
        "order::snp",
        Tech::SevSnp,
        &[
            "KVM_CREATE_VM",
            // Payloads of exceptions, and triple faults as events.
            "KVM_ENABLE_CAP",
            "KVM_SEV_INIT2",
            "KVM_ENABLE_CAP",
            "KVM_CREATE_GUEST_MEMFD",
            "KVM_SET_USER_MEMORY_REGION2",
            "KVM_SET_MEMORY_ATTRIBUTES",
            "KVM_CREATE_VCPU",
            "KVM_SET_CPUID2",
            "KVM_SEV_SNP_LAUNCH_START",
            "KVM_SEV_SNP_LAUNCH_UPDATE",
            "KVM_SEV_SNP_LAUNCH_FINISH",
            "KVM_SET_USER_MEMORY_REGION",
        ],
    );
}

/// The destination's type is 0, as the source's; what pins the memory moves along.
#[test]
fn a_move_of_an_sev_es_guest() {
    let test = "order::a_move_of_an_sev_es_guest";
    let Some(log) = again(test, "amd") else {
        let (host, memory) = (host(), memory());
        let params = |movable, arrives| SevParams {
            ghcb_version: 1,
            movable,
            arrives,
            ..SevParams::default()
        };
        let mut from = create(&host, &config(Tech::SevEs, params(true, false))).unwrap();
        from.set_memory_slot(slot(&memory)).unwrap();
        let old = from.create_vcpu(VcpuId(0)).unwrap();
        from.finalize().unwrap();
        let mut to = create(&host, &config(Tech::SevEs, params(false, true))).unwrap();
        let new = to.create_vcpu(VcpuId(0)).unwrap();
        from.move_to(&mut to).unwrap();
        drop((old, new));
        return assert!(from.destroy().is_clean() && to.destroy().is_clean());
    };
    assert_eq!(log.matches("KVM_CREATE_VM, 0x0").count(), 2, "{log}");
    let expected = [
        "KVM_CREATE_VM",
        "KVM_ENABLE_CAP",
        "KVM_SEV_ES_INIT",
        "KVM_ENABLE_CAP",
        "KVM_SET_USER_MEMORY_REGION",
        "KVM_MEMORY_ENCRYPT_REG_REGION",
        "KVM_CREATE_VCPU",
        "KVM_SET_CPUID2",
        "KVM_SEV_LAUNCH_START",
        "KVM_SEV_LAUNCH_UPDATE_VMSA",
        "KVM_SEV_LAUNCH_MEASURE",
        "KVM_SEV_LAUNCH_FINISH",
        // The destination: what every VM has, and exits for conversions.
        "KVM_CREATE_VM",
        "KVM_ENABLE_CAP",
        "KVM_CREATE_VCPU",
        "KVM_SET_CPUID2",
        "KVM_SET_USER_MEMORY_REGION",
        // The move.
        "KVM_ENABLE_CAP",
        // The end of the destination: the source takes no calls.
        "KVM_SET_USER_MEMORY_REGION",
    ];
    assert_eq!(calls(&log), expected, "{log}");
}

#[test]
fn tdx() {
    check(
        "order::tdx",
        Tech::Tdx,
        &[
            "KVM_CREATE_VM",
            // The split irqchip, then hypercall exits.
            "KVM_ENABLE_CAP",
            "KVM_TDX_CAPABILITIES",
            "KVM_TDX_INIT_VM",
            "KVM_CREATE_GUEST_MEMFD",
            "KVM_SET_USER_MEMORY_REGION2",
            "KVM_SET_MEMORY_ATTRIBUTES",
            "KVM_CREATE_VCPU",
            "KVM_SET_CPUID2",
            "KVM_TDX_INIT_VCPU",
            "KVM_TDX_INIT_MEM_REGION",
            "KVM_TDX_FINALIZE_VM",
            "KVM_SET_USER_MEMORY_REGION",
        ],
    );
}
