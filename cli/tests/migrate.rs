//! Tests `kvm-ops migrate` as users call it.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

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
    for tech in ["sev", "sev-es", "sev-snp", "tdx"] {
        let report = report(&["move", "--tech", tech]);
        assert_eq!(report["commands"], 0);
        assert_eq!(report["pages"], 0);
        went_on(&report);
    }
}

#[test]
fn guests_that_only_move_within_a_host_are_told_so() {
    for (tech, how) in [("sev-snp", "hosts"), ("tdx", "hosts"), ("tdx", "send")] {
        let mut args = vec!["migrate", how, "--tech", tech];
        args.extend((how == "send").then_some("127.0.0.1:9"));
        let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
            .args(&args)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(said.contains("kvm-ops migrate move"), "{said}");
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

/// A `receive` that waits, and its address.
fn receiver(args: &[&str]) -> (Child, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
        .args([
            "migrate",
            "receive",
            "127.0.0.1:0",
            "--memory",
            "256K",
            "--json",
        ])
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let stderr = child.stderr.as_mut().unwrap();
    BufReader::new(stderr).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("waiting at ").expect("an address");
    (child, address.to_owned())
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

trait StandardOutput {
    fn wait_with_output_of_stdout(&mut self) -> Vec<u8>;
}

impl StandardOutput for Child {
    /// Waits for success, and returns standard output. Standard error stays with its reader.
    fn wait_with_output_of_stdout(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        let stdout = self.stdout.as_mut().unwrap();
        std::io::Read::read_to_end(stdout, &mut out).unwrap();
        assert!(self.wait().unwrap().success());
        out
    }
}
