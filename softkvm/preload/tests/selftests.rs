//! The kernel's KVM self-tests under the preloaded library. `KVM_OPS_SELFTESTS` names the directory in
//! which they were built; without it the test says that it is skipped.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Programs that pass, and the vendor of the machine that they pass on.
const PROGRAMS: &[(&str, &str)] = &[
    ("vm_types_test", "amd"),
    ("vm_types_test", "intel"),
    ("kvm_create_max_vcpus", "amd"),
    ("kvm_create_max_vcpus", "intel"),
    ("x86/max_vcpuid_cap_test", "amd"),
    ("x86/max_vcpuid_cap_test", "intel"),
    ("x86/sev_init2_tests", "amd"),
    ("x86/sev_migrate_tests", "amd"),
    ("x86/sev_dbg_test", "amd"),
    ("guest_memfd_test", "amd"),
    ("pre_fault_memory_test", "amd"),
    ("set_memory_region_test", "amd"),
    ("x86/private_mem_kvm_exits_test", "amd"),
    ("x86/private_mem_conversions_test", "amd"),
    ("guest_print_test", "amd"),
    ("x86/userspace_io_test", "amd"),
    ("x86/cr4_cpuid_sync_test", "amd"),
    ("x86/recalc_apic_map_test", "amd"),
    ("x86/sync_regs_test", "amd"),
    ("x86/set_boot_cpu_id", "amd"),
    ("x86/xcr0_cpuid_test", "amd"),
    ("x86/xss_msr_test", "amd"),
    ("irqfd_test", "amd"),
    ("kvm_binary_stats_test", "amd"),
    ("irq_test", "amd"),
    ("x86/cpuid_test", "amd"),
    ("x86/feature_msrs_test", "amd"),
    ("x86/apic_bus_clock_test", "amd"),
    ("x86/tsc_msrs_test", "amd"),
    ("x86/tsc_scaling_sync", "amd"),
    ("x86/set_sregs_test", "amd"),
    ("x86/userspace_msr_exit_test", "amd"),
    ("x86/xapic_ipi_test", "amd"),
    ("x86/xapic_tpr_test", "amd"),
    ("x86/save_restore_pf_stress_test", "amd"),
    ("demand_paging_test", "amd"),
    ("dirty_log_perf_test", "amd"),
    ("kvm_page_table_test", "amd"),
    ("memslot_modification_stress_test", "amd"),
    ("rseq_test", "amd"),
    ("dirty_log_test", "amd"),
    ("x86/state_test", "amd"),
    ("x86/msrs_test", "amd"),
    ("x86/hwcr_msr_test", "amd"),
    ("x86/fix_hypercall_test", "amd"),
    ("x86/sev_smoke_test", "amd"),
    ("coalesced_io_test", "amd"),
    ("x86/debug_regs", "amd"),
    ("x86/debug_regs", "intel"),
];

/// Programs that skip themselves: what they look for in vain, a part of what they say, and their names.
const SKIPPED: &[(&str, &str, &[&str])] = &[
    (
        "nested virtualisation",
        "Requirement not met",
        &[
            "x86/evmcs_smm_controls_test",
            "x86/hyperv_evmcs",
            "x86/hyperv_svm_test",
            "x86/nested_close_kvm_test",
            "x86/nested_dirty_log_test",
            "x86/nested_exceptions_test",
            "x86/nested_invalid_cr3_test",
            "x86/nested_set_state_test",
            "x86/nested_tdp_fault_test",
            "x86/nested_tsc_adjust_test",
            "x86/nested_tsc_scaling_test",
            "x86/nested_vmsave_vmload_test",
            "x86/nested_x2apic_test",
            "x86/svm_int_ctl_test",
            "x86/svm_lbr_nested_state",
            "x86/svm_nested_clear_efer_svme",
            "x86/svm_nested_pat_test",
            "x86/svm_nested_shutdown_test",
            "x86/svm_nested_soft_inject_test",
            "x86/svm_nested_vmcb12_gpa",
            "x86/svm_pmu_host_guest_test",
            "x86/svm_vmcall_test",
            "x86/triple_fault_event_test",
            "x86/vmx_apic_access_test",
            "x86/vmx_apicv_updates_test",
            "x86/vmx_invalid_nested_guest_state",
            "x86/vmx_nested_la57_state_test",
            "x86/vmx_msrs_test",
            "x86/vmx_preemption_timer_test",
        ],
    ),
    (
        "Hyper-V's interface for guests",
        "KVM_CAP_HYPERV",
        &[
            "x86/hyperv_clock",
            "x86/hyperv_cpuid",
            "x86/hyperv_extended_hypercalls",
            "x86/hyperv_features",
            "x86/hyperv_ipi",
            "x86/hyperv_tlb_flush",
        ],
    ),
    (
        "Xen's interface for guests",
        "KVM_XEN",
        &["x86/xen_shinfo_test", "x86/xen_vmcall_test"],
    ),
    ("SMM", "KVM_CAP_X86_SMM", &["x86/smm_test"]),
    (
        "paravirtual features: stolen time, and CPUID that is enforced",
        "Requirement not met",
        &["steal_time", "x86/kvm_pv_test"],
    ),
    ("real time", "SKIP", &["x86/kvm_clock_test"]),
    ("AMX", "KVM_X86_XCOMP_GUEST_SUPP", &["x86/amx_test"]),
    (
        "exits for failed emulation, bus locks, narrow physical addresses, MSR_PLATFORM_INFO",
        "KVM_CAP_",
        &[
            "x86/exit_on_emulation_failure_test",
            "x86/kvm_buslock_test",
            "x86/smaller_maxphyaddr_emulation_test",
            "x86/platform_info_test",
        ],
    ),
    (
        "corrected machine checks",
        "MCG_CMCI_P",
        &["x86/ucna_injection_test"],
    ),
];

