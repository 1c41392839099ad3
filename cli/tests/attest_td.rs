//! Quotes of TDs: accepted only if every check was made or given up by name.

mod common;

use std::fs;
use std::path::Path;

use common::run;
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Makes evidence; what `new` says that a verifier should ask, behind the directory.
fn new(directory: &Path, version: &str) -> Vec<String> {
    let place = text(directory);
    let made = run(&[
        "attest",
        "new",
        place,
        "--tech",
        "tdx",
        "--report-data",
        "c0ffee",
        "--quote-version",
        version,
    ]);
    assert_eq!((made.code, made.err.as_str()), (Some(0), ""));
    let question = made.out.rsplit(place).next().unwrap();
    let words = question.split_whitespace().filter(|word| *word != "\\");
    words.map(str::to_owned).collect()
}

fn verify(directory: &Path, args: &[&str]) -> (Option<i32>, Value, String) {
    let ran = run(&[&["attest", "verify", text(directory), "--json"], args].concat());
    let verdict = serde_json::from_str(&ran.out)
        .unwrap_or_else(|error| panic!("{error}: {} {}", ran.out, ran.err));
    (ran.code, verdict, ran.err)
}

#[test]
fn the_question_that_new_prints_accepts_a_quote_of_either_version() {
    for version in ["4", "5"] {
        let directory = tempfile::tempdir().unwrap();
        let question = new(directory.path(), version);
        let question: Vec<&str> = question.iter().map(String::as_str).collect();
        let (code, verdict, error) = verify(directory.path(), &question);
        assert_eq!((code, error.as_str()), (Some(0), ""));
        for row in verdict["rows"].as_array().unwrap() {
            let expected = if row["check"] == "fmspc" {
                "not asked"
            } else {
                "passed"
            };
            assert_eq!(row["outcome"], expected, "{row}");
        }
        assert_eq!(verdict["says"]["version"], version);
        assert_eq!(verdict["technology"], "tdx");
        // A value that differs fails its row.
        for (at, option) in question
            .iter()
            .enumerate()
            .filter(|(_, w)| w.starts_with("--"))
        {
            let (check, wrong) = match *option {
                "--root" => continue,
                "--report-data" => ("report-data", "00".to_owned()),
                "--attributes" | "--xfam" => (&option[2..], "0x10".to_owned()),
                _ => (&option[2..], "ab".repeat(48)),
            };
            let mut args = question.clone();
            args[at + 1] = &wrong;
            let (code, verdict, _) = verify(directory.path(), &args);
            assert_eq!((code, &verdict["failed"]), (Some(1), &Value::from(check)));
        }
    }
}

#[test]
fn the_software_platforms_root_is_not_trusted_unless_named() {
    let directory = tempfile::tempdir().unwrap();
    new(directory.path(), "4");
    let (code, verdict, error) = verify(directory.path(), &[]);
    assert_eq!((code, &verdict["failed"]), (Some(1), &Value::from("root")));
    assert!(
        error.contains("software platform, whose private key is public"),
        "{error}"
    );
    assert!(verdict["says"].is_null());
    let (code, verdict, error) = verify(directory.path(), &["--root", "software"]);
    assert_eq!((code, &verdict["authentic"]), (Some(1), &Value::from(true)));
    assert!(
        error.contains("--waive attributes,xfam,mrtd,rtmr0,rtmr1,rtmr2,rtmr3,"),
        "{error}"
    );
}

/// The sample that ships with the crate `dcap-qvl`, under Intel's root.
#[test]
fn a_quote_of_intel_hardware_is_accepted() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../attest/tests/data");
    let file = |name: &str| data.join(name).to_str().unwrap().to_owned();
    let (quote, collateral) = (file("tdx_quote.bin"), file("tdx_quote_collateral.json"));
    let verify = |more: &[&str]| {
        let files = ["attest", "verify", &quote, "--collateral", &collateral];
        let values = [
            "--fmspc",
            "b0c06f000000",
            "--waive",
            "attributes,xfam,mrtd,rtmr0,rtmr1,rtmr2,rtmr3,mrconfigid,mrowner,mrownerconfig,mrseam,\
             report-data",
        ];
        run(&[&files[..], &values, more].concat())
    };
    let ran = verify(&["--time", "2025-06-20"]);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
    assert!(ran.out.contains("Intel's SGX Root CA"), "{}", ran.out);
    let late = verify(&["--time", "2025-09-20"]);
    assert_eq!(late.code, Some(1));
    assert!(
        late.err.contains("the check `authentic` failed"),
        "{}",
        late.err
    );
}

#[test]
fn options_of_the_other_technology_are_refused_and_not_ignored() {
    let directory = tempfile::tempdir().unwrap();
    new(directory.path(), "4");
    let report = directory.path().join("quote.bin");
    for (args, words) in [
        (
            &[text(directory.path()), "--vmpl", "0"][..],
            "--vmpl is about reports of SNP guests",
        ),
        (
            &[text(&report), "--mrtd", &"00".repeat(48)],
            "--mrtd is about quotes of TDs",
        ),
        (
            &[text(directory.path()), "--waive", "vmpl"],
            "cannot be waived",
        ),
        (
            &[text(directory.path()), "--fmspc", "00"],
            "not the 12 of 6 bytes",
        ),
    ] {
        let ran = run(&[&["attest", "verify"], args].concat());
        assert_eq!(ran.code, Some(2), "{args:?}: {}", ran.err);
        assert!(ran.err.contains(words), "{args:?}: {}", ran.err);
    }
}

#[test]
fn bad_quotes_and_collateral_have_their_rows() {
    let directory = tempfile::tempdir().unwrap();
    new(directory.path(), "5");
    let file = |name: &str| directory.path().join(name);
    let good = fs::read(file("quote.bin")).unwrap();
    let collateral = fs::read(file("collateral.json")).unwrap();
    let failed = || {
        let (code, verdict, _) = verify(directory.path(), &["--root", "software"]);
        assert_eq!(code, Some(1));
        verdict["failed"].as_str().map(str::to_owned)
    };
    for bad in [vec![], good[..600].to_vec(), vec![0xff; 70_000]] {
        fs::write(file("quote.bin"), bad).unwrap();
        assert_eq!(failed().as_deref(), Some("form"));
    }
    let mut flipped = good.clone();
    flipped[100] ^= 1;
    fs::write(file("quote.bin"), flipped).unwrap();
    assert_eq!(failed().as_deref(), Some("authentic"));
    fs::write(file("quote.bin"), &good).unwrap();
    fs::write(file("collateral.json"), &collateral[..collateral.len() - 9]).unwrap();
    assert_eq!(failed().as_deref(), Some("collateral"));
    fs::write(file("collateral.json"), "[".repeat(100_000)).unwrap();
    assert_eq!(failed().as_deref(), Some("collateral"));
}
