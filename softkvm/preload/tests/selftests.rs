//! The kernel's KVM self-tests under the preloaded library. `KVM_OPS_SELFTESTS` names the directory in
//! which they were built; without it the test says that it is skipped.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How a program ends: it passes, or it fails with this text, for this reason.
#[derive(Clone, Copy)]
enum Ends {
    Pass,
    Fail(&'static str, &'static str),
}
use Ends::{Fail, Pass};

/// Program, vendor, end.
const PROGRAMS: &[(&str, &str, Ends)] = &[
    ("vm_types_test", "amd", Pass),
    ("vm_types_test", "intel", Pass),
    ("kvm_create_max_vcpus", "amd", Pass),
    ("kvm_create_max_vcpus", "intel", Pass),
    ("x86/max_vcpuid_cap_test", "amd", Pass),
    ("x86/max_vcpuid_cap_test", "intel", Pass),
    ("x86/sev_init2_tests", "amd", Pass),
    ("x86/sev_migrate_tests", "amd", Pass),
    ("x86/sev_dbg_test", "amd", Pass),
    ("guest_memfd_test", "amd", Pass),
    ("pre_fault_memory_test", "amd", Pass),
    ("set_memory_region_test", "amd", Pass),
    ("x86/private_mem_kvm_exits_test", "amd", Pass),
    ("x86/private_mem_conversions_test", "amd", Pass),
    ("guest_print_test", "amd", Pass),
    ("x86/userspace_io_test", "amd", Pass),
    ("x86/cr4_cpuid_sync_test", "amd", Pass),
    ("x86/recalc_apic_map_test", "amd", Pass),
    ("x86/sync_regs_test", "amd", Pass),
    ("x86/set_boot_cpu_id", "amd", Pass),
    ("x86/xcr0_cpuid_test", "amd", Pass),
    ("x86/xss_msr_test", "amd", Pass),
    ("irqfd_test", "amd", Pass),
    ("kvm_binary_stats_test", "amd", Pass),
    ("irq_test", "amd", Pass),
    ("x86/cpuid_test", "amd", Pass),
    ("x86/feature_msrs_test", "amd", Pass),
    ("x86/apic_bus_clock_test", "amd", Pass),
    ("x86/tsc_msrs_test", "amd", Pass),
    ("x86/set_sregs_test", "amd", Pass),
    ("x86/userspace_msr_exit_test", "amd", Pass),
    ("x86/xapic_ipi_test", "amd", Pass),
    ("x86/xapic_tpr_test", "amd", Pass),
    ("x86/save_restore_pf_stress_test", "amd", Pass),
    ("demand_paging_test", "amd", Pass),
    ("dirty_log_perf_test", "amd", Pass),
    ("kvm_page_table_test", "amd", Pass),
    ("memslot_modification_stress_test", "amd", Pass),
    ("rseq_test", "amd", Pass),
    ("dirty_log_test", "amd", Pass),
    (
        "x86/state_test",
        "amd",
        Fail("supported_xcr0", "XSAVE has no component for PKRU"),
    ),
    (
        "x86/msrs_test",
        "amd",
        Fail(
            "kvm_msr_is_in_save_restore_list",
            "the list of MSRs has fewer than the processor",
        ),
    ),
    (
        "x86/hwcr_msr_test",
        "amd",
        Fail("r == msrs->nmsrs", "the processor has no HWCR"),
    ),
    ("x86/sev_smoke_test", "amd", Pass),
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
    (
        "quirks that can be disabled",
        "KVM_CAP_DISABLE_QUIRKS2",
        &["x86/fix_hypercall_test", "x86/vmx_msrs_test"],
    ),
    (
        "coalesced MMIO",
        "KVM_CAP_COALESCED_MMIO",
        &["coalesced_io_test"],
    ),
    (
        "guest debugging",
        "KVM_CAP_SET_GUEST_DEBUG",
        &["x86/debug_regs"],
    ),
    ("SMM", "KVM_CAP_X86_SMM", &["x86/smm_test"]),
    (
        "paravirtual features: stolen time, and CPUID that is enforced",
        "Requirement not met",
        &["steal_time", "x86/kvm_pv_test"],
    ),
    (
        "clocks of the host: an offset of the TSC, real time",
        "SKIP",
        &["system_counter_offset_test", "x86/kvm_clock_test"],
    ),
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

impl Ends {
    /// The words of the table.
    fn words(self) -> String {
        match self {
            Pass => "passes".to_owned(),
            Fail(text, reason) => format!("fails: {reason} (`{text}`)"),
        }
    }
}

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

/// Tells how a program ended, in the words of the table.
fn judge(output: Option<&Output>, expected: Ends) -> Result<String, String> {
    let Some(output) = output else {
        return Err("does not end".to_owned());
    };
    let text = text(output);
    let as_expected = match expected {
        Pass => output.status.success(),
        Fail(last, _) => !output.status.success() && text.contains(last),
    };
    if as_expected {
        Ok(expected.words())
    } else {
        Err(format!("{}: {text}", output.status))
    }
}

#[test]
fn the_kernels_self_tests_end_as_the_manual_says() {
    let Some(folder) = std::env::var_os("KVM_OPS_SELFTESTS").map(PathBuf::from) else {
        println!("skipped: KVM_OPS_SELFTESTS names no directory with the kernel's self-tests");
        return;
    };
    assert!(library().exists(), "{}", library().display());
    let mut table = String::new();
    let mut wrong = Vec::new();
    for (name, vendor, expected) in PROGRAMS {
        let program = folder.join(name);
        if !program.exists() {
            println!("skipped: {name} was not built");
            continue;
        }
        match judge(run(&program, vendor).as_ref(), *expected) {
            Ok(end) => writeln!(table, "| `{name}` | {vendor} | {end} |").expect("memory"),
            Err(end) => wrong.push(format!("{name} ({vendor}): {end}")),
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
fn the_manual_has_each_program_and_its_end() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/softkvm.md");
    let page = std::fs::read_to_string(page).expect("the page");
    for (name, vendor, expected) in PROGRAMS {
        let row = format!("| `{name}` | {vendor} | {} |", expected.words());
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
