//! Real firmware in a trust domain: from its reset vector to the boot manager, on the software platform.
//!
//! The images are `OVMF.fd` of Debian 12's package ovmf (2022.11), and `OVMF.inteltdx.ms.fd` of Debian's package ovmf-inteltdx
//! (2026.08), or the file that the environment variable `KVM_OPS_TDVF` names.
#![cfg(target_arch = "x86_64")]

mod support;

use std::path::Path;
use std::time::Duration;

use kvm_ops::sim::SimHost;
use kvm_ops::{EncParams, Kind, TdParams, Tech, Vendor};
use kvm_ops_machine::{ConsoleSink, Disk, DiskCounts, Image, Machine, MachineConfig, Q35};
use support::Until;

const MEMORY: u64 = 256 << 20;
const PROMPT: &str = "Press any key to enter the Boot Manager Menu";
/// Debian 12's firmware, and the text with which its boot manager starts the only thing that it finds.
const DEBIAN_12: &str = "/usr/share/ovmf/OVMF.fd";
const SHELL: &str = "BdsDxe: starting Boot0001 \"EFI Internal Shell\"";
/// The text with which it looks for a system on the disk in the second slot.
const SECOND_DISK: &str = "from PciRoot(0x0)/Pci(0x2,0x0)";

/// A TD with that firmware.
fn config(firmware: &Path) -> MachineConfig {
    // The firmware handles the #VE of pages that it has not accepted.
    let params = TdParams {
        attributes: 0,
        ..TdParams::default()
    };
    with_params(firmware, params)
}

fn with_params(firmware: &Path, params: TdParams) -> MachineConfig {
    MachineConfig::new()
        .kind(Kind::Of(Tech::Tdx))
        .memory(MEMORY)
        .enc(EncParams::Td(Box::new(params)))
        .image(Image::open(firmware).unwrap())
}

/// Runs firmware until it prints a text. Returns what it did with its disks.
#[track_caller]
fn runs_until(config: MachineConfig, disks: Vec<Disk>, text: &'static str) -> Vec<DiskCounts> {
    let host = SimHost::new(Vendor::Intel);
    let machine = Machine::build(&host, config).unwrap();
    let console = ConsoleSink::capture();
    let q35 = machine.q35(console.clone());
    let q35 = disks.into_iter().try_fold(q35, Q35::with_disk).unwrap();
    let handler = Until::new(q35, console.clone(), text);
    // Half a billion instructions, and the processor is not optimised in a test.
    handler.counts(machine, &host, Duration::from_secs(300));
    handler.devices.disk_counts()
}

fn tdvf() -> Option<std::path::PathBuf> {
    let named = std::env::var("KVM_OPS_TDVF").ok();
    let path = named
        .as_deref()
        .unwrap_or("/usr/share/ovmf/OVMF.inteltdx.ms.fd");
    support::file(path).map(Into::into)
}

#[test]
fn tdvf_runs_from_its_reset_vector_to_the_boot_manager() {
    if let Some(firmware) = tdvf() {
        runs_until(config(&firmware), Vec::new(), PROMPT);
    }
}

/// A TD with Debian 12's firmware, if it is there.
fn debian_12() -> Option<MachineConfig> {
    let firmware = support::file(DEBIAN_12)?;
    // It passes RBP to the host, and has accepted all memory before it uses any.
    let params = TdParams {
        no_rbp_mod: false,
        ..TdParams::default()
    };
    Some(with_params(firmware.as_ref(), params))
}

#[test]
fn debian_12s_ovmf_runs_from_its_reset_vector_to_the_boot_manager() {
    if let Some(config) = debian_12() {
        runs_until(config, Vec::new(), SHELL);
    }
}

#[test]
fn firmware_gives_disks_memory_reads_them_and_looks_for_systems_there() {
    let Some(config) = debian_12() else {
        return;
    };
    // The first sector is that of a disk with a table of partitions, of which there is none.
    let images = [(); 2].map(|()| {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(image.as_file(), &[0x55, 0xaa], 510).unwrap();
        image
    });
    let disks = vec![
        Disk::open(images[0].path()).unwrap(),
        Disk::open_read_only(images[1].path()).unwrap(),
    ];
    let counts = runs_until(config, disks, SECOND_DISK);
    for counts in counts {
        assert!(counts.reads >= 2 && counts.bytes_read >= 1024, "{counts:?}");
        let wrong = (counts.failed, counts.private, counts.resets_needed);
        assert_eq!((counts.writes, wrong), (0, (0, 0, 0)), "{counts:?}");
    }
}

#[test]
fn firmware_without_room_or_metadata_starts_no_td() {
    let Some(firmware) = support::file(DEBIAN_12) else {
        return;
    };
    support::refuses_wrong_firmware(Vendor::Intel, firmware, || config(firmware.as_ref()));
}
