//! Linux that starts without firmware finds its machine by ACPI tables.

use serde_json::Value;

use crate::archive::initramfs;
use crate::boot::{CMDLINE, console, has_processors};
use crate::common::run;
use crate::{figures, init, kernel, processor_seconds};

/// Boots a normal VM until the guest switches off.
fn boots(vcpus: u32) {
    let Some(kernel) = kernel("KVM_OPS_LINUX") else {
        return;
    };
    let archive = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(archive.path(), initramfs(&[("init", init::guest())])).unwrap();
    let archive = archive.path().to_str().unwrap();
    let number = vcpus.to_string();
    let began = processor_seconds();
    let ran = run(&[
        &["run", &kernel, "--initrd", archive, "--append", CMDLINE][..],
        &["--host", "sim", "--memory", "512M", "--vcpus", &number],
        &["--timeout", "20m", "--clock", "1795219200", "--json"],
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
    figures(&format!("Linux by ACPI, vCPUs: {vcpus}"), &report, began);
}

#[test]
fn a_kernel_finds_its_machine_by_acpi_tables_and_switches_off() {
    boots(1);
}

#[test]
fn a_kernel_finds_all_its_vcpus_by_acpi_tables() {
    boots(4);
}
