//! The samples for verifiers' authors: `attest verify`, asked what the manifest says, finds in each
//! what the manifest says.

mod common;

use std::fs;

use common::run;
use serde_json::Value;

#[test]
fn the_program_finds_in_each_sample_what_the_manifest_says() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("evidence");
    let place = place.to_str().unwrap();
    let made = run(&["attest", "samples", place]);
    assert_eq!((made.code, made.err.as_str()), (Some(0), ""));
    let manifest = fs::read(format!("{place}/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let mut bad = 0;
    for sample in manifest["samples"].as_array().unwrap() {
        let technology = sample["technology"].as_str().unwrap();
        let mut args = vec!["attest".to_owned(), "verify".into()];
        args.push(format!("{place}/{}", sample["name"].as_str().unwrap()));
        args.extend(["--json", "--root", "software", "--time"].map(str::to_owned));
        args.push(manifest["time"].to_string());
        for (option, value) in manifest["expected"][technology].as_object().unwrap() {
            args.push(format!("--{option}"));
            args.push(value.as_str().map_or(value.to_string(), str::to_owned));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let ran = run(&args);
        let verdict: Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(verdict["failed"], sample["fails"], "{sample}");
        assert_eq!(verdict["accepted"], sample["good"], "{sample}");
        assert_eq!(
            ran.code,
            Some(if sample["good"] == true { 0 } else { 1 }),
            "{sample}"
        );
        bad += usize::from(sample["good"] == false);
    }
    assert!(bad >= 60, "{bad}");
    let again = run(&["attest", "samples", place]);
    assert_eq!(again.code, Some(6));
    assert!(again.err.contains("hint: "), "{}", again.err);
}
