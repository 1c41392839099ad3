//! Tests `kvm-ops migrate` as users call it.

use std::process::Command;

fn report(args: &[&str]) -> serde_json::Value {
    let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
        .arg("migrate")
        .args(args)
        .args(["--memory", "256K", "--json"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {stderr}");
    serde_json::from_slice(&out.stdout).unwrap()
}

fn went_on(report: &serde_json::Value) {
    let count = |name: &str| report[name].as_u64().unwrap();
    assert!(
        count("count_first_at_target") > count("count_at_source"),
        "{report}"
    );
    assert_eq!(count("leaks"), 0);
}

#[test]
fn a_move_copies_nothing_and_the_guest_goes_on() {
    for tech in ["sev", "sev-es"] {
        let report = report(&["move", "--tech", tech]);
        assert_eq!(report["commands"], 0);
        assert_eq!(report["pages"], 0);
        went_on(&report);
    }
}

#[test]
fn a_journey_between_hosts_has_one_owner_at_each_step() {
    for tech in ["sev", "sev-es"] {
        let report = report(&["hosts", "--tech", tech, "--rounds", "1"]);
        let steps = report["steps"].as_array().unwrap();
        let owners: Vec<_> = steps
            .iter()
            .map(|step| step["owner"].as_str().unwrap())
            .collect();
        let turn = owners.iter().position(|owner| *owner == "target").unwrap();
        assert!(
            turn > 0 && owners[turn..].iter().all(|owner| *owner == "target"),
            "{owners:?}"
        );
        assert!(report["pages"].as_u64().unwrap() >= 64);
        went_on(&report);
    }
}
