//! Real firmware in normal VMs: OVMF from its reset vector to the boot manager, on the software platform.
//!
//! The image is `OVMF.fd` of Debian 12's package ovmf.
#![cfg(target_arch = "x86_64")]

mod support;

use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_machine::{Image, Machine, MachineConfig};

#[test]
fn ovmf_reaches_its_boot_manager_in_a_normal_vm_of_either_vendor() {
    let Some(firmware) = support::file("/usr/share/ovmf/OVMF.fd") else {
        return;
    };
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let host = SimHost::new(vendor);
        let config = MachineConfig::new()
            .memory(256 << 20)
            .image(Image::open(firmware).unwrap());
        let machine = Machine::build(&host, config).unwrap();
        support::boots(machine, &host, "BdsDxe: loading Boot0001");
    }
}
