//! `kvm-ops run --disk`.

mod common;

use common::{Ran, hosts, run};
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

/// 16-bit code that reads the first register of the function in slot 1, and ends with its value:
/// mov eax, 0x80000800; mov dx, 0xcf8; out dx, eax; mov dx, 0xcfc; in eax, dx; mov dx, 0x501; out dx, eax; hlt
const SLOT_1: [u8; 23] = [
    0x66, 0xb8, 0x00, 0x08, 0x00, 0x80, 0xba, 0xf8, 0x0c, 0x66, 0xef, 0xba, 0xfc, 0x0c, 0x66, 0xed,
    0xba, 0x01, 0x05, 0x66, 0xef, 0xf4, 0xf4,
];

fn image(bytes: u64) -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(bytes).unwrap();
    image
}

/// Runs the code with these disks.
fn ran(host: &str, disks: &[&str]) -> Ran {
    let directory = TempDir::new().unwrap();
    let code = directory.path().join("code.bin");
    std::fs::write(&code, SLOT_1).unwrap();
    let mut args = vec!["run", code.to_str().unwrap(), "--format", "flat", "--json"];
    args.extend(["--memory", "1M", "--host", host]);
    args.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
    run(&args)
}

#[test]
fn a_disk_is_in_the_first_slot_and_in_the_report() {
    let image = image(1 << 20);
    let path = image.path().to_str().unwrap();
    for host in hosts() {
        for (disk, read_only) in [(path.to_owned(), false), (format!("{path},ro"), true)] {
            let ran = ran(host, &[&disk]);
            let report: Value = serde_json::from_str(&ran.out).unwrap();
            assert_eq!(report["end"], "ended by debug exit 0x10421af4", "{report}");
            let told = &report["disks"][0];
            assert_eq!(told["image"], path);
            assert_eq!(told["read_only"], read_only);
            assert_eq!(told["bytes"], 1 << 20);
            assert_eq!((&told["reads"], &told["private"]), (&0.into(), &0.into()));
        }
    }
}

#[test]
fn without_a_disk_the_slot_is_empty() {
    let ran = ran("sim", &[]);
    let report: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(report["end"], "ended by debug exit 0xffffffff", "{report}");
    assert_eq!(report["disks"], Value::Array(Vec::new()));
}

#[test]
fn images_that_are_no_disks_are_refused_before_anything_runs() {
    let (odd, good) = (image(513), image(512));
    let path = |image: &NamedTempFile| image.path().to_str().unwrap().to_owned();
    let refused = |disks: &[&str], code, why| {
        let ran = ran("sim", disks);
        assert_eq!(ran.code, Some(code), "{}", ran.err);
        assert!(ran.err.contains(why), "{}", ran.err);
        assert_eq!(ran.out, "");
    };
    refused(&["/no such disk"], 5, "No such file");
    refused(&["/"], 5, "is not a regular file");
    refused(&[&path(&odd)], 5, "0x201 bytes");
    refused(&[&path(&good), &path(&good)], 5, "another machine uses it");
    refused(&[",ro"], 2, "needs the path");
    let images: Vec<_> = (0..9).map(|_| image(512)).collect();
    let paths: Vec<_> = images.iter().map(path).collect();
    let paths: Vec<_> = paths.iter().map(String::as_str).collect();
    refused(&paths, 2, "8 slots");
    let tour = run(&["run", "--tech", "tdx", "--disk", &path(&good)]);
    assert_eq!(tour.code, Some(2), "{}", tour.err);
}
