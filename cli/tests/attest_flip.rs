//! `attest flip`: the table of flipped bits, and its exit code.

mod common;

use common::run;
use serde_json::Value;

fn data(name: &str) -> String {
    format!("{}/../attest/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn no_bit_of_a_report_of_hardware_is_believed_and_the_table_says_who_refuses_it() {
    let (report, vcek) = (data("report_milan.bin"), data("vcek_milan.der"));
    let chain = data("cert_chain_milan.pem");
    let args = [
        "attest",
        "flip",
        &report,
        "--cert-chain",
        &vcek,
        "--cert-chain",
        &chain,
        "--time",
        "2026-01-01",
        "--every",
        "997",
    ];
    let ran = run(&args);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
    let line = |field: &str| {
        let found = ran.out.lines().find(|line| line.contains(field));
        found.unwrap_or_else(|| panic!("{field}: {}", ran.out))
    };
    assert!(
        line("MEASUREMENT").ends_with("  signature 1"),
        "{}",
        ran.out
    );
    assert!(
        line("SIGNATURE: reserved").ends_with("  reserved 3"),
        "{}",
        ran.out
    );
    assert!(
        line("bits flipped").ends_with(", 0 believed"),
        "{}",
        ran.out
    );
    let json = run(&[&args[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["believed"], 0);
    let lines = json["lines"].as_array().unwrap();
    let flipped: u64 = lines
        .iter()
        .map(|line| line["flipped"].as_u64().unwrap())
        .sum();
    assert_eq!(json["flipped"], flipped);
}

#[test]
fn evidence_of_the_software_platform_is_flipped_too_and_what_is_refused_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().to_str().unwrap();
    assert_eq!(
        run(&["attest", "new", place, "--tech", "tdx"]).code,
        Some(0)
    );
    let args = ["attest", "flip", place, "--every", "9973"];
    let ran = run(&[&args[..], &["--root", "software"]].concat());
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
    assert!(ran.out.contains("MRTD"), "{}", ran.out);
    // Under Intel's root it is refused before a bit is flipped.
    let ran = run(&args);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""));
    assert!(ran.err.contains("the check `root` failed"), "{}", ran.err);
}
