//! Linux in an SNP guest: firmware, kernel, user space.

use serde_json::Value;

use crate::boot::{Boot, CMDLINE, Guests, boots_alike, boots_on_threads, bytes, console};
use crate::common::{ovmf_sev, run};
use crate::init;

/// The firmware that measures the kernel, of Debian's package ovmf-amdsev, or what the environment names.
pub(crate) const SNP: Guests = Guests {
    name: "an SNP guest",
    options: &["--tech", "sev-snp"],
    firmware: ovmf_sev,
    says: "Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP",
    // The kernel clears those of SEV where SYSCFG does not say that the host encrypts, as KVM's does not.
    flag: None,
};

/// The variable that names a kernel for SNP guests.
pub(crate) const KERNEL: &str = "KVM_OPS_LINUX_SNP";

/// The modules by which a kernel tells its guest's evidence, in the order of their loading: the cipher of messages among them.
const MODULES: [&[&str]; 7] = [
    &["fs/configfs/configfs.ko.xz"],
    &[
        "drivers/virt/coco/tsm.ko.xz",
        "drivers/virt/coco/guest/tsm_report.ko.xz",
    ],
    &["lib/crypto/gf128mul.ko.xz"],
    &["crypto/ghash-generic.ko.xz"],
    &["crypto/crypto_null.ko.xz"],
    &["crypto/gcm.ko.xz"],
    &["drivers/virt/coco/sev-guest/sev-guest.ko.xz"],
];

#[test]
fn a_kernel_boots_in_an_snp_guest_to_user_space_and_switches_off_with_the_same_instructions_each_time()
 {
    boots_alike(&SNP, KERNEL, 1);
}

#[test]
fn a_kernel_creates_the_other_vcpus_of_its_snp_guest_and_runs_are_still_alike() {
    boots_alike(&SNP, KERNEL, 4);
}

#[test]
fn the_vcpus_of_an_snp_guest_that_execute_at_the_same_time_boot_a_kernel() {
    for vcpus in [2, 4] {
        boots_on_threads(&SNP, KERNEL, vcpus);
    }
}

/// The policy that the program launches guests with: SMT is allowed, and bit 17 is always 1.
const POLICY: &str = "0x30000";

/// The digest of the launch, computed from the files alone.
fn measured(boot: &Boot) -> String {
    // EPYC 9004, family 0x19, model 0x11, stepping 1: the software platform.
    let ran = run(&[
        &["measure", "snp", &boot.firmware, "--json"][..],
        &["--vcpus", "1", "--vcpu-sig", "0xa10f11"],
        &["--kernel", &boot.kernel, "--initrd", boot.archive()],
        &["--append", CMDLINE],
    ]
    .concat());
    let told: Value = serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{}", ran.err));
    told["digest"].as_str().unwrap().to_owned()
}

/// The evidence that Linux gives its user space, by both of its interfaces, is what a verifier accepts: the report is that of a
/// launch of this firmware with the hashes of this kernel, and the certificates that the host gave with it lead to its key.
#[test]
fn a_verifier_accepts_the_reports_and_certificates_that_linux_gives() {
    let Some(boot) = Boot::with_modules(&SNP, KERNEL, &MODULES, init::snp_evidence) else {
        return;
    };
    let ran = boot.run(1, &[]);
    let console = console(&ran);
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let certificates = file("certificates.bin");
    std::fs::write(&certificates, bytes(console, init::CERTIFICATES)).unwrap();
    let (digest, data) = (measured(&boot), hex::encode(init::DATA));
    let wrong = "00".repeat(48);
    for title in [init::SNP_REPORT, init::TSM_REPORT] {
        let report = file("report.bin");
        std::fs::write(&report, bytes(console, title)).unwrap();
        let verify = |measurement: &str| {
            run(&[
                &["attest", "verify", &report, "--cert-chain", &certificates][..],
                &["--root", "software", "--measurement", measurement],
                &["--report-data", &data, "--host-data", "00", "--vmpl", "0"],
                &["--policy", POLICY, "--min-tcb", "boot-loader=4,snp=22"],
                // A platform of its own for each run.
                &["--waive", "chip-id"],
            ]
            .concat())
        };
        let verdict = verify(&digest);
        assert_eq!(verdict.code, Some(0), "{}{}", verdict.out, verdict.err);
        assert_ne!(verify(&wrong).code, Some(0));
    }
}
