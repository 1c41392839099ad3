//! Tests the help texts and the man pages.

mod common;

use std::process::Stdio;

use common::{program, run};

const COMMANDS: &[&str] = &[
    "doctor",
    "run",
    "fleet",
    "measure",
    "attest",
    "migrate",
    "conform",
    "with",
    "completions",
    "man",
];

/// Commands of commands.
const NESTED: &[[&str; 2]] = &[
    ["measure", "tdx"],
    ["measure", "sev"],
    ["measure", "seves"],
    ["measure", "snp"],
    ["attest", "flip"],
    ["attest", "inspect"],
    ["attest", "new"],
    ["attest", "samples"],
    ["attest", "verify"],
    ["conform", "tdx"],
    ["conform", "sev"],
    ["migrate", "move"],
    ["migrate", "hosts"],
    ["migrate", "send"],
    ["migrate", "receive"],
];

#[test]
fn every_command_has_a_help_with_examples() {
    for command in COMMANDS {
        for flag in ["-h", "--help"] {
            let ran = run(&[command, flag]);
            assert_eq!(ran.code, Some(0), "{command}");
            assert!(ran.out.contains("Usage: kvm-ops"), "{command}: {}", ran.out);
            assert!(ran.out.contains("Examples:"), "{command}: {}", ran.out);
        }
    }
}

#[test]
fn every_command_of_a_command_has_a_help_and_a_manual_page() {
    let directory = tempfile::tempdir().unwrap();
    let into = directory.path().to_str().unwrap();
    assert_eq!(run(&["man", "--into", into]).code, Some(0));
    for [command, nested] in NESTED {
        let ran = run(&[command, nested, "--help"]);
        assert_eq!(ran.code, Some(0), "{command} {nested}");
        let usage = format!("Usage: kvm-ops {command} {nested}");
        assert!(ran.out.contains(&usage), "{}", ran.out);
        let page = directory
            .path()
            .join(format!("kvm-ops-{command}-{nested}.1"));
        assert!(std::fs::read_to_string(page).unwrap().contains(".SH NAME"));
    }
    let pages = std::fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(
        pages,
        1 + COMMANDS.len() + NESTED.len(),
        "a page for each, and no other"
    );
}

#[test]
fn the_main_help_names_every_command_and_exit_code() {
    let ran = run(&["--help"]);
    assert_eq!(ran.code, Some(0));
    for word in COMMANDS.iter().chain(&["Exit codes:", "130"]) {
        assert!(ran.out.contains(word), "{word}: {}", ran.out);
    }
}

#[test]
fn without_a_command_the_help_is_shown_as_an_error() {
    let ran = run(&[]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("Usage: kvm-ops"), "{}", ran.err);
}

#[test]
fn the_version_is_that_of_the_package() {
    let ran = run(&["--version"]);
    assert_eq!(ran.out, format!("kvm-ops {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_typo_in_a_command_is_answered_with_the_right_name() {
    let ran = run(&["docter"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("doctor"), "{}", ran.err);
}

#[test]
fn completions_of_every_shell_know_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = run(&["completions", shell]);
        assert_eq!(ran.code, Some(0), "{shell}");
        for command in COMMANDS {
            assert!(ran.out.contains(command), "{shell}: {command}");
        }
    }
    assert_eq!(run(&["completions", "tcsh"]).code, Some(2));
}

#[test]
fn the_manual_page_knows_every_command_and_there_is_one_for_each() {
    let ran = run(&["man"]);
    assert_eq!(ran.code, Some(0));
    assert!(ran.out.contains(".TH kvm-ops 1"), "{}", ran.out);
    let directory = tempfile::tempdir().unwrap();
    let into = directory.path().to_str().unwrap();
    assert_eq!(run(&["man", "--into", into]).code, Some(0));
    for command in COMMANDS {
        assert!(
            ran.out.contains(&format!("kvm\\-ops\\-{command}(1)")),
            "{command}"
        );
        let page = directory.path().join(format!("kvm-ops-{command}.1"));
        assert!(std::fs::read_to_string(page).unwrap().contains(".SH NAME"));
    }
    let ran = run(&["man", "--into", "/nonexistent/directory"]);
    assert_eq!(ran.code, Some(6));
    assert!(
        ran.err
            .contains("error: cannot write /nonexistent/directory/kvm-ops.1"),
        "{}",
        ran.err
    );
}

/// The reader is gone, usually before the first output.
#[test]
fn a_closed_pipe_is_no_error() {
    for args in [
        &["man"][..],
        &["completions", "bash"],
        &["doctor"],
        &["fleet", "--show-default"],
    ] {
        let mut child = program()
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let ran = common::check(args, child.wait_with_output().unwrap());
        assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{args:?}");
    }
}
