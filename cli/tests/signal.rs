//! Tests that SIGINT stops the guests in an orderly way.

#![cfg(unix)]

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use common::{has_kvm, program};

/// A flat image that prints a line and then jumps to itself without end.
const SPINS: &[u8] = b"\xba\x02\x04\xb0x\xee\xb0\n\xee\xeb\xfe";

fn interrupt(child: &Child) {
    let id = child.id().to_string();
    let sent = Command::new("kill")
        .args(["-INT", &id])
        .status()
        .expect("kill runs");
    assert!(sent.success());
}

#[test]
fn one_sigint_stops_a_guest_and_tells_what_it_did() {
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), SPINS).unwrap();
    let mut child = program()
        .args([
            "run",
            image.path().to_str().unwrap(),
            "--format",
            "flat",
            "--timeout",
            "10m",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Output shows that the guest runs.
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "x\n");
    interrupt(&child);
    let mut err = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{err}");
    assert!(
        err.contains(": stopped after ") && err.contains("exits: "),
        "{err}"
    );
}

/// One VM has ended when the signal comes; the others would run without end.
#[test]
fn one_sigint_stops_a_fleet_which_still_reports() {
    for (host, there) in [("sim", true), ("kvm", has_kvm())] {
        if !there {
            continue;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let fleet = "defaults.timeout = \"10m\"\n\
                     [[vm]]\nname = \"ends\"\npayload = \"hello\"\n\
                     [[vm]]\nname = \"spins\"\ncount = 3\npayload = \"spin\"\n";
        std::fs::write(file.path(), fleet).unwrap();
        let mut child = program()
            .args(["fleet", "--host", host, file.path().to_str().unwrap()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The first line of progress shows that one VM has ended.
        let mut err = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        err.read_line(&mut line).unwrap();
        assert!(line.starts_with("ends: halted"), "{line}");
        interrupt(&child);
        let mut rest = String::new();
        err.read_to_string(&mut rest).unwrap();
        let mut out = String::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut out)
            .unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{out}{rest}");
        let sums = out.lines().last().unwrap_or_default();
        assert!(
            sums.starts_with("4 VMs: 1 as expected, 3 stopped; "),
            "{out}{rest}"
        );
        assert!(sums.contains("nothing leaked"), "{sums}");
        assert!(rest.contains("interrupted"), "{rest}");
    }
}
