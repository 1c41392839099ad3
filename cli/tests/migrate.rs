//! Tests `kvm-ops migrate` as users call it.

mod migrate_support;

use std::io::Write;
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migrate_support::{
    Last, StandardOutput, arrived, arrived_with_its_memory, between_processes, cutting_proxy,
    cutting_proxy_of, is_the_same, receiver, receiver_at, report, stays, td_between_processes,
    went_on,
};

#[test]
fn a_move_copies_nothing_and_the_guest_goes_on() {
    for tech in ["sev", "sev-es", "sev-snp", "tdx"] {
        let report = report(&["move", "--tech", tech]);
        assert_eq!(report["commands"], 0);
        assert_eq!(report["pages"], 0);
        went_on(&report);
    }
}

#[test]
fn an_snp_guest_has_no_rounds_and_its_link_no_other_key() {
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("key");
    std::fs::write(&key, [7; 32]).unwrap();
    for (option, said) in [
        (["--rounds", "1"], "it has no rounds"),
        (["--key", key.to_str().unwrap()], "agree on the key"),
    ] {
        let args = ["migrate", "send", "127.0.0.1:9", "--tech", "sev-snp"];
        let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
            .args(args)
            .args(option)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(2), "{option:?}");
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(stderr.contains(said), "{stderr}");
    }
}

#[test]
fn a_journey_between_hosts_has_one_owner_at_each_step() {
    for tech in ["sev", "sev-es", "sev-snp", "tdx"] {
        let rounds: &[&str] = match tech {
            "sev-snp" => &[],
            _ => &["--rounds", "1"],
        };
        let report = report(&[&["hosts", "--tech", tech], rounds].concat());
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
        assert_eq!(report["pages_as_written"], 63, "{report}");
        assert_eq!(report["pages_otherwise"], 0);
        went_on(&report);
    }
}

