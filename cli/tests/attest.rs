//! Tests that evidence of SNP guests is accepted only if every check was made or waived by name.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::run;
use kvm_ops_attest::snp::{REPORT_LEN, SIGNED_LEN};
use serde_json::Value;

struct Demo {
    directory: tempfile::TempDir,
    /// The options that `new` prints for a verifier, after the directory.
    question: Vec<String>,
}

impl Demo {
    fn new() -> Self {
        Self::of("genoa")
    }

    fn of(product: &str) -> Self {
        Self::signed_by("vcek", product)
    }

    fn signed_by(key: &str, product: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = text(directory.path());
        let made = run(&[
            "attest",
            "new",
            place,
            "--report-data",
            "c0ffee",
            "--product",
            product,
            "--key",
            key,
        ]);
        assert_eq!((made.code, made.err.as_str()), (Some(0), ""));
        let (_, question) = made.out.split_once(place).unwrap();
        let (_, question) = question.split_once(place).expect("a command");
        let words = question.split_whitespace().filter(|word| *word != "\\");
        let question = words.map(str::to_owned).collect();
        Self {
            directory,
            question,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Changes a byte of a file.
    fn flip(&self, name: &str, at: usize) {
        let mut bytes = fs::read(self.file(name)).unwrap();
        bytes[at] ^= 1;
        fs::write(self.file(name), bytes).unwrap();
    }

    /// Runs `verify` with these arguments. Returns the exit code, its verdict and its error.
    fn verify(&self, args: &[&str]) -> (Option<i32>, Value, String) {
        let all = [
            &["attest", "verify", text(self.directory.path()), "--json"],
            args,
        ];
        let ran = run(&all.concat());
        let verdict = serde_json::from_str(&ran.out)
            .unwrap_or_else(|error| panic!("{error}: {} {}", ran.out, ran.err));
        (ran.code, verdict, ran.err)
    }

    /// The same with the options that `new` printed, one of them with another value.
    fn ask(&self, changed: Option<(&str, &str)>) -> (Option<i32>, Value, String) {
        let mut args: Vec<&str> = self.question.iter().map(String::as_str).collect();
        if let Some((option, value)) = changed {
            let at = args.iter().position(|arg| *arg == option).unwrap();
            args[at + 1] = value;
        }
        self.verify(&args)
    }

    /// The first check that fails.
    fn fails(&self, changed: Option<(&str, &str)>) -> String {
        let (code, verdict, error) = self.ask(changed);
        assert_eq!((code, &verdict["accepted"]), (Some(1), &Value::from(false)));
        let failed = verdict["failed"].as_str().expect("a check").to_owned();
        let expected = format!("the check `{failed}` failed");
        assert!(error.contains(&expected), "{error}");
        assert!(error.contains("caused by: "), "{error}");
        assert_eq!(outcome(&verdict, &failed), "failed");
        failed
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn outcome<'a>(verdict: &'a Value, check: &str) -> &'a str {
    let rows = verdict["rows"].as_array().unwrap();
    let row = rows.iter().find(|row| row["check"] == check);
    row.unwrap_or_else(|| panic!("no row {check}"))["outcome"]
        .as_str()
        .unwrap()
}

#[test]
fn the_question_that_new_prints_accepts_the_evidence_of_each_product() {
    for (product, version, key) in [
        ("milan", "2", "vcek"),
        ("genoa", "3", "vcek"),
        ("turin", "5", "vcek"),
        ("turin", "5", "vlek"),
    ] {
        let demo = Demo::signed_by(key, product);
        let (code, verdict, error) = demo.ask(None);
        assert_eq!((code, error.as_str()), (Some(0), ""), "{product}");
        let signer = verdict["says"]["signing_key"].as_str().unwrap();
        assert!(signer.to_lowercase().starts_with(key), "{signer}");
        assert_eq!(verdict["accepted"], true);
        let optional = ["id-key", "author-key", "guest-svn"];
        for row in verdict["rows"].as_array().unwrap() {
            let not_asked = optional.contains(&row["check"].as_str().unwrap());
            let expected = if not_asked { "not asked" } else { "passed" };
            assert_eq!(row["outcome"], expected, "{row}");
        }
        assert_eq!(verdict["says"]["version"], version);
        let data = verdict["says"]["report_data"].as_str().unwrap();
        assert_eq!(data, format!("c0ffee{}", "0".repeat(122)));
    }
}

#[test]
fn what_is_not_asked_is_not_accepted_until_it_is_waived_by_name() {
    let demo = Demo::new();
    let (code, verdict, error) = demo.verify(&["--root", "software"]);
    assert_eq!((code, &verdict["authentic"]), (Some(1), &Value::from(true)));
    let needed = "policy vmpl measurement host-data report-data tcb chip-id";
    let open: Vec<_> = verdict["not_asked"].as_array().unwrap().iter().collect();
    let open: Vec<_> = open
        .into_iter()
        .map(|name| name.as_str().unwrap())
        .collect();
    assert_eq!(open.join(" "), needed);
    assert!(error.contains("authentic, but not accepted"), "{error}");
    assert!(
        error.contains(&format!("--waive {}", open.join(","))),
        "{error}"
    );
    let all = open.join(",");
    let (code, verdict, _) = demo.verify(&["--root", "software", "--waive", &all]);
    assert_eq!((code, outcome(&verdict, "vmpl")), (Some(0), "waived"));
    // Verification fails if any one of them is not waived.
    for left_out in &open {
        let others: Vec<_> = open
            .iter()
            .filter(|name| *name != left_out)
            .copied()
            .collect();
        let (code, verdict, _) = demo.verify(&["--root", "software", "--waive", &others.join(",")]);
        assert_eq!(code, Some(1), "{left_out}");
        assert_eq!(verdict["not_asked"], Value::from(vec![*left_out]));
    }
    for name in ["signature", "root", "nonsense"] {
        let ran = run(&[
            "attest",
            "verify",
            "x",
            "--cert-chain",
            "x",
            "--waive",
            name,
        ]);
        assert_eq!(ran.code, Some(2), "{name}: {}", ran.err);
        assert!(ran.err.contains("cannot be waived"), "{}", ran.err);
    }
}

/// M6: the software platform's root has a public key. It is not trusted by default, and always
/// named.
#[test]
fn the_software_platforms_root_is_not_trusted_unless_named_and_called_what_it_is() {
    let demo = Demo::new();
    let (_, verdict, error) = demo.verify(&[]);
    assert_eq!(verdict["failed"], "root");
    assert!(
        error.contains("software platform, whose private key is public"),
        "{error}"
    );
    assert!(
        verdict["says"].is_null(),
        "what is not believed is not shown"
    );
    let pem = fs::read_to_string(demo.file("cert_chain.pem")).unwrap();
    let start = pem.rfind("-----BEGIN").unwrap();
    let root = demo.file("root.pem");
    fs::write(&root, &pem[start..]).unwrap();
    for name in ["software", text(&root)] {
        let (code, verdict, _) = demo.ask(Some(("--root", name)));
        assert_eq!(code, Some(0), "{name}");
        let rows = verdict["rows"].as_array().unwrap();
        let note = rows.iter().find(|row| row["check"] == "root").unwrap()["note"].as_str();
        assert!(
            note.unwrap().contains("its private key is public"),
            "{note:?}"
        );
    }
}

#[test]
fn each_expected_value_that_differs_fails_its_row() {
    let demo = Demo::new();
    for (option, value, check) in [
        ("--measurement", "ab".repeat(48).as_str(), "measurement"),
        ("--report-data", "c0ffef", "report-data"),
        ("--host-data", "01", "host-data"),
        ("--vmpl", "1", "vmpl"),
        ("--policy", "0x30001", "policy"),
        ("--min-tcb", "microcode=214", "tcb"),
        ("--chip-id", "01", "chip-id"),
    ] {
        assert_eq!(demo.fails(Some((option, value))), check);
    }
    let with = |more: &[&str]| {
        let args: Vec<&str> = demo.question.iter().map(String::as_str).collect();
        let (code, verdict, _) = demo.verify(&[&args, more].concat());
        (code, verdict["failed"].as_str().map(str::to_owned))
    };
    let digest = "ab".repeat(48);
    assert_eq!(
        with(&["--id-key", &digest]),
        (Some(1), Some("id-key".into()))
    );
    assert_eq!(
        with(&["--author-key", &digest]).1.as_deref(),
        Some("author-key")
    );
    assert_eq!(
        with(&["--min-guest-svn", "1"]).1.as_deref(),
        Some("guest-svn")
    );
    assert_eq!(
        with(&["--time", "2019-12-31"]).1.as_deref(),
        Some("validity")
    );
    assert_eq!(
        with(&["--time", "2051-01-01T00:00:00Z"]).1.as_deref(),
        Some("validity")
    );
}

/// M6: a verifier's expected values never come from the directory with the evidence.
#[test]
fn no_expectation_is_read_from_the_evidence() {
    let demo = Demo::new();
    let there: Vec<_> = fs::read_dir(demo.directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(there.len(), 3, "{there:?}");
    fs::write(demo.file("measurement.hex"), "00".repeat(48)).unwrap();
    let (code, verdict, _) = demo.ask(None);
    assert_eq!(
        (code, outcome(&verdict, "measurement")),
        (Some(0), "passed")
    );
}

#[test]
fn a_byte_of_the_report_that_differs_has_its_check() {
    for (at, check) in [
        (0x90, "signature"),
        (SIGNED_LEN - 1, "reserved"),
        (SIGNED_LEN, "signature"),
        (SIGNED_LEN + 48, "reserved"),
        (REPORT_LEN - 1, "reserved"),
        (0x34, "algorithm"),
        (0x180, "signature"),
    ] {
        let demo = Demo::new();
        demo.flip("report.bin", at);
        assert_eq!(demo.fails(None), check, "{at:#x}");
    }
}

#[test]
fn files_that_are_no_evidence_have_a_row_and_cost_bounded_time() {
    let demo = Demo::new();
    for length in [0, 1, REPORT_LEN - 1, REPORT_LEN + 1, 70_000] {
        fs::write(demo.file("report.bin"), vec![0; length]).unwrap();
        assert_eq!(demo.fails(None), "form", "{length}");
    }
    let demo = Demo::new();
    let pem = fs::read_to_string(demo.file("cert_chain.pem")).unwrap();
    let one = &pem[..pem.find("-----END CERTIFICATE-----\n").unwrap() + 26];
    for bad in [
        String::new(),
        "nonsense".to_owned(),
        pem.replace("-----END", "-----ENT"),
        one.to_owned(),
        pem[one.len()..].to_owned(),
        one.repeat(9),
        one.repeat(600),
        pem.repeat(3),
        "\u{30}\u{7f}".repeat(30_000),
    ] {
        fs::write(demo.file("cert_chain.pem"), &bad).unwrap();
        assert_eq!(
            demo.fails(None),
            "certificates",
            "{}",
            &bad[..bad.len().min(40)]
        );
    }
    fs::write(demo.file("cert_chain.pem"), one.repeat(10_000)).unwrap();
    let ran = run(&["attest", "verify", text(demo.directory.path())]);
    assert_eq!(ran.code, Some(5));
    assert!(
        ran.err.contains("more than the 0x200000 that it may have"),
        "{}",
        ran.err
    );
    fs::write(demo.file("cert_chain.pem"), &pem).unwrap();
    fs::write(demo.file("crl.der"), b"nonsense").unwrap();
    assert_eq!(demo.fails(None), "revocation");
    fs::write(demo.file("crl.der"), vec![0; 3 << 20]).unwrap();
    let ran = run(&["attest", "verify", text(demo.directory.path())]);
    assert_eq!(ran.code, Some(5));
    assert!(
        ran.err.contains("more than the 0x200000 that it may have"),
        "{}",
        ran.err
    );
}

#[test]
fn the_table_shows_every_row_and_field_of_the_json() {
    let demo = Demo::new();
    let question: Vec<&str> = demo.question.iter().map(String::as_str).collect();
    let args = [
        &["attest", "verify", text(demo.directory.path())],
        &question[..],
    ];
    let ran = run(&args.concat());
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let (_, verdict, _) = demo.ask(None);
    let line = |start: &str| ran.out.lines().find(|line| line.starts_with(start));
    for row in verdict["rows"].as_array().unwrap() {
        let (name, outcome) = (row["check"].as_str(), row["outcome"].as_str());
        let line = line(&format!("{} ", name.unwrap())).expect("a line");
        assert!(line.contains(outcome.unwrap()), "{line}");
    }
    let (_, fields) = ran.out.split_once("\nFIELD").expect("the fields");
    for (name, value) in verdict["says"].as_object().unwrap() {
        let name = name.replace('_', " ");
        let line = fields
            .lines()
            .find(|line| line.starts_with(&name))
            .expect("a line");
        assert!(
            line.contains(value.as_str().unwrap()),
            "{line} lacks {value}"
        );
    }
}

/// The sample in the crate `sev`: a Milan machine, under AMD's root.
#[test]
fn a_report_of_amd_hardware_is_accepted() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../attest/tests/data");
    let file = |name: &str| data.join(name).to_str().unwrap().to_owned();
    let (report, vcek) = (file("report_milan.bin"), file("vcek_milan.der"));
    let chain = file("cert_chain_milan.pem");
    let verify = |more: &[&str]| {
        let files = [
            "attest",
            "verify",
            &report,
            "--cert-chain",
            &vcek,
            "--cert-chain",
            &chain,
            "--time",
            "2026-01-01",
            "--policy",
            "0x30000",
            "--vmpl",
            "0",
            "--min-tcb",
            "boot-loader=3,snp=8,microcode=115",
        ];
        run(&[&files, more].concat())
    };
    let waived = "revocation,measurement,host-data,report-data,chip-id";
    let ran = verify(&["--waive", waived]);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
    assert!(ran.out.contains("AMD's ARK-Milan"), "{}", ran.out);
    assert_eq!(
        verify(&["--waive", waived, "--root", "software"]).code,
        Some(1)
    );
    assert_eq!(verify(&[]).code, Some(1));
}

#[test]
fn two_guests_of_one_kind_have_one_measurement_and_different_identities() {
    let (_, one, _) = Demo::new().ask(None);
    let (_, other, _) = Demo::new().ask(Some(("--chip-id", "00")));
    assert_eq!(one["says"]["measurement"], other["says"]["measurement"]);
    for field in ["report_id", "chip_id"] {
        assert_ne!(one["says"][field], other["says"][field], "{field}");
    }
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
            5,
            "cannot read /nowhere/report.bin",
        ),
        (
            &["/dev/zero", "--cert-chain", report],
            5,
            "is not a regular file",
        ),
        (
            &[report, "--cert-chain", "/dev/stdin"],
            5,
            "is not a regular file",
        ),
        (&[directory, "--root", report], 5, "is no root to trust"),
        (&[directory, "--crl", "/nowhere"], 5, "cannot read /nowhere"),
        (
            &[directory, "--measurement", "00"],
            2,
            "2 digits are not the 96 of 48 bytes",
        ),
        (&[directory, "--report-data", "xy"], 2, "invalid character"),
        (&[directory, "--vmpl", "4"], 2, "4 is not in 0..4"),
        (
            &[directory, "--min-tcb", "moon=1"],
            2,
            "a TCB has no part `moon`",
        ),
        (&[directory, "--time", "tomorrow"], 2, "--time"),
    ] {
        let ran = run(&[&["attest", "verify"], args].concat());
        assert_eq!(ran.code, Some(code), "{args:?}: {}", ran.err);
        assert!(ran.err.contains(words), "{args:?}: {}", ran.err);
    }
    let again = run(&["attest", "new", directory]);
    assert_eq!(again.code, Some(6));
    assert!(
        again.err.contains("report.bin") && again.err.contains("hint: "),
        "{}",
        again.err
    );
}
