//! Packages outside of the workspace, which no setting of its profiles reaches: they build, and pass
//! their tests.

use std::path::Path;
use std::process::{Command, Output};

/// Runs cargo on the package in `tests/<package>`, and returns what it printed if it succeeds.
fn cargo(verb: &str, package: &str, arguments: &[&str]) -> String {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let output = Command::new(env!("CARGO"))
        .args([verb, "--quiet", "--locked", "--manifest-path"])
        .arg(format!("{root}/{package}/Cargo.toml"))
        .arg("--target-dir")
        .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("embedder"))
        .args(arguments)
        // The settings of the outer cargo apply to the outer package only.
        .env_remove("CARGO_MANIFEST_DIR")
        .env_remove("RUSTFLAGS")
        // Most of what these builds would take of the disk.
        .env("CARGO_PROFILE_DEV_DEBUG", "none")
        .env("CARGO_INCREMENTAL", "0")
        .output()
        .expect("cargo starts");
    let Output {
        status,
        stdout,
        stderr,
    } = output;
    let text = String::from_utf8_lossy(&stdout).into_owned();
    let errors = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{text}\n{errors}");
    text
}

#[test]
fn an_out_of_tree_back_end_joins_an_enum_of_ours_and_passes_the_kit() {
    let text = cargo("test", "embedder", &[]);
    assert!(text.contains("4 passed"), "{text}");
}

/// Without optimisation above all: the compiler cannot build vector instructions for a soft-float
/// target then, and our profiles, which optimise cryptography, are not the user's.
#[test]
fn a_bare_metal_hypervisor_links_in_debug_and_release() {
    let text = cargo("test", "outside/metal", &[]);
    assert!(text.contains("4 passed"), "{text}");

    let none = "x86_64-unknown-none";
    let rustc = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", none])
        .output();
    let libraries = rustc.ok().filter(|told| told.status.success());
    let libraries = libraries.and_then(|told| String::from_utf8(told.stdout).ok());
    if !libraries.is_some_and(|directory| Path::new(directory.trim()).exists()) {
        println!("skipped: the target {none} is not installed");
        return;
    }
    for profile in ["dev", "release"] {
        cargo(
            "build",
            "outside/metal",
            &["--target", none, "--profile", profile],
        );
    }
}
