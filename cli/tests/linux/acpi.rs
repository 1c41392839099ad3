//! Linux that starts without firmware finds its machine by ACPI tables.

use serde_json::Value;

use crate::archive::initramfs;
use crate::boot::{CMDLINE, console, has_processors, trusts_its_vcpus};
use crate::common::{named, run};
use crate::{figures, init, processor_seconds};

/// Boots a normal VM until the guest switches off. Returns its console, unless there is no kernel.
fn boots(vcpus: u32, more: &[&str]) -> Option<String> {
    let kernel = named("KVM_OPS_LINUX")?;
    let archive = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(archive.path(), initramfs(&[("init", init::guest())])).unwrap();
    let archive = archive.path().to_str().unwrap();
    let number = vcpus.to_string();
    let began = processor_seconds();
    let ran = run(&[
        &["run", &kernel, "--initrd", archive, "--append", CMDLINE][..],
        &["--host", "sim", "--memory", "512M", "--vcpus", &number],
        &["--timeout", "20m", "--clock", "1795219200", "--json"],
        more,
    ]
    .concat());
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    let report: Value = serde_json::from_str(&ran.out).unwrap();
    let text = console(&report);
    assert_eq!(report["outcome"], "switched off", "{text}");
    has_processors(text, vcpus);
    for found in [
        // The root pointer of the boot parameters, the window of MCFG, and the bridge of the DSDT.
        "ACPI: RSDP 0x00000000000E0000",
        "[mem 0xb0000000-0xbfffffff]",
        "ACPI: PCI Root Bridge [PCI0]",
        "ACPI: Using IOAPIC for interrupt routing",
    ] {
        assert!(text.contains(found), "{found}: {text}");
    }
    for complaint in ["ACPI Error", "ACPI BIOS Error", "Firmware Bug"] {
        assert!(!text.contains(complaint), "{text}");
    }
    let how = more.join(" ");
    figures(
        &format!("Linux by ACPI, vCPUs: {vcpus} {how}"),
        &report,
        began,
    );
    Some(text.to_owned())
}

#[test]
fn a_kernel_finds_its_machine_by_acpi_tables_and_switches_off() {
    boots(1, &[]);
}

#[test]
fn a_kernel_finds_all_its_vcpus_by_acpi_tables() {
    boots(4, &[]);
}

/// vCPUs that execute at the same time.
fn boots_on_threads(vcpus: u32) {
    let Some(text) = boots(vcpus, &["--threads"]) else {
        return;
    };
    trusts_its_vcpus(&text);
    assert!(
        text.contains("clocksource: Switched to clocksource tsc"),
        "{text}"
    );
}

#[test]
fn a_kernel_with_two_vcpus_that_execute_at_the_same_time_boots() {
    boots_on_threads(2);
}

#[test]
fn a_kernel_with_four_vcpus_that_execute_at_the_same_time_boots() {
    boots_on_threads(4);
}
