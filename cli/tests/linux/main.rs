//! A Linux kernel boots on the software platform, as a normal VM, in a TD and in SEV, SEV-ES and SNP guests, to a program in user
//! space.
//!
//! `KVM_OPS_LINUX` names the kernel, a bzImage with a serial console, `KVM_OPS_LINUX_TDX` and `KVM_OPS_LINUX_SNP` one that
//! knows TDX or SNP, with its modules where its package has them; without them the tests say that they are skipped.
//! `KVM_OPS_LINUX=vmlinuz cargo test --release -p kvm-ops-cli --test linux -- --nocapture --test-threads 1` prints the figures
//! of docs/machine-code.md. `KVM_OPS_OVMF` names the firmware of normal VMs and TDs, and `KVM_OPS_OVMF_SEV` that of the SNP guest, if they
//! are not where Debian installs them. SEV and SEV-ES guests are tested with the firmware that `KVM_OPS_OVMF` names, and with no other.

mod acpi;
mod archive;
mod boot;
#[path = "../common/mod.rs"]
mod common;
mod console;
mod disk;
mod init;
mod modules;
mod pc;
mod program;
mod sev;
mod snp;
mod td;

use archive::initramfs;
use common::{named, run};

/// The options of a boot as a normal VM.
const NORMAL: [&str; 11] = [
    "--host",
    "sim",
    "--cmdline",
    boot::CMDLINE,
    "--memory",
    "512M",
    "--timeout",
    "20m",
    "--clock",
    "1795219200",
    "--json",
];

/// Processor time of the programs that have ended, in seconds (proc(5): cutime and cstime of /proc/PID/stat, 100 ticks a second).
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // The name may have spaces; the state follows it, the third field.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks = fields.split_whitespace().skip(16 - 3).take(2);
    ticks.map(|n| n.parse::<f64>().unwrap()).sum::<f64>() / 100.0
}

/// Prints the figures of a run that began at that [`processor_seconds`]. Tests that run beside it are counted, too.
fn figures(what: &str, report: &serde_json::Value, began: f64) {
    let instructions = report["instructions"].as_u64().unwrap();
    let seconds = report["seconds"].as_f64().unwrap();
    let rate = |seconds: f64| instructions as f64 / 1e6 / seconds;
    let busy = processor_seconds() - began;
    println!(
        "{what}: {instructions} instructions in {seconds:.1} s, {:.0} M/s; with start and teardown {busy:.1} s of processor \
         time, {:.0} M/s",
        rate(seconds),
        rate(busy)
    );
}

#[test]
fn a_kernel_boots_to_user_space_and_restarts_with_the_same_instructions_each_time() {
    let Some(kernel) = named("KVM_OPS_LINUX") else {
        return;
    };
    let archive = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(archive.path(), initramfs(&[("init", init::hello())])).unwrap();
    let archive = archive.path().to_str().unwrap();
    let args = [&["run", &kernel, "--initrd", archive][..], &NORMAL].concat();
    let boot = || {
        let ran = run(&args);
        assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
        let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(report["outcome"], "reset", "{report}");
        report
    };
    let began = processor_seconds();
    let first = boot();
    let console = first["console"]["text"].as_str().unwrap();
    let (_, release) = console.split_once(init::HELLO).expect("user space");
    let release = release.lines().next().unwrap().trim();
    assert!(
        console.contains(&format!("Linux version {release} ")),
        "{console}"
    );
    figures(&format!("Linux {release}"), &first, began);
    let second = boot();
    assert_eq!(second["instructions"], first["instructions"]);
    assert_eq!(second["console"]["text"], first["console"]["text"]);
}
