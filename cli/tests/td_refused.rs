//! Firmware that is cut, and TDs that are too small for theirs: each is refused, or ends, with the reason.

mod common;

use common::{ovmf, run};
use serde_json::Value;

const TD: [&str; 6] = ["run", "--tech", "tdx", "--allow-rbp", "--timeout", "5m"];

#[test]
fn firmware_cut_at_either_end_starts_no_td_and_the_refusal_says_what_is_missing() {
    let Some(ovmf) = ovmf() else { return };
    let whole = std::fs::read(ovmf).unwrap();
    let len = whole.len();
    let refused = |bytes: &[u8], words: &str| {
        let cut = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(cut.path(), bytes).unwrap();
        let ran = run(&[&TD[..], &[cut.path().to_str().unwrap()]].concat());
        assert_eq!(ran.code, Some(5), "{} bytes: {}", bytes.len(), ran.err);
        let has = |words| ran.err.contains(words);
        assert!(has("cannot be launched as a TD"), "{}", ran.err);
        assert!(has(words), "{} bytes: {}", bytes.len(), ran.err);
    };
    // The table of what the image holds is at its end.
    refused(&[], "it is an empty file");
    for keep in [0x1000, len / 2, len - 0x1000, len - 32, len - 1] {
        refused(&whole[..keep], "check that the file was written completely");
    }
    // Its parts are named by their distance from the end.
    for keep in [0x1000, len / 2, len - 0x1000, len - 1] {
        refused(&whole[len - keep..], "is outside of the image");
    }
    refused(&whole[len - 100..], "has the impossible length");
}

#[test]
fn a_td_too_small_for_its_firmware_is_refused_or_ends_at_the_address_that_has_no_memory() {
    /// Of Debian 12's package, whose needs these are.
    const MRTD: &str = "4c7206f0f483c524f12c366c711e9049030a8d47c471ee5aa9c4999a08de4057fb887fed0744d5631a212967fb231c47";
    let Some(ovmf) = ovmf() else { return };
    if run(&["measure", "tdx", &ovmf]).out.trim_end() != MRTD {
        println!("skipped: {ovmf} is not Debian 12's");
        return;
    }
    // Its metadata lists memory up to 0x820000.
    let ran = run(&[&TD[..], &["--memory", "8M", &ovmf]].concat());
    assert_eq!(ran.code, Some(2), "{}", ran.err);
    let words = "has sections up to 0x820000, beyond the memory of 0x800000 bytes";
    assert!(ran.err.contains(words), "{}", ran.err);
    // It unpacks itself to 0x1700000.
    for memory in ["12M", "16M"] {
        let ran = run(&[&TD[..], &["--json", "--memory", memory, &ovmf]].concat());
        assert_eq!(ran.code, Some(3), "{memory}: {}", ran.err);
        let words = "private access at 0x1700000: no memory of the VM is there";
        assert!(ran.err.contains(words), "{}", ran.err);
        let report: Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(report["outcome"], "crashed", "{report}");
        assert_eq!(report["leaks"], Value::Array(Vec::new()));
        let account = &report["firmware"]["disagreements"];
        assert_eq!(*account, Value::Array(Vec::new()));
    }
}
