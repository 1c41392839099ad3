//! Tests `kvm-ops migrate --post-copy` as users call it.

mod migrate_support;

use std::process::Command;
use std::sync::atomic::Ordering;

use migrate_support::{
    Last, arrived, cutting_proxy, cutting_proxy_of, receiver, receiver_at, report, stays_with,
    td_between_processes,
};

const TARGET: [&str; 5] = ["--tech", "tdx", "--timeout", "2m", "--post-copy"];

/// All pages of the guest came behind it, and the report tells how.
fn followed(report: &serde_json::Value) {
    let late = report["post_copy"]["pages_late"].as_u64().unwrap();
    assert!(late >= 64, "{report}");
    let on_demand = report["post_copy"]["pages_on_demand"].as_u64().unwrap();
    assert!(on_demand <= late, "{report}");
    assert!(report["post_copy"]["seconds"].as_f64().unwrap() > 0.0);
}

fn went_on(reports: &[serde_json::Value; 2]) {
    arrived(reports);
    reports.iter().for_each(followed);
    let [sent, _] = reports;
    assert_eq!(sent["pages_stopped"], 0, "{sent}");
    assert!(sent["downtime_seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_td_runs_at_another_host_before_its_pages_come() {
    for streams in ["1", "3"] {
        let post_copy = [
            "hosts",
            "--tech",
            "tdx",
            "--post-copy",
            "--streams",
            streams,
        ];
        let report = report(&post_copy);
        followed(&report);
        let steps = report["steps"].as_array().unwrap();
        let names: Vec<_> = steps
            .iter()
            .map(|step| step["phase"].as_str().unwrap())
            .collect();
        let order = ["stopped", "prepared", "committed", "post-copy", "done"];
        assert!(names.ends_with(&order), "{names:?}");
        assert_eq!(report["pages_as_written"], 63, "{report}");
        assert_eq!(report["pages_otherwise"], 0);
        assert_eq!(report["leaks"], 0);
        for part in migrate_support::IDENTITY {
            assert_eq!(report["equal"][part], true, "{part}: {report}");
        }
        let count = |name: &str| report[name].as_u64().unwrap();
        assert!(count("count_first_at_target") > count("count_at_source"));
    }
}

#[test]
fn after_a_round_few_pages_follow() {
    let one = ["hosts", "--tech", "tdx", "--post-copy", "--rounds", "1"];
    let report = report(&[&one[..], &["--working-set", "16K"]].concat());
    // Four pages and the one with the count may have been written each time that it was their turn.
    let late = report["post_copy"]["pages_late"].as_u64().unwrap();
    assert!(late <= 5, "{report}");
    assert_eq!(report["pages_as_written"], 63);
}

#[test]
fn a_td_runs_in_another_process_before_its_pages_come_over_tcp() {
    let streams = ["--streams", "2"];
    let receiver = receiver(&[&TARGET[..], &streams].concat());
    let address = receiver.1.clone();
    let args = ["--post-copy", "--streams", "2"];
    went_on(&td_between_processes(receiver, &address, &args));
}

#[test]
fn a_td_runs_in_another_process_before_its_pages_come_over_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = format!("unix:{}", directory.path().join("socket").display());
    let receiver = receiver_at(&path, &TARGET);
    went_on(&td_between_processes(receiver, &path, &["--post-copy"]));
}

#[test]
fn a_link_that_is_cut_while_pages_follow_is_replaced() {
    for last in [
        Last::START,
        Last::RUNNING,
        Last::LEFT,
        Last::WANTED,
        Last::COMPLETE,
    ] {
        let receiver = receiver(&TARGET);
        let (proxy, links) = cutting_proxy(receiver.1.clone(), last);
        went_on(&td_between_processes(receiver, &proxy, &["--post-copy"]));
        assert_eq!(links.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn a_td_whose_link_is_cut_before_the_start_token_runs_on() {
    let (mut child, address) = receiver(&TARGET);
    let (proxy, _) = cutting_proxy_of(address, Last::PREPARE, 1);
    stays_with(&proxy, &["--post-copy"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_td_whose_pages_find_no_other_link_is_lost_and_both_say_so() {
    let (child, address) = receiver(&TARGET);
    let (proxy, links) = cutting_proxy_of(address, Last::LEFT, 1);
    let sent = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
        .args(["migrate", "send", &proxy, "--tech", "tdx", "--post-copy"])
        .args(["--memory", "256K"])
        .output()
        .unwrap();
    assert!(links.load(Ordering::SeqCst) > 1);
    let received = child.wait_with_output().unwrap();
    for (out, why) in [
        (sent, "64 of its pages did not follow"),
        (received, "its source has not come back"),
    ] {
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(3), "{said}");
        assert!(said.contains("the guest is lost"), "{said}");
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn a_target_without_post_copy_refuses_in_words_and_the_td_runs_on() {
    let plain = ["--tech", "tdx", "--timeout", "2m"];
    let receiver = receiver(&plain);
    let address = receiver.1.clone();
    let said = stays_with(&address, &["--post-copy"]);
    assert!(
        said.contains("the target takes no guest before its pages"),
        "{said}"
    );
    // It waits on, for a guest that it takes.
    arrived(&td_between_processes(receiver, &address, &[]));
}

#[test]
fn what_cannot_run_before_its_pages_come_is_refused_with_the_reason() {
    for (args, why) in [
        (&["hosts", "--tech", "sev"][..], "RECEIVE_FINISH"),
        (&["hosts", "--tech", "sev-es"], "RECEIVE_FINISH"),
        (&["hosts", "--tech", "sev-snp"], "is stopped first"),
        (&["move", "--tech", "tdx"], "sends no pages"),
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
            .arg("migrate")
            .args(args)
            .arg("--post-copy")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains("only a TD") && said.contains(why), "{said}");
    }
}
