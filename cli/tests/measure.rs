//! Tests that launch digests computed off line equal those of independent programs.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::run;
use kvm_ops_tdvf::{Attributes, Section, SectionKind, compose};
use serde_json::Value;

/// Debian 12's OVMF.fd, the image of the recorded digests.
fn debian_ovmf() -> Option<String> {
    let named = std::env::var_os("KVM_OPS_OVMF").map(PathBuf::from);
    let known = ["/usr/share/ovmf/OVMF.fd", "/usr/share/OVMF/OVMF.fd"].map(PathBuf::from);
    let Some(path) = named.into_iter().chain(known).find(|path| path.is_file()) else {
        println!("skipped: no OVMF image; install the package ovmf or set KVM_OPS_OVMF");
        return None;
    };
    let path = path.to_str().expect("a path in UTF-8").to_owned();
    if digest(&["sev", &path]) != DEBIAN_SHA256 {
        println!("skipped: {path} is another build than Debian 12's");
        return None;
    }
    Some(path)
}

const DEBIAN_SHA256: &str = "7b456907dd0786d415999e801a1ac4637b8ed4d7cf5378cfc6edbe5e574dd773";

/// Returns the line that `measure` prints.
fn digest(args: &[&str]) -> String {
    let ran = run(&[&["measure"], args].concat());
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{args:?}");
    ran.out.strip_suffix('\n').expect("a line").to_owned()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&digest(&[args, &["--json"]].concat())).expect("JSON")
}

fn refused(args: &[&str], code: i32, words: &[&str]) {
    let ran = run(&[&["measure"], args].concat());
    assert_eq!(
        (ran.code, ran.out.as_str()),
        (Some(code), ""),
        "{args:?}: {}",
        ran.err
    );
    for word in words {
        assert!(
            ran.err.contains(word),
            "{args:?}: no `{word}` in {}",
            ran.err
        );
    }
}

/// An image with a footer table that holds TDX metadata and no SEV metadata.
fn composed(directory: &Path) -> String {
    let mut image: Vec<u8> = (0..0x3000_u32).map(|i| ((i * 7) >> 5) as u8).collect();
    let firmware = Section {
        kind: SectionKind::Bfv,
        data_offset: 0,
        raw_size: 0x3000,
        memory_address: 0xffff_d000,
        memory_size: 0x3000,
        attributes: Attributes {
            extend: true,
            aug: false,
        },
    };
    compose(&mut image, &[firmware]).unwrap();
    let path = directory.join("composed.fd");
    std::fs::write(&path, image).unwrap();
    path.to_str().unwrap().to_owned()
}

const SINGLE: &str = "4c7206f0f483c524f12c366c711e9049030a8d47c471ee5aa9c4999a08de4057\
                      fb887fed0744d5631a212967fb231c47";
const TWO_PASS: &str = "acccbcc870a381adab0d3919d90a7f268ac3b0364771f202ed4bb4e892d045b3\
                        3db3b32e6924cba830a724eed443f7e1";

#[test]
fn mrtd_of_debian_ovmf_is_the_recorded_one_in_both_orders() {
    let Some(ovmf) = debian_ovmf() else { return };
    assert_eq!(digest(&["tdx", &ovmf]), SINGLE);
    assert_eq!(digest(&["tdx", &ovmf, "--order", "single"]), SINGLE);
    assert_eq!(digest(&["tdx", &ovmf, "--order", "two-pass"]), TWO_PASS);
    assert_eq!(
        digest(&["tdx", &ovmf, "--order", "both"]),
        format!("single   {SINGLE}\ntwo-pass {TWO_PASS}")
    );
    let report = json(&["tdx", &ovmf, "--order", "both"]);
    assert_eq!(report["mrtd"]["single"], SINGLE);
    assert_eq!(report["mrtd"]["two-pass"], TWO_PASS);
    assert_eq!(report["pages_added"], 538);
    assert_eq!(report["sections"].as_array().unwrap().len(), 6);
    let table = digest(&["tdx", &ovmf, "--sections"]);
    for line in ["BFV      0x20000  0x1e0000  0xffe20000", "TD_HOB", SINGLE] {
        assert!(table.contains(line), "{table}");
    }
}

