//! `attest inspect` tells kinds of evidence apart, and shows what each says.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::run;
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../attest/tests/data")
        .join(name)
}

fn inspect(path: &Path) -> (Option<i32>, Value, String) {
    let text = path.to_str().expect("a path in UTF-8");
    let shown = run(&["attest", "inspect", text]);
    let ran = run(&["attest", "inspect", text, "--json"]);
    assert_eq!(shown.code, ran.code);
    let json = serde_json::from_str(&ran.out).unwrap_or_default();
    if ran.code == Some(0) {
        assert!(
            shown.out.contains("Nothing of it was verified."),
            "{}",
            shown.out
        );
        let json: &Value = &json;
        assert_eq!(json["verified"], false);
    }
    (ran.code, json, ran.err)
}

#[test]
fn evidence_of_hardware_is_told_by_its_bytes_and_shown() {
    let (code, report, _) = inspect(&data("report_milan.bin"));
    assert_eq!(
        (code, &report["kind"]),
        (Some(0), &Value::from("snp-report"))
    );
    assert_eq!(report["says"]["version"], "2");
    assert_eq!(report["says"]["signing_key"], "VCEK, the chip's");

    let (code, quote, _) = inspect(&data("tdx_quote.bin"));
    assert_eq!((code, &quote["kind"]), (Some(0), &Value::from("tdx-quote")));
    assert_eq!(quote["says"]["version"], "4");
    let chain = quote["certificates"].as_array().unwrap();
    let subjects: Vec<_> = chain
        .iter()
        .map(|one| one["subject"].as_str().unwrap())
        .collect();
    assert_eq!(
        subjects,
        [
            "Intel SGX PCK Certificate",
            "Intel SGX PCK Platform CA",
            "Intel SGX Root CA"
        ]
    );

    let (code, vcek, _) = inspect(&data("vcek_milan.der"));
    assert_eq!(
        (code, &vcek["kind"]),
        (Some(0), &Value::from("certificates"))
    );
    let vcek = &vcek["certificates"][0];
    assert_eq!(vcek["subject"], "SEV-VCEK");
    assert_eq!(
        (&vcek["key"], &vcek["product"]),
        (&"ECDSA on P-384".into(), &"Milan".into())
    );
    assert_eq!(vcek["chip_id"], report["says"]["chip_id"]);

    let (code, chain, _) = inspect(&data("cert_chain_turin.pem"));
    assert_eq!(code, Some(0));
    let chain = chain["certificates"].as_array().unwrap();
    assert_eq!(chain.len(), 2);
    assert!(
        chain.iter().all(|one| one["key"] == "RSA of 4096 bits"),
        "{chain:?}"
    );
}

#[test]
fn the_event_log_of_a_td_on_hardware_is_shown_with_its_rtmrs() {
    let (code, log, _) = inspect(&data("ccel_cos_113.bin"));
    assert_eq!((code, &log["kind"]), (Some(0), &Value::from("event-log")));
    assert_eq!(
        log["rtmrs"][0],
        "a4de2df23e9611299123ba4359c42a5e578b0f8488bf1bba8ef5606d9ea5d81c97c064b482a5eac537d166bd0f0f752d"
    );
    let shown = run(&[
        "attest",
        "inspect",
        data("ccel_cos_113.bin").to_str().unwrap(),
    ])
    .out;
    for words in ["EV_SEPARATOR", "\"SecureBoot\"", "RTMR2"] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
}

#[test]
fn what_new_makes_is_shown_and_fits_together() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name);
    for args in [
        &["attest", "new", place("snp").to_str().unwrap()][..],
        &[
            "attest",
            "new",
            place("td").to_str().unwrap(),
            "--tech",
            "tdx",
        ],
    ] {
        assert_eq!(run(args).code, Some(0), "{args:?}");
    }
    let (_, quote, _) = inspect(&place("td/quote.bin"));
    let (_, log, _) = inspect(&place("td/event_log.bin"));
    for n in 0..4 {
        assert_eq!(
            quote["says"][format!("rtmr{n}")],
            log["rtmrs"][n],
            "RTMR{n}"
        );
    }
    assert_ne!(log["rtmrs"][2], log["rtmrs"][3]);
    let (_, list, _) = inspect(&place("snp/crl.der"));
    assert_eq!(list["kind"], "revocation-list");
    assert_eq!(list["revocation_list"]["issuer"], "ARK-Genoa");
    let (_, chain, _) = inspect(&place("snp/cert_chain.pem"));
    assert_eq!(chain["certificates"].as_array().unwrap().len(), 3);
}

#[test]
fn other_files_and_cut_ones_are_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let file = |bytes: &[u8]| {
        let path = directory.path().join("file");
        fs::write(&path, bytes).unwrap();
        let (code, _, error) = inspect(&path);
        assert_eq!(code, Some(5), "{error}");
        error
    };
    let quote = fs::read(data("tdx_quote.bin")).unwrap();
    let log = fs::read(data("ccel_cos_113.bin")).unwrap();
    let table = [
        (&b""[..], "it is empty"),
        (b"{\"a\": 1}", "it looks like JSON"),
        (b"CCEL\x38\0\0\0", "only tells where the event log lies"),
        (
            b"root:x:0:0:root:/root",
            "0x15 bytes that begin with 726f6f743a783a30",
        ),
        (&quote[..100], "begins as the quote of a TD, but is none"),
        (
            &log[..log.len() - 1],
            "begins as the event log of a TD, but is none",
        ),
        (
            b"-----BEGIN CERTIFICATE-----\nAAAA",
            "begins as certificates, but is none",
        ),
    ];
    for (bytes, words) in table {
        let error = file(bytes);
        assert!(error.contains(words), "{words}: {error}");
    }
    let (code, _, error) = inspect(directory.path());
    assert_eq!(code, Some(5), "{error}");
}

#[test]
fn a_log_that_does_not_replay_fails_its_row() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("td");
    let place = place.to_str().unwrap();
    assert_eq!(
        run(&["attest", "new", place, "--tech", "tdx"]).code,
        Some(0)
    );
    let verify = |more: &[&str]| {
        let args = ["attest", "verify", place, "--root", "software", "--json"];
        let ran = run(&[&args[..], more].concat());
        serde_json::from_str::<Value>(&ran.out).unwrap()
    };
    let outcome = |verdict: &Value| {
        let rows = verdict["rows"].as_array().unwrap();
        let row = rows.iter().find(|row| row["check"] == "event-log");
        row.unwrap()["outcome"].as_str().unwrap().to_owned()
    };
    assert_eq!(outcome(&verify(&[])), "passed");
    let other = data("ccel_cos_113.bin");
    let verdict = verify(&["--event-log", other.to_str().unwrap()]);
    assert_eq!(outcome(&verdict), "failed");
    assert_eq!(verdict["failed"], "event-log");
    fs::remove_file(format!("{place}/event_log.bin")).unwrap();
    assert_eq!(outcome(&verify(&[])), "not asked");
}