/// A program that runs longer hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// The library, which cargo builds in front of this test, beside it.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    test.with_file_name("libkvm_ops_preload.so")
}

/// Runs a program with enough descriptors for 1024 vCPUs.
fn run(program: &Path, vendor: &str) -> Option<Output> {
    let mut child = Command::new("sh")
        .args(["-c", "ulimit -n $(ulimit -H -n); exec \"$0\""])
        .arg(program)
        .env("LD_PRELOAD", library())
        .env("KVM_OPS_WITH", vendor)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("sh");
    let started = Instant::now();
    while child.try_wait().expect("a child").is_none() {
        if started.elapsed() > LIMIT {
            child.kill().expect("our child");
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(child.wait_with_output().expect("output"))
}

fn text(output: &Output) -> String {
    let bytes = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a program says that does not pass.
fn complaint(output: Option<&Output>) -> Option<String> {
    match output {
        None => Some("does not end".to_owned()),
        Some(output) if output.status.success() => None,
        Some(output) => Some(format!("{}: {}", output.status, text(output))),
    }
}

/// The row of a program in the manual's table.
fn row(name: &str, vendor: &str) -> String {
    format!("| `{name}` | {vendor} | passes |")
}

#[test]
fn the_kernels_self_tests_pass() {
    let Some(folder) = std::env::var_os("KVM_OPS_SELFTESTS").map(PathBuf::from) else {
        println!("skipped: KVM_OPS_SELFTESTS names no directory with the kernel's self-tests");
        return;
    };
    assert!(library().exists(), "{}", library().display());
    let mut table = String::new();
    let mut wrong = Vec::new();
    for (name, vendor) in PROGRAMS {
        let program = folder.join(name);
        if !program.exists() {
            println!("skipped: {name} was not built");
            continue;
        }
        match complaint(run(&program, vendor).as_ref()) {
            None => writeln!(table, "{}", row(name, vendor)).expect("memory"),
            Some(text) => wrong.push(format!("{name} ({vendor}): {text}")),
        }
    }
    println!("{table}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The exit code of a program that skips itself.
const SKIPS: i32 = 4;

#[test]
fn programs_that_look_for_more_than_there_is_skip_themselves() {
    let Some(folder) = std::env::var_os("KVM_OPS_SELFTESTS").map(PathBuf::from) else {
        println!("skipped: KVM_OPS_SELFTESTS names no directory with the kernel's self-tests");
        return;
    };
    let mut wrong = Vec::new();
    for (_, part, names) in SKIPPED {
        for name in *names {
            let program = folder.join(name);
            if !program.exists() {
                println!("skipped: {name} was not built");
                continue;
            }
            let Some(output) = run(&program, "amd") else {
                wrong.push(format!("{name}: does not end"));
                continue;
            };
            let text = text(&output);
            if output.status.code() != Some(SKIPS) || !text.contains(part) {
                wrong.push(format!("{name}: {}: {text}", output.status));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The manual's table is the runner's, also where the programs are missing.
#[test]
fn the_manual_has_each_program() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/softkvm.md");
    let page = std::fs::read_to_string(page).expect("the page");
    for (name, vendor) in PROGRAMS {
        let row = row(name, vendor);
        assert!(page.contains(&row), "{row}");
    }
    for (reason, _, names) in SKIPPED {
        let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
        let row = format!("| {reason} | {} |", names.join(", "));
        assert!(page.contains(&row), "{row}");
    }
    let rows = page
        .lines()
        .filter(|line| line.contains(" | amd | ") || line.contains(" | intel | "));
    assert_eq!(rows.count(), PROGRAMS.len());
}

#[test]
fn a_program_that_never_opens_kvm_is_left_alone() {
    let output = Command::new("cat")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .env("LD_PRELOAD", library())
        .env("KVM_OPS_WITH", "amd")
        .output()
        .expect("cat");
    assert!(output.status.success());
    assert_eq!(output.stdout, include_bytes!("../Cargo.toml"));
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
