//! The program `kvm-ops migrate`, between processes too, and links between them that are cut.

// Each test file uses a part.
#![allow(dead_code, unreachable_pub)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub fn report(args: &[&str]) -> serde_json::Value {
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

pub fn went_on(report: &serde_json::Value) {
    let count = |name: &str| report[name].as_u64().unwrap();
    assert!(
        count("count_first_at_target") > count("count_at_source"),
        "{report}"
    );
    assert_eq!(count("leaks"), 0);
}

/// The parts of a TD's identity.
pub const IDENTITY: [&str; 4] = ["mrtd", "rtmrs", "attributes", "xfam"];

pub fn is_the_same(report: &serde_json::Value) {
    for part in IDENTITY {
        assert_eq!(report["equal"][part], true, "{part}: {report}");
    }
}

/// A `receive` that waits, and its address.
pub fn receiver(args: &[&str]) -> (Child, String) {
    receiver_at("127.0.0.1:0", args)
}

pub fn receiver_at(address: &str, args: &[&str]) -> (Child, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
        .args(["migrate", "receive", address])
        .args(["--memory", "256K", "--json"])
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

/// The reports of both ends of a TD's journey from one process to another.
pub fn td_between_processes(
    receiver: (Child, String),
    address: &str,
    args: &[&str],
) -> [serde_json::Value; 2] {
    between_processes("tdx", receiver, address, args)
}

/// The same of a guest of that technology.
pub fn between_processes(
    tech: &str,
    receiver: (Child, String),
    address: &str,
    args: &[&str],
) -> [serde_json::Value; 2] {
    let (mut child, _) = receiver;
    let send = ["send", address, "--tech", tech, "--timeout", "2m"];
    let sent = report(&[&send[..], args].concat());
    let out = child.wait_with_output_of_stdout();
    [sent, serde_json::from_slice(&out).unwrap()]
}

/// A TD arrived with its identity.
pub fn arrived(reports: &[serde_json::Value; 2]) {
    arrived_with_its_memory(reports);
    reports.iter().for_each(is_the_same);
}

pub fn arrived_with_its_memory([sent, received]: &[serde_json::Value; 2]) {
    let count = |report: &serde_json::Value, name: &str| report[name].as_u64().unwrap();
    let first = count(received, "count_first_at_target");
    assert!(first > count(sent, "count_at_source"), "{sent} {received}");
    assert_eq!(received["pages_as_written"], 63);
    for report in [sent, received] {
        assert_eq!(count(report, "leaks"), 0);
    }
}

/// A frame of a protocol, by the protocol's magic number and the frame's kind, after which a link is cut.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Last {
    magic: &'static [u8; 4],
    kind: u8,
    /// It goes to the source, which is cut off after it; the others are the source's, which hears no answer.
    is_answer: bool,
}

impl Last {
    const fn of_source(magic: &'static [u8; 4], kind: u8) -> Self {
        Self {
            magic,
            kind,
            is_answer: false,
        }
    }

    const fn of_target(kind: u8) -> Self {
        Self {
            is_answer: true,
            ..Self::of_source(b"KOMT", kind)
        }
    }

    /// The source of a TD ends a round.
    pub const ROUND_END: Self = Self::of_source(b"KOMT", 6);
    /// It says that only the start token is left.
    pub const PREPARE: Self = Self::of_source(b"KOMT", 8);
    /// It gives its TD up.
    pub const START: Self = Self::of_source(b"KOMT", 10);
    /// The target owns the TD.
    pub const DONE: Self = Self::of_target(11);

    /// Of a post-copy: a turn of the source, and that it sent everything.
    pub const LEFT: Self = Self::of_source(b"KOMT", 20);
    pub const COMPLETE: Self = Self::of_source(b"KOMT", 21);
    /// The target runs the TD, and asks for pages.
    pub const RUNNING: Self = Self::of_target(19);
    pub const WANTED: Self = Self::of_target(22);

    /// The source of an SNP guest sends a page, says that it sent everything, and gives the guest up; the target says that it has
    /// everything.
    pub const OF_SNP: [Self; 4] = [
        Self::of_source(b"KOMN", 6),
        Self::of_source(b"KOMN", 7),
        Self::of_source(b"KOMN", 9),
        Self {
            is_answer: true,
            ..Self::of_source(b"KOMN", 8)
        },
    ];

    /// The source of an SEV guest sends a page, ends a round, and says that it sent everything.
    pub const OF_SEV: [Self; 3] = [
        Self::of_source(b"KOMS", 6),
        Self::of_source(b"KOMS", 10),
        Self::of_source(b"KOMS", 12),
    ];
}

/// Carries connections to `to`, and counts them. The first one is cut after that frame.
pub fn cutting_proxy(to: String, last: Last) -> (String, Arc<AtomicUsize>) {
    cutting_proxy_of(to, last, usize::MAX)
}

/// The same for so many connections; those that come later are closed.
pub fn cutting_proxy_of(to: String, last: Last, most: usize) -> (String, Arc<AtomicUsize>) {
    let waiting = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = waiting.local_addr().unwrap().to_string();
    let links = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&links);
    std::thread::spawn(move || {
        for near in waiting.incoming() {
            let before = counted.fetch_add(1, Ordering::SeqCst);
            if before >= most {
                continue;
            }
            let cuts = (before == 0).then_some(last);
            let (near, far) = (near.unwrap(), TcpStream::connect(&to).unwrap());
            let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            let back_cuts = cuts.filter(|last| last.is_answer);
            std::thread::spawn(move || forward(back_from, back_to, back_cuts));
            forward(near, far, cuts.filter(|last| !last.is_answer));
        }
    });
    (address, links)
}

/// Carries bytes one way. With `last` it carries frames, up to that one.
pub fn forward(mut from: TcpStream, mut to: TcpStream, last: Option<Last>) {
    let carried = match last {
        None => std::io::copy(&mut from, &mut to).map(drop),
        Some(last) => frames(&mut from, &mut to, last),
    };
    // An end that hung up is no failure of the proxy.
    let _ = carried;
    let _ = from.shutdown(Shutdown::Both);
    // What was carried may still be read.
    let _ = to.shutdown(Shutdown::Write);
}

pub fn frames(from: &mut TcpStream, to: &mut TcpStream, last: Last) -> std::io::Result<()> {
    loop {
        let mut frame = vec![0; 36];
        from.read_exact(&mut frame)?;
        let length = u32::from_le_bytes(frame[16..20].try_into().unwrap());
        frame.resize(36 + length as usize, 0);
        from.read_exact(&mut frame[36..])?;
        let is_last = frame.starts_with(last.magic) && frame[5] == last.kind;
        if is_last && !last.is_answer {
            // The source hears no answer.
            from.shutdown(Shutdown::Both)?;
        }
        to.write_all(&frame)?;
        if is_last {
            return Ok(());
        }
    }
}

/// A TD that does not leave by that address, and runs on.
pub fn stays(address: &str) {
    stays_with(address, &[]);
}

/// The same with further arguments. Returns what is said.
pub fn stays_with(address: &str, args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_kvm-ops"))
        .args(["migrate", "send", address, "--tech", "tdx"])
        .args(["--memory", "256K"])
        .args(args)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(6));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("the guest runs on at its source"), "{said}");
    said
}

pub trait StandardOutput {
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
