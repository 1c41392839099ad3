//! The recorded transcripts.

#![cfg(feature = "conform")]

use soft_tdx_module::conform::{Options, replay_bytes, replay_paths};
use std::path::{Path, PathBuf};

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/tdx")
}

fn all_replay(options: Options) {
    let summary = replay_paths([vectors()], options);
    assert!(summary.is_success(), "{summary}");
    let coverage = std::fs::read_to_string(vectors().join("coverage.csv")).expect("coverage.csv");
    let mut expected: Vec<&str> = coverage.lines().skip(1).collect();
    let table = summary.coverage.to_string();
    let mut got: Vec<&str> = table.lines().skip(1).collect();
    expected.sort_unstable();
    got.sort_unstable();
    assert_eq!(
        expected, got,
        "the (leaf, status, operand) table is the recorded one"
    );
}

#[test]
fn all_transcripts_replay_with_flat_memory() {
    all_replay(Options {
        encrypt_memory: false,
    });
}

#[test]
fn all_transcripts_replay_with_encrypted_memory() {
    all_replay(Options {
        encrypt_memory: true,
    });
}

/// The unpacked archive of a category.
fn archive(path: &Path) -> Vec<u8> {
    let all = std::fs::read(path).expect("archive");
    let mut text = Vec::new();
    std::io::Read::read_to_end(
        &mut ruzstd::decoding::StreamingDecoder::new(all.as_slice()).expect("zstd"),
        &mut text,
    )
    .expect("zstd");
    text
}

/// The platform lines of an archive.
fn platforms(archive: &[u8]) -> Vec<&[u8]> {
    const START: &[u8] = br#"{"kind":"platform""#;
    let starts = (0..archive.len()).filter(|at| archive[*at..].starts_with(START));
    starts
        .filter_map(|at| archive[at..].split(|b| *b == b'\n').next())
        .collect()
}

/// A small transcript: the platform of the recordings and one call.
fn transcript(line: &str) -> Vec<u8> {
    let text = archive(&vectors().join("build.tar.zst"));
    let platform = *platforms(&text).first().expect("a platform");
    [platform, b"\n", line.as_bytes(), b"\n"].concat()
}

fn part_replays(archive: &str, transcripts: usize) {
    let path = vectors().with_file_name("tdx2").join(archive);
    for encrypt_memory in [false, true] {
        let summary = replay_paths([&path], Options { encrypt_memory });
        assert!(summary.is_success(), "{summary}");
        assert_eq!(summary.passed(), transcripts, "transcripts of {archive}");
    }
}

#[test]
fn metadata_and_the_virtual_cpu_replay() {
    part_replays("metadata.tar.zst", 77);
}

#[test]
fn the_corrections_of_the_first_part_replay() {
    part_replays("minimal.tar.zst", 13);
}

#[test]
fn metadata_in_every_op_state_replays() {
    part_replays("op-states.tar.zst", 12);
}

#[test]
fn migration_and_service_tds_replay() {
    part_replays("migration.tar.zst", 159);
}

#[test]
fn l2_vms_replay() {
    part_replays("partition.tar.zst", 145);
}

#[test]
fn every_platform_of_format_2_is_built_and_brought_up() {
    let folder = vectors().with_file_name("tdx2");
    for category in ["metadata", "op-states", "migration", "partition"] {
        let text = archive(&folder.join(format!("{category}.tar.zst")));
        let platforms = platforms(&text);
        assert!(!platforms.is_empty(), "{category}");
        for platform in platforms {
            let ready = br#"{"kind":"check","what":"sys","state":"READY"}"#;
            let transcript = [platform, b"\n", ready].concat();
            if let Err(d) = replay_bytes(&transcript, Options::default()) {
                panic!("{category}: {d}");
            }
        }
    }
}

#[test]
fn format_2_without_its_keys_and_other_formats_are_refused() {
    let text = archive(&vectors().join("build.tar.zst"));
    let platform =
        String::from_utf8_lossy(platforms(&text).first().expect("a platform")).into_owned();
    for format in [0, 2, 3] {
        let other = platform.replacen(r#""format":1"#, &format!(r#""format":{format}"#), 1);
        assert_ne!(platform, other);
        assert!(
            replay_bytes(other.as_bytes(), Options::default()).is_err(),
            "{format}"
        );
    }
}

#[test]
fn a_wrong_register_is_reported_with_line_expected_and_got() {
    let good = r#"{"kind":"seamcall","lp":0,"name":"TDH.MNG.CREATE","in":{"rax":"0x9","rcx":"0x40400000","rdx":"0x21"},"out":{"rax":"0x0","rcx":"0x40400000","rdx":"0x21","r8":"0x0"},"status":"TDX_SUCCESS"}"#;
    let coverage = replay_bytes(&transcript(good), Options::default()).expect("replays");
    assert_eq!(coverage.0.values().sum::<u64>(), 1);
    let bad = good.replace(r#""out":{"rax":"0x0""#, r#""out":{"rax":"0x1""#);
    let d = replay_bytes(&transcript(&bad), Options::default()).expect_err("differs");
    assert_eq!(d.line, 2);
    assert!(
        d.expected.contains("rax: 0x1") && d.got.contains("rax: 0x0"),
        "{d}"
    );
}

#[test]
fn unknown_keys_kinds_and_garbage_are_refused() {
    for line in [
        r#"{"kind":"note","text":"x","more":1}"#,
        r#"{"kind":"nonsense"}"#,
        r#"{"kind":"check","what":"sys","state":"READY","colour":"red"}"#,
        r#"{"kind":"seamcall","lp":0,"name":"X","in":{"rzz":1},"out":{}}"#,
        "not json",
    ] {
        assert!(
            replay_bytes(&transcript(line), Options::default()).is_err(),
            "{line}"
        );
    }
    assert!(replay_bytes(b"", Options::default()).is_err());
}

#[test]
fn a_failing_check_fails() {
    let line = r#"{"kind":"check","what":"sys","state":"INIT_DONE"}"#;
    assert!(replay_bytes(&transcript(line), Options::default()).is_err());
}

#[test]
fn an_empty_or_missing_folder_is_no_success() {
    let summary = replay_paths(["/nonexistent/folder"], Options::default());
    assert!(!summary.is_success());
    assert!(summary.to_string().ends_with("0 passed, 1 failed"));
    assert!(!replay_paths(Vec::<PathBuf>::new(), Options::default()).is_success());
}
