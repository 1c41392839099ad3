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
    assert_page_lists(&manifest);
    let mut bad = 0;
    for sample in manifest["samples"].as_array().unwrap() {
        let technology = sample["technology"].as_str().unwrap();
        let mut args = vec!["attest".to_owned(), "verify".into()];
        args.push(format!("{place}/{}", sample["name"].as_str().unwrap()));
        args.extend(["--json", "--root", "software", "--time"].map(str::to_owned));
        args.push(manifest["time"].to_string());
        let all = manifest["expected"][technology].as_object().unwrap();
        for (option, value) in all {
            // A sample may have other expectations than the rest.
            let value = sample["expected"].get(option).unwrap_or(value);
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
    assert!(bad >= 75, "{bad}");
    let again = run(&["attest", "samples", place]);
    assert_eq!(again.code, Some(6));
    assert!(again.err.contains("hint: "), "{}", again.err);
}

/// The page for authors of verifiers has a line for each sample. `BLESS=1` writes it anew.
fn assert_page_lists(manifest: &Value) {
    const BEGIN: &str = "|---|---|---|\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/evidence-samples.md");
    let page = fs::read_to_string(path).unwrap();
    let (head, _) = page.split_once(BEGIN).expect("a table");
    let line = |sample: &Value| {
        let text = |field: &str| sample[field].as_str().unwrap_or("none").to_owned();
        let fails = match text("fails").as_str() {
            "none" => "none".to_owned(),
            check => format!("`{check}`"),
        };
        format!("| `{}` | {fails} | {} |\n", text("name"), text("about"))
    };
    let samples = manifest["samples"].as_array().unwrap();
    let lines: String = samples.iter().map(line).collect();
    let expected = format!("{head}{BEGIN}{lines}");
    if std::env::var_os("BLESS").is_some() {
        fs::write(path, &expected).unwrap();
    }
    let page = fs::read_to_string(path).unwrap();
    assert_eq!(page, expected, "run with BLESS=1");
}
