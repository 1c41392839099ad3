//! The kernel of guest/example, built for x86_64-unknown-none, boots as a TD and as an SNP guest on the software platform.
#![cfg(target_arch = "x86_64")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use kvm_ops::sim::SimHost;
use kvm_ops::{Gpa, Kind, Tech, Vendor};
use kvm_ops_machine::{ConsoleSink, End, Image, Machine, MachineConfig};
use support::limits;

const TARGET: &str = "x86_64-unknown-none";

/// SHA-384 of 48 zeros, which the register starts with, and 48 bytes of the kernel's data.
const RTMR: &str = "a0cf46b98dc169c604e8cc9c6b72b012a6b96384a662f69e73f66850501434cd\
                    ee0fc0478dc5e035d2b2cc77c0ea9a3a";

/// Builds the kernel. `None` where the compiler has no core library for it.
fn kernel() -> Option<PathBuf> {
    let rustc = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", TARGET])
        .output();
    let library = rustc.ok().filter(|told| told.status.success());
    let library = library.and_then(|told| String::from_utf8(told.stdout).ok());
    if !library.is_some_and(|path| Path::new(path.trim()).is_dir()) {
        println!(
            "skipped: the compiler has no core library for {TARGET} (rustup target add {TARGET})"
        );
        return None;
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-example");
    let built = Command::new(env!("CARGO"))
        // Its own configuration, which flags of the environment would replace.
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../guest/example"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", &target)
        .args(["build", "--quiet", "--locked"])
        .status();
    assert!(built.unwrap().success());
    Some(target.join(TARGET).join("debug/guest-example"))
}

/// Boots the kernel until it switches off. Returns the lines that it printed, and what was measured of it.
fn boots(vendor: Vendor, tech: Tech) -> Option<(Vec<String>, Vec<u8>)> {
    let kernel = kernel()?;
    let config = MachineConfig::new()
        .kind(Kind::Of(tech))
        .memory(16 << 20)
        .image(Image::open(kernel).unwrap());
    let mut machine = Machine::build(&SimHost::new(vendor), config).unwrap();
    let console = ConsoleSink::capture();
    let report = machine.run(&machine.q35(console.clone()), limits());
    let text = console.text();
    assert_eq!(report.unwrap().end, End::PowerOff, "{text}");
    let measured = machine.vm().measurement().unwrap().bytes().to_vec();
    // The page that the guest shared.
    let mut seen = [0; 19];
    machine
        .memory()
        .read(Gpa::new(0x80_f000), &mut seen)
        .unwrap();
    assert_eq!(seen, *b"for the host to see", "{text}");
    assert!(machine.destroy().is_clean());
    Some((text.lines().map(str::to_owned).collect(), measured))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_kernel_runs_as_a_td_and_its_report_has_the_measurements() {
    let Some((lines, measured)) = boots(Vendor::Intel, Tech::Tdx) else {
        return;
    };
    let expected = [
        "hello from a TD".into(),
        "accepted 0x10000 bytes".into(),
        format!("MRTD {}", hex(&measured)),
        format!("RTMR2 {RTMR}"),
        format!("data {}", "5a".repeat(64)),
    ];
    assert_eq!(lines, expected);
}

#[test]
fn the_same_kernel_runs_as_an_snp_guest_and_its_report_has_the_digest() {
    let Some((lines, measured)) = boots(Vendor::Amd, Tech::SevSnp) else {
        return;
    };
    let expected = [
        "hello from an SNP guest".into(),
        "accepted 0x10000 bytes".into(),
        format!("measurement {}", hex(&measured)),
        format!("data {}", "5a".repeat(64)),
    ];
    assert_eq!(lines, expected);
}
