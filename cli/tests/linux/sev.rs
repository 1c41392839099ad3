//! Linux in SEV and SEV-ES guests: firmware, kernel, user space.

use crate::boot::{Guests, boots_alike};
use crate::common::named;
use crate::snp::KERNEL;

const SEV: Guests = Guests {
    name: "a SEV guest",
    options: &["--tech", "sev"],
    firmware,
    // Nothing follows.
    says: "Memory Encryption Features active: AMD SEV\r\n",
    flag: None,
};

const SEV_ES: Guests = Guests {
    name: "a SEV-ES guest",
    options: &["--tech", "sev-es"],
    firmware,
    says: "Memory Encryption Features active: AMD SEV SEV-ES\r\n",
    flag: None,
};

/// `OVMF.fd` of Debian's package ovmf-generic (2026.08). There is no other default: that of Debian 12 fails in
/// these guests (docs/machine-code.md), and that of ovmf-amdsev wants hashes of the kernel, which only an SNP guest gets.
fn firmware() -> Option<String> {
    named("KVM_OPS_OVMF")
}

#[test]
fn a_kernel_boots_in_a_sev_guest_to_user_space_and_switches_off_with_the_same_instructions_each_time()
 {
    boots_alike(&SEV, KERNEL, 1);
}

#[test]
fn a_kernel_boots_in_a_sev_es_guest_to_user_space_and_switches_off_with_the_same_instructions_each_time()
 {
    boots_alike(&SEV_ES, KERNEL, 1);
}

#[test]
fn a_kernel_starts_the_other_vcpus_of_its_sev_es_guest_by_the_jump_table_and_runs_are_still_alike()
{
    boots_alike(&SEV_ES, KERNEL, 4);
}
