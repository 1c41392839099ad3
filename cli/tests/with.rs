//! `kvm-ops with`: what it hands to the program that it starts.

mod common;

use std::path::Path;

use common::run;

/// A file that the loader ignores, and its path.
fn library(folder: &Path) -> String {
    let path = folder.join("library.so");
    std::fs::write(&path, "").unwrap();
    path.canonicalize().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn the_program_gets_the_library_the_vendor_and_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let library = library(folder.path());
    for (vendor, expected) in [
        (None, "amd"),
        (Some("--amd"), "amd"),
        (Some("--intel"), "intel"),
    ] {
        let mut args = vec!["with", "--library", &library, "--log", "/tmp/calls.log"];
        args.extend(vendor);
        args.extend(["--", "env"]);
        let ran = run(&args);
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        for line in [
            format!("KVM_OPS_WITH={expected}"),
            format!("LD_PRELOAD={library}"),
            "KVM_OPS_LOG=/tmp/calls.log".to_owned(),
        ] {
            assert!(ran.out.lines().any(|l| l == line), "{line}: {}", ran.out);
        }
    }
}

#[test]
fn the_exit_code_and_the_arguments_are_the_programs() {
    let folder = tempfile::tempdir().unwrap();
    let library = library(folder.path());
    let ran = run(&[
        "with",
        "--library",
        &library,
        "--",
        "sh",
        "-c",
        "echo \"$1\"; exit 42",
        "sh",
        "--log",
    ]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(42), "--log\n"));
}

#[test]
fn what_is_missing_is_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let library = library(folder.path());
    let ran = run(&["with", "--library", "/gone.so", "--", "env"]);
    assert_eq!(ran.code, Some(5));
    assert!(ran.err.contains("cannot read /gone.so"), "{}", ran.err);
    assert!(ran.err.contains("kvm-ops-preload"), "{}", ran.err);
    let ran = run(&["with", "--library", &library, "--", "/gone"]);
    assert_eq!(ran.code, Some(5));
    assert!(ran.err.contains("cannot run /gone"), "{}", ran.err);
    assert_eq!(run(&["with", "--amd"]).code, Some(2));
    assert_eq!(
        run(&["with", "--amd", "--intel", "--", "env"]).code,
        Some(2)
    );
}

#[test]
fn a_plan_of_faults_is_checked_and_handed_on() {
    let folder = tempfile::tempdir().unwrap();
    let library = library(folder.path());
    let plan = folder.path().join("plan.toml");
    let name = plan.to_str().unwrap();
    let inject = |text: &str| {
        std::fs::write(&plan, text).unwrap();
        run(&["with", "--library", &library, "--inject", name, "--", "env"])
    };
    let ran = inject("[[fault]]\ncall = 'KVM_RUN'\nevery = 2\nerrno = 'EINTR'\n");
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let line = format!("KVM_OPS_INJECT={name}");
    assert!(ran.out.lines().any(|l| l == line), "{}", ran.out);
    let ran = inject("[[fault]]\ncall = 'KVM_WALK'\nnth = 1\nerrno = 'EINTR'\n");
    assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""));
    assert!(ran.err.contains("is no plan of faults"), "{}", ran.err);
    assert!(ran.err.contains("line 2"), "{}", ran.err);
    assert!(ran.err.contains("`KVM_WALK` is no ioctl"), "{}", ran.err);
    let ran = run(&[
        "with",
        "--library",
        &library,
        "--inject",
        "/gone",
        "--",
        "env",
    ]);
    assert_eq!(ran.code, Some(5), "{}", ran.err);
}

#[test]
fn a_record_is_replaced_or_checked_and_handed_on() {
    let folder = tempfile::tempdir().unwrap();
    let library = library(folder.path());
    let record = folder.path().join("run.txt");
    let name = record.to_str().unwrap();
    let with = |option| run(&["with", "--library", &library, option, name, "--", "env"]);
    std::fs::write(&record, "old").unwrap();
    let ran = with("--record");
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let line = format!("KVM_OPS_RECORD={name}");
    assert!(ran.out.lines().any(|l| l == line), "{}", ran.out);
    assert!(!record.exists(), "the library makes it");
    assert_eq!(with("--replay").code, Some(5), "there is none");
    std::fs::write(&record, "kvm-ops record 1\nmachine amd 0 0 0 0\n").unwrap();
    let ran = with("--replay");
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let line = format!("KVM_OPS_REPLAY={name}");
    assert!(ran.out.lines().any(|l| l == line), "{}", ran.out);
    std::fs::write(&record, "kvm-ops record 1\nmachine amd\n").unwrap();
    let ran = with("--replay");
    assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""));
    assert!(
        ran.err.contains("line 2: no machine is named"),
        "{}",
        ran.err
    );
}