#[test]
fn a_migration_that_succeeds_logs_neither_warnings_nor_errors() {
    for args in [
        &["hosts", "--tech", "sev"][..],
        &["hosts", "--tech", "sev-es"],
        &["hosts", "--tech", "sev-snp"],
        &["hosts", "--tech", "tdx"],
        &["hosts", "--tech", "tdx", "--post-copy"],
        &["move", "--tech", "tdx"],
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
            .args(["-v", "migrate"])
            .args(args)
            .args(["--memory", "256K"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{args:?}: {said}");
        // The log is there, so that its lines would be seen.
        assert!(said.contains("DEBUG"), "{args:?}: {said}");
        let loud = |line: &&str| line.contains("WARN") || line.contains("ERROR");
        assert_eq!(said.lines().find(loud), None, "{args:?}");
    }
}

#[test]
fn a_td_that_writes_all_the_time_goes_to_another_host_as_it_was() {
    for streams in ["1", "3"] {
        let report = report(&["hosts", "--tech", "tdx", "--streams", streams]);
        assert_eq!(report["streams"].to_string(), streams);
        assert!(report["rounds"].as_u64().unwrap() > 1, "{report}");
        is_the_same(&report);
        went_on(&report);
    }
}

#[test]
fn a_td_that_writes_few_pages_is_stopped_for_few() {
    let set = ["--working-set", "16K", "--rounds", "8"];
    let report = report(&[&["hosts", "--tech", "tdx"], &set[..]].concat());
    let stopped = report["pages_stopped"].as_u64().unwrap();
    // Four pages, and the one with the count.
    assert!(stopped <= 5, "{report}");
    assert_eq!(report["pages_as_written"], 63);
    went_on(&report);
}

#[test]
fn streams_are_for_tds_between_hosts() {
    for args in [
        &["hosts", "--streams", "2"][..],
        &["move", "--tech", "tdx", "--streams", "2"],
        &["hosts", "--tech", "tdx", "--streams", "0"],
        &["hosts", "--tech", "tdx", "--streams", "17"],
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
            .arg("migrate")
            .args(args)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_td_goes_from_process_to_process_over_tcp() {
    let args = ["--tech", "tdx", "--streams", "2"];
    let receiver = receiver(&[&args[..], &["--timeout", "2m"]].concat());
    let address = receiver.1.clone();
    arrived(&td_between_processes(
        receiver,
        &address,
        &["--streams", "2"],
    ));
}

#[test]
fn a_td_goes_from_process_to_process_over_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = format!("unix:{}", directory.path().join("socket").display());
    let receiver = receiver_at(&path, &["--tech", "tdx", "--timeout", "2m"]);
    assert_eq!(receiver.1, path);
    arrived(&td_between_processes(receiver, &path, &[]));
}

#[test]
fn an_snp_guest_goes_from_process_to_process_over_tcp_and_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = format!("unix:{}", directory.path().join("socket").display());
    for at in ["127.0.0.1:0", &path] {
        let receiver = receiver_at(at, &["--tech", "sev-snp", "--timeout", "2m"]);
        let address = receiver.1.clone();
        let reports = between_processes("sev-snp", receiver, &address, &[]);
        arrived_with_its_memory(&reports);
    }
}

#[test]
fn the_journey_of_an_snp_guest_goes_on_where_its_link_broke() {
    for last in Last::OF_SNP {
        let receiver = receiver(&["--tech", "sev-snp", "--timeout", "2m"]);
        let (proxy, links) = cutting_proxy(receiver.1.clone(), last);
        arrived_with_its_memory(&between_processes("sev-snp", receiver, &proxy, &[]));
        assert_eq!(links.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn hosts_of_other_technologies_agree_on_no_keys_and_the_guest_runs_on() {
    let (mut child, address) = receiver(&["--tech", "sev-snp", "--timeout", "2m"]);
    let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
        .args(["migrate", "send", &address, "--tech", "tdx"])
        .args(["--memory", "256K"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "{said}");
    assert!(said.contains("exchanged no keys"), "{said}");
    assert!(said.contains("runs on at its source"), "{said}");
    // The target waits for another guest.
    assert!(child.try_wait().unwrap().is_none());
    arrived_with_its_memory(&between_processes(
        "sev-snp",
        (child, String::new()),
        &address,
        &[],
    ));
}

#[test]
fn a_source_that_did_not_hear_who_has_the_td_asks_again() {
    let receiver = receiver(&["--tech", "tdx", "--timeout", "2m"]);
    let (proxy, links) = cutting_proxy(receiver.1.clone(), Last::START);
    arrived(&td_between_processes(receiver, &proxy, &[]));
    assert_eq!(links.load(Ordering::SeqCst), 2);
}

#[test]
fn a_target_whose_source_is_gone_keeps_the_td_that_came() {
    let (mut child, address) = receiver(&["--tech", "tdx", "--timeout", "2m"]);
    let (proxy, links) = cutting_proxy(address, Last::DONE);
    let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
        .args(["migrate", "send", &proxy, "--tech", "tdx"])
        .args(["--memory", "256K"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(6));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("the guest arrived"), "{said}");
    assert_eq!(links.load(Ordering::SeqCst), 1);
    let out = child.wait_with_output_of_stdout();
    let received: serde_json::Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(received["pages_as_written"], 63, "{received}");
    assert_eq!(received["equal"], serde_json::Value::Null);
}

#[test]
fn a_td_whose_link_is_cut_before_the_start_token_goes_on_over_the_next() {
    for last in [Last::ROUND_END, Last::PREPARE] {
        let receiver = receiver(&["--tech", "tdx", "--timeout", "2m"]);
        let (proxy, links) = cutting_proxy(receiver.1.clone(), last);
        arrived(&td_between_processes(receiver, &proxy, &[]));
        assert_eq!(links.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn a_td_that_finds_no_other_link_runs_on_and_another_leaves_for_its_target() {
    let receiver = receiver(&["--tech", "tdx", "--timeout", "2m"]);
    let address = receiver.1.clone();
    let (proxy, links) = cutting_proxy_of(address.clone(), Last::ROUND_END, 1);
    stays(&proxy);
    assert!(links.load(Ordering::SeqCst) > 1);
    // The target waits a little for its source before it takes another guest.
    std::thread::sleep(Duration::from_secs(6));
    arrived(&td_between_processes(receiver, &address, &[]));
}

#[test]
fn a_target_that_has_all_but_the_start_token_waits_for_its_source_alone() {
    let (mut child, address) = receiver(&["--tech", "tdx", "--timeout", "2m"]);
    let (proxy, _) = cutting_proxy_of(address.clone(), Last::PREPARE, 1);
    stays(&proxy);
    // It cannot know that its source runs the TD on.
    stays(&address);
    assert_eq!(child.try_wait().unwrap(), None);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn an_sev_guest_whose_link_is_cut_goes_on_over_the_next_with_all_its_pages() {
    for last in Last::OF_SEV {
        let (mut child, address) = receiver(&["--timeout", "2m"]);
        let (proxy, links) = cutting_proxy(address, last);
        let sent = report(&["send", &proxy, "--timeout", "2m"]);
        let out = child.wait_with_output_of_stdout();
        let received: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let count = |report: &serde_json::Value, name: &str| report[name].as_u64().unwrap();
        assert!(count(&received, "count_first_at_target") > count(&sent, "count_at_source"));
        assert_eq!(received["pages_as_written"], 63, "{received}");
        assert_eq!(received["pages_otherwise"], 0, "{received}");
        assert_eq!(links.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn garbage_does_not_keep_a_td_from_arriving() {
    let receiver = receiver(&["--tech", "tdx", "--timeout", "2m"]);
    let address = receiver.1.clone();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], b""] {
        let mut link = TcpStream::connect(&address).unwrap();
        // The receiver may hang up in the middle.
        let _ = link.write_all(garbage);
    }
    arrived(&td_between_processes(receiver, &address, &[]));
}

#[test]
fn a_receiver_that_nobody_calls_gives_up_in_time() {
    let start = Instant::now();
    let (mut child, _) = receiver(&["--timeout", "1s"]);
    assert_eq!(child.wait().unwrap().code(), Some(6));
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn garbage_does_not_keep_a_guest_from_arriving() {
    let (mut child, address) = receiver(&["--timeout", "1m"]);
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0; 4096],
        &[0xff; 4096],
        b"",
    ] {
        let mut link = TcpStream::connect(&address).unwrap();
        // The receiver may hang up in the middle.
        let _ = link.write_all(garbage);
    }
    let sent = report(&["send", &address, "--timeout", "1m"]);
    assert_eq!(sent["leaks"], 0);
    let out = child.wait_with_output_of_stdout();
    let received: serde_json::Value = serde_json::from_slice(&out).unwrap();
    let count = |report: &serde_json::Value, name: &str| report[name].as_u64().unwrap();
    assert!(count(&received, "count_first_at_target") > count(&sent, "count_at_source"));
}

#[test]
fn hosts_with_different_keys_exchange_no_guest_and_the_source_runs_on() {
    let directory = tempfile::tempdir().unwrap();
    let key = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (one, other, short) = (
        key("one", &[1; 32]),
        key("two", &[2; 32]),
        key("x", &[1; 31]),
    );
    let (mut child, address) = receiver(&["--timeout", "3s", "--key", &one]);
    let send = |key: &str| {
        Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
            .args([
                "migrate", "send", &address, "--memory", "256K", "--key", key,
            ])
            .args(["--timeout", "3s"])
            .output()
            .unwrap()
    };
    let refused = send(&other);
    assert_eq!(refused.status.code(), Some(6));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("the guest runs on at its source"), "{said}");
    let refused = send(&short);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("32 bytes"));
    assert_eq!(child.wait().unwrap().code(), Some(6));
    let both = report(&["hosts", "--key", &one]);
    went_on(&both);
}

#[test]
fn a_signal_ends_a_waiting_receiver_in_an_orderly_way() {
    let (mut child, _) = receiver(&["--timeout", "5m"]);
    let pid = child.id().to_string();
    let killed = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(killed.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn memory_that_no_host_has_is_refused_with_the_value() {
    for memory in ["257G", "8388608T", "16777215T"] {
        let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
            .args(["migrate", "move", "--memory", memory])
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(2), "{memory}");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(said.contains("more than "), "{memory}: {said}");
    }
}