/// Digests from `sev-snp-measure` and the crate `sev`, which agree.
#[test]
fn sev_digests_of_debian_ovmf_are_the_recorded_ones() {
    let Some(ovmf) = debian_ovmf() else { return };
    for (args, expected) in [
        (
            &["seves", &ovmf, "--vcpus", "1", "--vcpu-type", "EPYC-Milan"][..],
            "8590d0b6d4beced4ec5d855960dd684f2887af7ae80bb6783610620c6aa34362",
        ),
        (
            &["seves", &ovmf, "--vcpus", "4", "--vcpu-type", "EPYC-Milan"],
            "20870ccffdd6efa982546bf9c31daa880afa38e9ccd884d985a7b4d89d7a4591",
        ),
        (
            &["snp", &ovmf, "--vcpus", "1", "--vcpu-type", "EPYC-v4"],
            "11570979c77a0adb515761a702527c8b9e11554e730552621d950988613a3a75\
             c6ff1703f540bd22a9beede8fe7a97e3",
        ),
        (
            &[
                "snp",
                &ovmf,
                "--vcpus",
                "4",
                "--vcpu-type",
                "EPYC-v4",
                "--guest-features",
                "0x1",
            ],
            "32ac9d7a17d28f7cd4404a4516d2f00519668c40ada2062351c36767e908eb3f\
             090d66c33ab10f80150e00a4385b6d0f",
        ),
    ] {
        assert_eq!(digest(args), expected, "{args:?}");
        assert_eq!(json(args)["digest"], expected, "{args:?}");
    }
}

/// Runs the program if it is installed: `pip install sev-snp-measure`.
#[test]
fn sev_digests_equal_those_of_sev_snp_measure() {
    if Command::new("sev-snp-measure")
        .arg("--version")
        .output()
        .is_err()
    {
        println!("skipped: sev-snp-measure is not on PATH");
        return;
    }
    let Some(ovmf) = debian_ovmf() else { return };
    for options in [
        &["sev"][..],
        &["seves", "--vcpus", "1", "--vcpu-type", "EPYC-Rome-v2"],
        &["seves", "--vcpus", "3", "--vcpu-sig", "0x800f12"],
        &["seves", "--vcpus", "2", "--vmm-type", "gce"],
        &[
            "snp",
            "--vcpus",
            "1",
            "--vcpu-type",
            "EPYC-Genoa",
            "--output-format",
            "base64",
        ],
        &[
            "snp",
            "--vcpus",
            "64",
            "--vcpu-type",
            "EPYC-v4",
            "--guest-features",
            "0x21",
        ],
        &[
            "snp",
            "--vcpus",
            "2",
            "--vmm-type",
            "ec2",
            "--guest-features",
            "33",
        ],
        &[
            "snp",
            "--vcpus",
            "2",
            "--vcpu-family",
            "26",
            "--vcpu-model",
            "17",
            "--vcpu-stepping",
            "3",
        ],
    ] {
        let (mode, rest) = options.split_first().unwrap();
        let theirs = Command::new("sev-snp-measure")
            .args(["--mode", mode, "--ovmf", &ovmf])
            .args(rest)
            .output()
            .expect("it runs");
        assert!(theirs.status.success(), "{options:?}: {theirs:?}");
        let theirs = String::from_utf8(theirs.stdout).unwrap();
        assert_eq!(
            digest(&[&[*mode, &ovmf], rest].concat()),
            theirs.trim_end(),
            "{options:?}"
        );
    }
}

#[test]
fn a_composed_image_is_measured_where_no_real_one_is_installed() {
    let directory = tempfile::tempdir().unwrap();
    let image = composed(directory.path());
    // The first from Python's hashlib.sha256 of the file, MRTD from tdx/tdvf/tests/mrtd.py.
    assert_eq!(digest(&["sev", &image]), COMPOSED_SHA256);
    assert_eq!(digest(&["tdx", &image]), COMPOSED_SINGLE);
    assert_eq!(
        digest(&["tdx", &image, "--order", "two-pass"]),
        COMPOSED_TWO
    );
    let snp = ["snp", &image, "--vcpus", "1", "--vcpu-type", "EPYC-v4"];
    assert_eq!(digest(&snp).len(), 96);
    // Options that the digest covers change it; other options do not.
    let other = |option, value| digest(&[&snp[..4], &[option, value]].concat());
    assert_eq!(other("--vcpu-sig", "0x800f12"), digest(&snp));
    assert_ne!(other("--vcpu-sig", "0x800f13"), digest(&snp));
    assert_eq!(other("--vcpu-type", "EPYC"), digest(&snp));
    assert_ne!(
        digest(&[&snp[..], &["--guest-features", "3"]].concat()),
        digest(&snp)
    );
}

