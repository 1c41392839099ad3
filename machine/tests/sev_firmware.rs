//! Real firmware in SEV, SEV-ES and SNP guests: OVMF from its reset vector to the boot manager, on the software platform.
//!
//! The image is `OVMF.amdsev.fd` of Debian's package ovmf-amdsev (2026.08), or the file that the environment variable
//! `KVM_OPS_OVMF_SEV` names. Images that are refused are those of Debian 12's package ovmf.
#![cfg(target_arch = "x86_64")]

mod support;

use std::path::{Path, PathBuf};

use kvm_ops::sim::SimHost;
use kvm_ops::{Kind, Tech, Vendor};
use kvm_ops_machine::{ConsoleSink, End, Image, ImageFormat, Machine, MachineConfig};
use soft_amd_sp::Platform;
use soft_amd_sp::measure::Launch;
use support::boots;

const MEMORY: u64 = 256 << 20;
/// The end of the boot manager's work, where nothing can be booted.
const NOTHING_TO_BOOT: &str = "BdsDxe: No bootable option was found.";

fn config(tech: Tech, firmware: &Path) -> MachineConfig {
    MachineConfig::new()
        .kind(Kind::Of(tech))
        .memory(MEMORY)
        .image(Image::open(firmware).unwrap())
}

fn ovmf() -> Option<PathBuf> {
    let named = std::env::var("KVM_OPS_OVMF_SEV").ok();
    let path = named.as_deref().unwrap_or("/usr/share/ovmf/OVMF.amdsev.fd");
    support::file(path).map(Into::into)
}

/// Runs firmware in a guest until the boot manager gives up, with a clock that stands. Returns the instructions that this
/// took, and the console's text.
fn runs_to_the_boot_manager(tech: Tech, firmware: &Path) -> (u64, String) {
    // A SEV guest reads memory that it never wrote, which is noise of its key: one seed gives one key.
    let platform = Platform::builder().memory(4 * MEMORY).seed(1);
    let host = SimHost::builder(Vendor::Amd).sev(platform).build().unwrap();
    let machine = Machine::build(&host, config(tech, firmware)).unwrap();
    boots(machine, &host, NOTHING_TO_BOOT)
}

fn runs_the_same_each_time(tech: Tech) {
    let Some(firmware) = ovmf() else { return };
    let first = runs_to_the_boot_manager(tech, &firmware);
    assert_eq!(runs_to_the_boot_manager(tech, &firmware), first);
}

#[test]
fn ovmf_shares_memory_by_the_c_bit_alone_and_reaches_its_boot_manager_as_a_sev_guest() {
    runs_the_same_each_time(Tech::Sev);
}

#[test]
fn ovmf_asks_for_devices_by_the_ghcb_and_reaches_its_boot_manager_as_a_sev_es_guest() {
    runs_the_same_each_time(Tech::SevEs);
}

#[test]
fn ovmf_reaches_its_boot_manager_as_an_snp_guest() {
    runs_the_same_each_time(Tech::SevSnp);
}

#[test]
fn ovmf_is_measured_for_an_snp_guest_as_off_line() {
    let Some(firmware) = ovmf() else { return };
    let host = SimHost::new(Vendor::Amd);
    let machine = Machine::build(&host, config(Tech::SevSnp, &firmware)).unwrap();
    let signature = host.sev_platform().unwrap().cpuid_signature();
    let image = std::fs::read(firmware).unwrap();
    let expected = Launch::new(&image).vcpu_sig(signature).snp().unwrap();
    assert_eq!(*machine.vm().measurement().unwrap().bytes(), expected);
    assert!(machine.destroy().is_clean());
}

#[test]
fn firmware_without_room_or_metadata_starts_no_snp_guest() {
    let Some(firmware) = support::file("/usr/share/ovmf/OVMF.fd") else {
        return;
    };
    support::refuses_wrong_firmware(Vendor::Amd, firmware, || {
        config(Tech::SevSnp, firmware.as_ref())
    });
}

#[test]
fn firmware_without_a_handler_ends_in_a_triple_fault() {
    let mut image = vec![0; 0x1000];
    // lidt cs:[0xffe0], which has a limit of 0; ud2
    let code = [0x2e, 0x0f, 0x01, 0x1e, 0xe0, 0xff, 0x0f, 0x0b];
    image[0xff0..0xff8].copy_from_slice(&code);
    let image = Image::from_bytes("ud2", image).with_format(ImageFormat::Firmware);
    let config = MachineConfig::new()
        .kind(Kind::Of(Tech::SevEs))
        .memory(1 << 20)
        .image(image);
    let host = SimHost::new(Vendor::Amd);
    let mut machine = Machine::build(&host, config).unwrap();
    let q35 = machine.q35(ConsoleSink::capture());
    let report = machine.run(&q35, support::limits()).unwrap();
    assert_eq!(report.end, End::TripleFault, "{report:?}");
    assert!(machine.destroy().is_clean());
}
