//! Linux in a TD: firmware, kernel, user space.

use serde_json::Value;

use crate::boot::{Boot, Guests, boots_alike, boots_on_threads, bytes, console};
use crate::common::{named, ovmf, run};
use crate::init;

/// The variable that names a kernel for TDs.
pub(crate) const KERNEL: &str = "KVM_OPS_LINUX_TDX";

pub(crate) const TD: Guests = Guests {
    name: "a TD",
    options: &["--tech", "tdx", "--allow-rbp"],
    firmware: ovmf,
    says: "tdx: Guest detected",
    flag: Some("tdx_guest"),
};

/// The modules by which a kernel tells its TD's evidence, in the order of their loading. Each with its place in Linux 6.12 and, if
/// it has moved, in 7.2.
const MODULES: [&[&str]; 3] = [
    &["fs/configfs/configfs.ko.xz"],
    &[
        "drivers/virt/coco/tsm.ko.xz",
        "drivers/virt/coco/guest/tsm_report.ko.xz",
    ],
    &["drivers/virt/coco/tdx-guest/tdx-guest.ko.xz"],
];

#[test]
fn a_kernel_boots_in_a_td_to_user_space_and_switches_off_with_the_same_instructions_each_time() {
    boots_alike(&TD, KERNEL, 1);
}

#[test]
fn a_kernel_starts_the_other_vcpus_of_its_td_and_runs_are_still_alike() {
    boots_alike(&TD, KERNEL, 4);
}

#[test]
fn the_vcpus_of_a_td_that_execute_at_the_same_time_boot_a_kernel() {
    for vcpus in [2, 4] {
        boots_on_threads(&TD, KERNEL, vcpus);
    }
}

/// The evidence that Linux gives its user space is what a verifier accepts: the quote is that of this launch, and the event log
/// in the guest's memory replays to its RTMRs.
#[test]
fn a_verifier_accepts_the_quote_and_the_event_log_that_linux_gives() {
    let Some(boot) = Boot::with_modules(&TD, KERNEL, &MODULES, init::evidence) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let ran = boot.run(1, &["--collateral", &file("collateral.json")]);
    let console = console(&ran);
    let (report, quote) = (bytes(console, init::REPORT), bytes(console, init::QUOTE));
    std::fs::write(file("quote.bin"), &quote).unwrap();
    // REPORTMACSTRUCT.REPORTDATA, and TDINFO, which the quote's body repeats.
    assert_eq!(report[128..192], init::DATA);
    let measured = &ran["measured"];
    let rtmrs = [0, 1, 2, 3].map(|n| measured["rtmr"][n].as_str().unwrap());
    let told = run(&["measure", "tdx", &boot.firmware, "--json"]);
    let told: Value = serde_json::from_str(&told.out).unwrap();
    let zeros = "00".repeat(48);
    let (data, mr_seam) = (
        hex::encode(init::DATA),
        hex::encode(soft_tdx_module::report::mr_seam()),
    );
    let mut question = vec![
        "attest",
        "verify",
        directory.path().to_str().unwrap(),
        "--json",
    ];
    question.extend([
        "--root",
        "software",
        "--attributes",
        "0x10000000",
        "--xfam",
        "0x3",
    ]);
    question.extend([
        "--mrtd",
        told["mrtd"]["single"].as_str().unwrap(),
        "--report-data",
        &data,
    ]);
    question.extend(["--mrseam", &mr_seam, "--mrconfigid", &zeros]);
    question.extend(["--mrowner", &zeros, "--mrownerconfig", &zeros]);
    for (option, value) in ["--rtmr0", "--rtmr1", "--rtmr2", "--rtmr3"]
        .into_iter()
        .zip(&rtmrs)
    {
        question.extend([option, *value]);
    }
    // Debian 12's firmware measures nothing, and has no log.
    let log = bytes(console, init::EVENT_LOG);
    let log_file = file("event_log.bin");
    if log.is_empty() {
        assert_eq!(rtmrs, [&*zeros; 4]);
        assert_eq!(measured["event_log"], Value::Null);
    } else {
        // The program finds it in memory, too.
        let replays = &measured["event_log"]["replays"];
        assert_eq!(*replays, Value::from(vec![true; 4]), "{measured}");
        std::fs::write(&log_file, &log).unwrap();
        question.extend(["--event-log", &log_file]);
    }
    let verdict = run(&question);
    assert_eq!(verdict.code, Some(0), "{}{}", verdict.out, verdict.err);
}

/// True if the configuration beside a kernel says that it is built without support of TDX.
fn lacks_tdx(kernel: &str) -> bool {
    let config = kernel.replace("vmlinuz-", "config-");
    std::fs::read_to_string(config).is_ok_and(|text| !text.contains("CONFIG_INTEL_TDX_GUEST=y"))
}

#[test]
fn a_kernel_without_support_of_tdx_ends_in_a_triple_fault_and_nothing_is_lost() {
    const ANY: &str = "KVM_OPS_LINUX";
    if !named(ANY).is_some_and(|kernel| lacks_tdx(&kernel)) {
        println!(
            "skipped: {ANY} names no kernel whose configuration is without CONFIG_INTEL_TDX_GUEST"
        );
        return;
    }
    let Some(boot) = Boot::new(&TD, ANY, &[("init", init::guest())]) else {
        return;
    };
    let (report, ran) = boot.ends(1, &[]);
    // Its EFI stub runs, and the kernel has no handler for #VE.
    assert!(console(&report).contains("EFI stub: "), "{report}");
    assert_eq!(
        (ran.code, &report["outcome"]),
        (Some(3), &"triple fault".into())
    );
    // Where, and with which stack and table.
    let line = |line: &&str| line.contains("the guest has no handler for an exception");
    let line = ran.err.lines().find(line).expect("the place");
    for register in ["rip=0x", "rsp=0x", "cr2=0x", "idt=0x"] {
        assert!(line.contains(register), "{line}");
    }
    assert_eq!(report["leaks"], Value::Array(Vec::new()));
    assert_eq!(
        report["firmware"]["disagreements"],
        Value::Array(Vec::new())
    );
}
