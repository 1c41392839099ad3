//! The report of a TD's run: its registers, and the event log that its firmware leaves in memory.

mod common;

use common::{PROMPT, run, tdvf};
use serde_json::Value;

#[test]
fn the_event_log_that_firmware_leaves_in_memory_replays_to_the_rtmrs() {
    let Some(firmware) = tdvf() else {
        return;
    };
    let td = ["run", "--tech", "tdx", "--json", "--memory", "128M"];
    let end = ["--timeout", "30m", "--until", PROMPT, &firmware];
    let ran = run(&[&td[..], &end].concat());
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    let report: Value = serde_json::from_str(&ran.out).unwrap();
    let measured = &report["measured"];
    let told = run(&["measure", "tdx", &firmware]).out;
    assert_eq!(measured["mrtd"], told.trim_end());
    let zeros = "00".repeat(48);
    // Firmware measures its configuration, and nothing of what it would start.
    let rtmr = |n: usize| measured["rtmr"][n].as_str().unwrap();
    assert_ne!(rtmr(0), zeros);
    assert_eq!((rtmr(2), rtmr(3)), (&*zeros, &*zeros));
    let log = &measured["event_log"];
    assert_eq!(log["error"], Value::Null, "{log}");
    assert!(log["events"].as_u64() > Some(10), "{log}");
    assert_eq!(log["replays"], Value::from(vec![true; 4]), "{log}");
}
