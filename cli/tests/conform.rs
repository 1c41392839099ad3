//! `kvm-ops conform` on recorded vectors, and on altered ones.

use std::fs;
use std::process::{Command, Output};

fn conform(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
        .arg("conform")
        .args(args)
        .output()
        .expect("the program starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn vectors(of: &str) -> String {
    format!("{}/../tests/vectors/{of}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_sev_vectors_pass_and_the_last_line_counts_them() {
    let output = conform(&["sev", &vectors("sev")]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.trim_end().ends_with(" passed, 0 failed"), "{text}");
    assert!(!text.trim_end().ends_with("\n0 passed, 0 failed"), "{text}");
}

#[test]
fn the_tdx_vectors_of_a_category_pass_from_an_archive() {
    let output = conform(&["tdx", &(vectors("tdx") + "/sys.tar.zst")]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.trim_end().ends_with(" passed, 0 failed"), "{text}");
    assert!(text.contains("TDH.SYS.INIT,TDX_SUCCESS,"), "{text}");
}

#[test]
fn a_transcript_that_lies_is_named_with_its_line_and_both_values() {
    let folder = tempfile::tempdir().unwrap();
    let archive = fs::File::open(vectors("tdx") + "/sys.tar.zst").unwrap();
    let plain = ruzstd::decoding::StreamingDecoder::new(archive).unwrap();
    let mut honest = String::new();
    for entry in tar::Archive::new(plain).entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().ends_with("bringup_minimal.jsonl") {
            std::io::Read::read_to_string(&mut entry, &mut honest).unwrap();
        }
    }
    let recorded = "\"status\":\"TDX_SUCCESS\"";
    assert!(honest.contains(recorded) || honest.contains("\"out\""));
    let file = folder.path().join("bringup.jsonl");
    fs::write(&file, &honest).unwrap();
    let path = folder.path().to_str().unwrap();
    assert_eq!(conform(&["tdx", path]).status.code(), Some(0));

    let lie = honest.replacen("\"RAX\":\"0x0\"", "\"RAX\":\"0x1\"", 1);
    let lie = if lie == honest {
        honest.replacen("\"rax\":\"0x0\"", "\"rax\":\"0x1\"", 1)
    } else {
        lie
    };
    assert_ne!(lie, honest, "the transcript has a successful call");
    fs::write(&file, lie).unwrap();
    let output = conform(&["tdx", path]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("bringup.jsonl") && text.contains("line "),
        "{text}"
    );
    assert!(
        text.contains("expected ") && text.contains("got "),
        "{text}"
    );
    assert!(text.trim_end().ends_with("0 passed, 1 failed"), "{text}");
}

#[test]
fn paths_that_lead_nowhere_fail() {
    for platform in ["tdx", "sev"] {
        let output = conform(&[platform, "/nowhere"]);
        assert_eq!(output.status.code(), Some(5), "{platform}");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("/nowhere"), "{platform}: {told}");
    }
    let folder = tempfile::tempdir().unwrap();
    for platform in ["tdx", "sev"] {
        let output = conform(&[platform, folder.path().to_str().unwrap()]);
        assert_eq!(
            output.status.code(),
            Some(5),
            "{platform}: an empty folder proves nothing"
        );
    }
}
