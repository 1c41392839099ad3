//! Linux in a normal VM, by firmware: OVMF, kernel, user space.

use crate::boot::{Guests, boots_alike};
use crate::common::ovmf;

#[test]
fn ovmf_starts_a_kernel_in_a_normal_vm_of_either_vendor_the_same_each_time() {
    for (name, options) in [
        ("a VM of Intel's, by OVMF", &["--tech", "vmx"]),
        ("a VM of AMD's, by OVMF", &["--tech", "svm"]),
    ] {
        let guests = Guests {
            name,
            options,
            firmware: ovmf,
            says: "efi: EFI v",
            flag: None,
        };
        boots_alike(&guests, "KVM_OPS_LINUX", 1);
    }
}