#[test]
fn what_cannot_be_measured_says_why_and_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let image = composed(directory.path());
    let plain = directory.path().join("plain.bin");
    std::fs::write(&plain, [0x90; 0x1000]).unwrap();
    let plain = plain.to_str().unwrap();
    let damaged = directory.path().join("damaged.fd");
    let mut bytes = std::fs::read(&image).unwrap();
    let at = bytes
        .windows(4)
        .position(|window| window == b"TDVF")
        .unwrap();
    bytes[at + 16 + 4] = 1;
    std::fs::write(&damaged, bytes).unwrap();
    let damaged = damaged.to_str().unwrap();

    refused(
        &["tdx", "/nowhere.fd"],
        5,
        &["cannot read /nowhere.fd", "caused by", "hint"],
    );
    refused(
        &["tdx", plain],
        5,
        &["cannot be launched as a TD", "no table", "hint: of OVMF's"],
    );
    refused(
        &["tdx", damaged],
        5,
        &["section 0 (its entry is at offset 0x", "raw data"],
    );
    refused(
        &["snp", &image, "--vcpus", "2", "--vcpu-type", "EPYC"],
        5,
        &["no reset block, which 2 vCPUs need", "hint"],
    );
    let kernel = ["--kernel", plain];
    refused(
        &[&["sev", &image], &kernel[..]].concat(),
        5,
        &["no place for kernel hashes", "hint"],
    );
    refused(
        &["sev", &image, "--kernel", "/nowhere"],
        5,
        &["the kernel cannot be used", "cannot read /nowhere"],
    );
    refused(&["sev", &image, "--initrd", plain], 2, &["--kernel <FILE>"]);
    refused(
        &["snp", &image, "--vcpus", "1"],
        2,
        &["vCPUs' model", "--vcpu-type, --vcpu-sig"],
    );
    refused(&["snp", &image], 2, &["--vcpus <N>"]);
    refused(
        &["snp", &image, "--vcpus", "1", "--vcpu-type", "Opteron_G1"],
        2,
        &["Opteron_G1", "EPYC-Milan-v2", "EPYC-Turin"],
    );
    refused(
        &["snp", &image, "--vcpus", "1", "--vcpu-family", "25"],
        2,
        &["--vcpu-model <MODEL>"],
    );
    refused(
        &["snp", &image, "--vcpus", "1", "--vcpu-sig", "0x1ffffffff"],
        2,
        &["not a number of at most 32 bits"],
    );
}

/// sev-snp-measure refuses the first, and SNP images of broken pages; it digests the others.
#[test]
fn files_that_are_no_firmware_have_no_digest() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let variables = b"\x8d\x2b\xf1\xff\x96\x76\x8b\x4c\xa9\x85\x27\x47\x07\x5b\x4f\x50";
    let mut store = vec![0x11; 0x2_0000];
    store[0x10..0x20].copy_from_slice(variables);
    store[0x20..0x28].copy_from_slice(&0x2_0000_u64.to_le_bytes());
    store[0x28..0x2c].copy_from_slice(b"_FVH");
    for (path, words) in [
        (file("empty", &[]), "it is an empty file"),
        (
            file("passwd", b"root:x:0:0:root:/root:/bin/bash\n"),
            "it is a text",
        ),
        (file("zeros", &[0; 0x1000]), "it is a blank file"),
        (
            file("packed.gz", b"\x1f\x8b\x08\x00"),
            "it is a compressed file",
        ),
        (file("vars.fd", &store), "it is a store of EFI variables"),
        (
            file("cut.fd", &store[..0x1_8000]),
            "it is a part of a firmware ROM",
        ),
        (
            file("noise", &[0x9a; 0x2_0000]),
            "it is no image of a known kind",
        ),
    ] {
        let vcpus = ["--vcpus", "1", "--vcpu-type", "EPYC-v4"];
        for (mode, more) in [("sev", &[][..]), ("seves", &vcpus), ("snp", &vcpus)] {
            refused(
                &[&[mode, &path], more].concat(),
                5,
                &["is no firmware", words, "hint: "],
            );
        }
        refused(
            &["tdx", &path],
            5,
            &["cannot be launched as a TD", words, "hint: "],
        );
    }
}

const COMPOSED_SHA256: &str = "abf51d753be47e27144454766d4e2ec6b707237e4297f3f12e278b14cf0ed6b1";
const COMPOSED_SINGLE: &str = "665b5f3d53522d1c5559eaa1730a3201d1576c5de4659e47f4228ed517a8ba94\
     fc3f9308e11c8bf788ead6da14eb4149";
const COMPOSED_TWO: &str = "590a2fe736f9a826b8efcb9475a8d5e1bda25793c1a21ce1a3a1ace39862a1ed\
     efd806b36e160e7cb5e7330a0e0d0194";
