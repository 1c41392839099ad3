//! A test that runs again with the library in front of libc.
#![allow(dead_code)] // Each test binary uses a part.

use std::path::Path;
use std::process::{Command, Output};

/// Set in the second run.
const INSIDE: &str = "KVM_OPS_INSIDE";

/// The number from which the keys of the AMD SP follow in the second run.
pub(crate) const SEED: u64 = 7;

/// Runs a test of this binary again under the library, on a machine of that vendor. `None` in that run; otherwise the
/// log of its calls.
pub(crate) fn again(test: &str, vendor: &str) -> Option<String> {
    again_with(test, vendor, &[])
}

/// The same with more variables.
pub(crate) fn again_with(test: &str, vendor: &str, variables: &[(&str, &Path)]) -> Option<String> {
    if is_inside() {
        return None;
    }
    let (output, calls) = run_again(test, vendor, variables);
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}{calls}");
    assert!(text.contains("1 passed"), "{text}");
    Some(calls)
}

/// True in the second run.
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// The second run, with whatever end, and the log of its calls.
pub(crate) fn run_again(test: &str, vendor: &str, variables: &[(&str, &Path)]) -> (Output, String) {
    let own = std::env::current_exe().expect("a path");
    let folder = std::env::temp_dir();
    let log = folder.join(format!(
        "kvm-ops-{}-{}",
        std::process::id(),
        test.replace("::", "-")
    ));
    let output = Command::new(&own)
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .env("KVM_OPS_WITH", vendor)
        .env("KVM_OPS_SEED", SEED.to_string())
        .env("KVM_OPS_LOG", &log)
        .envs(variables.iter().copied())
        .env("LD_PRELOAD", own.with_file_name("libkvm_ops_preload.so"))
        .output()
        .expect("the test");
    let calls = std::fs::read_to_string(&log).unwrap_or_default();
    let _ = std::fs::remove_file(&log);
    (output, calls)
}

/// Runs a test of this binary again under the library. True in that run.
pub(crate) fn inside(test: &str) -> bool {
    again(test, "amd").is_none()
}
