//! The recorded vectors, and a real firmware image where one is installed.
#![cfg(feature = "conform")]

use sha2::{Digest, Sha256};
use soft_amd_sp::conform::replay_paths;
use soft_amd_sp::measure::{Launch, Ovmf, cpu_signature};
use std::io::Write;
use std::path::PathBuf;

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/sev");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("soft-amd-sp-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

#[test]
fn every_recorded_vector_is_reproduced() {
    let summary = replay_paths([VECTORS]);
    println!("{summary}");
    assert!(summary.is_success() && summary.passed >= 47, "{summary}");
}

#[test]
fn compressed_and_nested_files_are_replayed_like_plain_ones() {
    let dir = scratch("nested");
    let inner = dir.join("a/b");
    std::fs::create_dir_all(&inner).unwrap();
    let plain = std::fs::read(format!("{VECTORS}/measure-vectors.json")).unwrap();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&plain).unwrap();
    std::fs::write(inner.join("one.json.gz"), gz.finish().unwrap()).unwrap();
    let zst =
        ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
    std::fs::write(dir.join("two.json.zst"), zst).unwrap();
    std::fs::write(dir.join("README.md"), "not a vector file").unwrap();
    let summary = replay_paths([&dir]);
    std::fs::remove_dir_all(&dir).unwrap();
    let document: serde_json::Value = serde_json::from_slice(&plain).unwrap();
    let vectors = document["vectors"].as_array().unwrap().len();
    assert_eq!(
        (summary.passed, summary.failed(), summary.files),
        (2 * vectors, 0, 2),
        "{summary}"
    );
}

/// Changes one value at a time in the recorded file; each change must be found and named.
#[test]
fn every_single_changed_value_is_named_with_both_values() {
    let text = std::fs::read_to_string(format!("{VECTORS}/measure-vectors.json")).unwrap();
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    let dir = scratch("changed");
    let file = dir.join("changed.json");
    let vectors = document["vectors"].as_array().unwrap();
    for vector in vectors {
        for (field, value) in vector["expect"].as_object().unwrap() {
            let mut changed = vector.clone();
            changed["expect"][field] = serde_json::json!("00");
            let one = serde_json::json!({"format": document["format"], "vectors": [changed]});
            std::fs::write(&file, one.to_string()).unwrap();
            let summary = replay_paths([&file]);
            let report = summary.to_string();
            assert_eq!((summary.passed, summary.failed()), (0, 1), "{report}");
            let id = vector["id"].as_str().unwrap();
            assert!(report.contains(&format!("{id}: {field}: expected \"00\", got {value}")));
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn unusable_files_fail_with_a_reason_instead_of_being_skipped() {
    let dir = scratch("unusable");
    for (name, content, reason) in [
        ("cut.json", "{\"format\": \"amd", "EOF"),
        (
            "other.json",
            "{\"format\": \"x/1\", \"vectors\": []}",
            "format is \"x/1\"",
        ),
        ("none.json", "{\"vectors\": []}", "no format field"),
        (
            "list.json",
            "{\"format\": \"amd-measure-vectors/1\"}",
            "no list of vectors",
        ),
    ] {
        let file = dir.join(name);
        std::fs::write(&file, content).unwrap();
        let summary = replay_paths([&file]);
        assert!(summary.failures[0].reason.contains(reason), "{summary}");
        assert!(summary.to_string().ends_with("0 passed, 1 failed"));
    }
    let kind = r#"{"format":"amd-measure-vectors/1","vectors":[{"id":"a","kind":"new"}]}"#;
    std::fs::write(dir.join("kind.json"), kind).unwrap();
    let summary = replay_paths([dir.join("kind.json"), dir.join("absent.json")]);
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(summary.failed(), 2, "{summary}");
    assert!(summary.failures[0].reason.contains("unknown kind"));
}

/// Values of `sev-snp-measure` 0.0.13 and the crate `sev` 8.0.0, which agree, for the image of
/// Debian 12's package `ovmf` 2022.11.
#[test]
fn digests_of_debian_ovmf_equal_those_of_independent_tools() {
    const PATH: &str = "/usr/share/ovmf/OVMF.fd";
    const IMAGE: &str = "7b456907dd0786d415999e801a1ac4637b8ed4d7cf5378cfc6edbe5e574dd773";
    let Ok(image) = std::fs::read(PATH) else {
        println!("skipped: {PATH} is not installed");
        return;
    };
    let hash = hex(&Sha256::digest(&image));
    if hash != IMAGE {
        println!("skipped: {PATH} is another build, sha256 {hash}");
        return;
    }
    let ovmf = Ovmf::parse(&image).unwrap();
    assert_eq!(
        (ovmf.sections().len(), ovmf.reset_eip()),
        (5, Some(0x80_b004))
    );
    assert_eq!(ovmf.hash_table(), None);

    let launch = |n, model| {
        Launch::new(&image)
            .vcpus(n)
            .vcpu_sig(cpu_signature(model).unwrap())
    };
    assert_eq!(hex(&launch(1, "EPYC").sev().unwrap()), IMAGE);
    for (vcpus, es, snp) in [
        (
            1,
            "8590d0b6d4beced4ec5d855960dd684f2887af7ae80bb6783610620c6aa34362",
            "11570979c77a0adb515761a702527c8b9e11554e730552621d950988613a3a75\
             c6ff1703f540bd22a9beede8fe7a97e3",
        ),
        (
            4,
            "20870ccffdd6efa982546bf9c31daa880afa38e9ccd884d985a7b4d89d7a4591",
            "32ac9d7a17d28f7cd4404a4516d2f00519668c40ada2062351c36767e908eb3f\
             090d66c33ab10f80150e00a4385b6d0f",
        ),
    ] {
        assert_eq!(hex(&launch(vcpus, "EPYC-Milan").sev_es().unwrap()), es);
        assert_eq!(hex(&launch(vcpus, "EPYC-v4").snp().unwrap()), snp);
    }
}
