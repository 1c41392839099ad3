//! Reports of SNP guests: a true one is believed, and of a false one the check is named.
#![cfg(feature = "sev")]

mod common;

use std::fs;
use std::path::Path;

use common::run;
use serde_json::Value;
use soft_amd_sp::RootOfTrust;
use soft_amd_sp::attestation::{CertChain, Report};

struct Demo {
    directory: tempfile::TempDir,
}

impl Demo {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let made = run(&[
            "attest",
            "new",
            text(directory.path()),
            "--report-data",
            "c0ffee",
        ]);
        assert_eq!((made.code, made.err.as_str()), (Some(0), ""));
        Self { directory }
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// Changes a byte of a file.
    fn flip(&self, name: &str, at: usize) {
        let mut bytes = fs::read(self.file(name)).unwrap();
        bytes[at] ^= 1;
        fs::write(self.file(name), bytes).unwrap();
    }

    /// What `verify` finds: the exit code, its report and its error.
    fn verify(&self, more: &[&str]) -> (Option<i32>, Value, String) {
        let args = [
            &["attest", "verify", text(self.directory.path()), "--json"],
            more,
        ]
        .concat();
        let ran = run(&args);
        let verdict = serde_json::from_str(&ran.out)
            .unwrap_or_else(|error| panic!("{error}: {} {}", ran.out, ran.err));
        (ran.code, verdict, ran.err)
    }

    /// The check that fails; those before it passed, those behind it were not made.
    fn fails(&self, more: &[&str]) -> String {
        let (code, verdict, error) = self.verify(more);
        assert_eq!((code, &verdict["believed"]), (Some(1), &Value::from(false)));
        let failed = verdict["failed"].as_str().expect("a check").to_owned();
        assert!(
            error.contains(&format!("the check `{failed}` failed")),
            "{error}"
        );
        assert!(error.contains("caused by: "), "{error}");
        assert!(
            verdict["report"].is_null(),
            "what is not believed is not shown"
        );
        assert_eq!(verdict["checks"][&failed], "failed");
        failed
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[test]
fn a_fresh_report_is_believed_and_says_what_was_launched() {
    let demo = Demo::new();
    let (code, verdict, error) = demo.verify(&["--report-data", "c0ffee"]);
    assert_eq!((code, error.as_str()), (Some(0), ""));
    assert_eq!(verdict["believed"], true);
    let checks = verdict["checks"].as_object().unwrap();
    assert_eq!(checks.len(), 10);
    assert!(checks.values().all(|outcome| outcome == "ok"), "{verdict}");
    let expected = fs::read_to_string(demo.file("measurement.hex")).unwrap();
    assert_eq!(verdict["report"]["measurement"], expected.trim());
    let data = verdict["report"]["report_data"].as_str().unwrap();
    assert_eq!(data, format!("c0ffee{}", "0".repeat(122)));
    assert_eq!(verdict["report"]["policy"], "0x30000");
}

#[test]
fn the_table_shows_every_field_of_the_json() {
    let demo = Demo::new();
    let ran = run(&["attest", "verify", text(demo.directory.path())]);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let (_, verdict, _) = demo.verify(&[]);
    for (name, value) in verdict["report"].as_object().unwrap() {
        let line = ran
            .out
            .lines()
            .skip_while(|line| !line.starts_with("FIELD"))
            .find(|line| line.starts_with(&name.replace('_', " ")))
            .unwrap_or_else(|| panic!("no {name}: {}", ran.out));
        assert!(
            line.contains(value.as_str().unwrap()),
            "{line} lacks {value}"
        );
    }
}

#[test]
fn two_guests_of_one_kind_have_one_measurement_and_different_identities() {
    let (_, one, _) = Demo::new().verify(&[]);
    let (_, other, _) = Demo::new().verify(&[]);
    assert_eq!(one["report"]["measurement"], other["report"]["measurement"]);
    for field in ["report_id", "chip_id"] {
        assert_ne!(one["report"][field], other["report"][field], "{field}");
    }
}

/// A byte anywhere in what is signed, in the signature, or in a certificate.
#[test]
fn every_kind_of_damage_has_its_check() {
    let cert = CertChain::LEN / 3;
    for (file, at, check) in [
        ("report.bin", 0x90, "signature"),
        ("report.bin", 0x50, "signature"),
        ("report.bin", Report::SIGNED - 1, "signature"),
        ("report.bin", Report::SIGNED, "signature"),
        ("report.bin", 0x34, "algorithm"),
        ("cert_chain.bin", 0x08, "form"),
        ("cert_chain.bin", 0x04, "vcek"),
        ("cert_chain.bin", cert + 0x04, "ask"),
        ("cert_chain.bin", 2 * cert + 0x04, "ark"),
        ("cert_chain.bin", 0x420, "vcek"),
    ] {
        let demo = Demo::new();
        demo.flip(file, at);
        assert_eq!(demo.fails(&[]), check, "{file} {at:#x}");
    }
}

#[test]
fn a_report_of_another_length_is_no_report() {
    let demo = Demo::new();
    for length in [0, 1, Report::LEN - 1, Report::LEN + 1, 70_000] {
        fs::write(demo.file("report.bin"), vec![0; length]).unwrap();
        assert_eq!(demo.fails(&[]), "form", "{length}");
    }
    fs::write(demo.file("cert_chain.bin"), []).unwrap();
    assert_eq!(demo.fails(&[]), "form");
}

#[test]
fn another_measurement_or_report_data_than_expected_is_told() {
    let demo = Demo::new();
    assert_eq!(
        demo.fails(&["--measurement", &"ab".repeat(48)]),
        "measurement"
    );
    assert_eq!(demo.fails(&["--report-data", "c0ffef"]), "report-data");
    fs::write(demo.file("measurement.hex"), "00".repeat(48)).unwrap();
    assert_eq!(demo.fails(&[]), "measurement");
}

#[test]
fn a_chain_that_ends_at_another_root_is_not_believed() {
    let demo = Demo::new();
    let root = demo.file("root.bin");
    fs::write(&root, RootOfTrust::default().ark().as_bytes()).unwrap();
    assert_eq!(demo.verify(&["--root", text(&root)]).0, Some(0));
    fs::write(&root, RootOfTrust::from_seed(1).ark().as_bytes()).unwrap();
    assert_eq!(demo.fails(&["--root", text(&root)]), "root");
}

#[test]
fn a_file_that_is_not_what_it_should_be_is_named() {
    let demo = Demo::new();
    let directory = text(demo.directory.path());
    let report = demo.file("report.bin");
    let report = text(&report);
    for (args, code, words) in [
        (&[report][..], 2, "--cert-chain"),
        (
            &["/nowhere/report.bin", "--cert-chain", report],
            1,
            "cannot read /nowhere/report.bin",
        ),
        (
            &[directory, "--root", report],
            1,
            "is not the certificate of an ARK",
        ),
        (
            &[directory, "--measurement", "00"],
            2,
            "2 digits are not the 96 of 48 bytes",
        ),
        (&[directory, "--report-data", "xy"], 2, "invalid character"),
    ] {
        let ran = run(&[&["attest", "verify"], args].concat());
        assert_eq!(ran.code, Some(code), "{args:?}: {}", ran.err);
        assert!(ran.err.contains(words), "{args:?}: {}", ran.err);
    }
    let again = run(&["attest", "new", directory]);
    assert_eq!(again.code, Some(1));
    assert!(
        again.err.contains("report.bin") && again.err.contains("hint: "),
        "{}",
        again.err
    );
}
