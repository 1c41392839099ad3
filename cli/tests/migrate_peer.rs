//! What `kvm-ops migrate` demands of the migration TD or agent at the other host.

use std::process::{Command, Output};

fn migrate(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
        .arg("migrate")
        .args(args)
        .output()
        .unwrap()
}

#[track_caller]
fn says(out: &Output, code: i32, parts: &[&str]) {
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{said}");
    for part in parts {
        assert!(said.contains(part), "no {part:?} in: {said}");
    }
}

const DIGEST: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

#[test]
fn a_peer_that_meets_the_options_takes_the_guest() {
    let lowest = "00".repeat(16);
    for (tech, options) in [
        ("tdx", ["--peer-svn", &lowest]),
        ("tdx", ["--peer-attributes", "0x10000000"]),
        ("tdx", ["--peer-attributes-forbidden", "0x1"]),
        ("sev-snp", ["--peer-tcb", "snp=1"]),
    ] {
        let hosts = ["hosts", "--memory", "128K", "--tech", tech];
        let out = migrate(&[&hosts[..], &options].concat());
        says(&out, 0, &[]);
    }
}

#[test]
fn a_peer_that_breaks_a_rule_is_refused_with_the_rule_and_its_value() {
    let highest = "ff".repeat(16);
    for (tech, option, value, mismatch) in [
        ("tdx", "--peer-mrtd", DIGEST, "MRTD is another"),
        (
            "tdx",
            "--peer-attributes",
            "0x40000000",
            "lacks a required bit",
        ),
        ("tdx", "--peer-svn", &highest, "TEE_TCB_SVN is too old"),
        (
            "sev-snp",
            "--peer-measurement",
            DIGEST,
            "launch digest is another",
        ),
        (
            "sev-snp",
            "--peer-tcb",
            "boot-loader=0,tee=0,snp=200,microcode=0",
            "TCB is too old",
        ),
    ] {
        let hosts = ["hosts", "--memory", "128K", "--tech", tech];
        let out = migrate(&[&hosts[..], &[option, value]].concat());
        let rule = format!("{option} {value}");
        says(&out, 6, &[mismatch, &rule, "runs on at its source"]);
    }
}

#[test]
fn an_option_that_no_peer_of_the_guest_has_is_refused_by_name() {
    for (args, option, why) in [
        (
            &["hosts", "--tech", "sev", "--peer-tcb", "snp=1"][..],
            "--peer-tcb",
            "judges its peer itself",
        ),
        (
            &["hosts", "--tech", "tdx", "--peer-tcb", "snp=1"],
            "--peer-tcb",
            "--tech sev-snp",
        ),
        (
            &["hosts", "--tech", "sev-snp", "--peer-mrtd", DIGEST],
            "--peer-mrtd",
            "--tech tdx",
        ),
        (
            &["move", "--tech", "tdx", "--peer-attributes", "1"],
            "--peer-attributes",
            "has no peer",
        ),
    ] {
        says(&migrate(args), 2, &[option, why]);
    }
}

#[test]
fn a_value_that_is_none_is_refused_as_it_was_given() {
    for (option, value, why) in [
        ("--peer-svn", "0300", "4 digits are not the 32 of 16 bytes"),
        ("--peer-mrtd", "zz", "2 digits are not the 96 of 48 bytes"),
        ("--peer-attributes", "0xzz", "invalid digit"),
        ("--peer-tcb", "snip=3", "snip"),
    ] {
        let out = migrate(&["hosts", "--tech", "tdx", option, value]);
        says(&out, 2, &[option, value, why]);
    }
    let out = migrate(&["hosts", "--tech", "tdx", "--peer-rtmr", DIGEST]);
    says(&out, 2, &["--peer-mrtd"]);
}
