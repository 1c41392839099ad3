//! A fleet three times as large takes three times as much, and leaves nothing.

mod common;

use std::collections::BTreeMap;

use common::run_with_input;
use serde_json::Value;

/// How many VMs of each kind the small fleet has.
const KINDS: [(&str, u64); 5] = [
    ("normal", 8),
    ("tdx", 3),
    ("sev", 3),
    ("sev-es", 2),
    ("sev-snp", 2),
];

fn fleet(times: u64) -> Value {
    let mut file = String::new();
    for (kind, count) in KINDS {
        file += &format!(
            "[[vm]]\nname = \"{kind}\"\nkind = \"{kind}\"\nhost = \"sim\"\npayload = \"hello\"\n\
             memory = \"4M\"\ncount = {}\n",
            count * times
        );
    }
    let ran = run_with_input(&["fleet", "--json", "-"], &file);
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    serde_json::from_str(&ran.out).expect("JSON")
}

/// Calls that depend on how the vCPUs' threads fell in time, or that are made once for a host.
const UNEVEN: [&str; 4] = ["TDH.VP.ENTER", "TDH.VP.FLUSH", "PLATFORM_STATUS", "wbinvd"];

/// The calls that found a lock taken by another VM's call, and were made again.
fn found_busy(firmware: &Value, call: &str) -> u64 {
    let refused = firmware["refused"].as_object().unwrap().iter();
    refused
        .filter_map(|(what, n)| Some((what.strip_prefix(call)?.strip_prefix(' ')?, n)))
        .filter(|(status, _)| status.contains("BUSY"))
        .map(|(_, n)| n.as_u64().unwrap())
        .sum()
}

/// What a fleet takes, by name. A call that was made again counts once.
fn taken(report: &Value) -> BTreeMap<String, u64> {
    let mut taken = BTreeMap::new();
    for total in ["vms", "ok", "vcpus", "exits", "pages"] {
        taken.insert(total.to_owned(), report["totals"][total].as_u64().unwrap());
    }
    for firmware in report["firmware"].as_array().unwrap() {
        let name = firmware["firmware"].as_str().unwrap();
        for (of, what) in [("pages", "taken"), ("keys", "leased")] {
            let count = firmware[of][what].as_u64().unwrap();
            taken.insert(format!("{name}: {of} {what}"), count);
        }
        for (call, count) in firmware["calls_by_name"].as_object().unwrap() {
            if !UNEVEN.contains(&call.as_str()) {
                let once = count.as_u64().unwrap() - found_busy(firmware, call);
                taken.insert(format!("{name}: {call}"), once);
            }
        }
    }
    taken
}

#[test]
fn a_fleet_three_times_as_large_takes_three_times_the_pages_keys_exits_and_calls() {
    let (small, large) = (fleet(1), fleet(3));
    let (small, large) = (taken(&small), taken(&large));
    assert!(small.len() > 20, "{small:?}");
    let times: BTreeMap<String, u64> = small.into_iter().map(|(name, n)| (name, 3 * n)).collect();
    assert_eq!(times, large);
}

#[test]
fn a_fleet_leaves_no_thread_descriptor_or_mapping_whatever_its_size() {
    for times in [1, 3] {
        let report = fleet(times);
        assert!(report["before"]["threads"].is_u64(), "{report}");
        assert_eq!(report["before"], report["after"], "{times} times");
    }
}
