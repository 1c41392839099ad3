//! Runs the program, and checks the rules that hold for every run.

#![allow(dead_code)] // Each test file uses a part of it.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The output and exit code of a run.
pub(crate) struct Ran {
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) code: Option<i32>,
}

/// The program, ready for arguments.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvm-ops"));
    command.stdin(Stdio::null());
    command
}

/// Runs the program to its end.
pub(crate) fn run(args: &[&str]) -> Ran {
    check(args, program().args(args).output().expect("it runs"))
}

/// Runs the program with a text on standard input.
pub(crate) fn run_with_input(args: &[&str], input: &str) -> Ran {
    let mut child = program()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    // The program may end before it has read everything.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    check(args, child.wait_with_output().expect("it ends"))
}

/// Checks that a run did not panic and wrote no escape codes into a pipe.
pub(crate) fn check(args: &[&str], output: Output) -> Ran {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
    let ran = Ran {
        out: text(output.stdout),
        err: text(output.stderr),
        code: output.status.code(),
    };
    assert!(!ran.err.contains("panicked"), "{args:?}: {}", ran.err);
    for stream in [&ran.out, &ran.err] {
        assert!(
            !stream.contains('\x1b'),
            "{args:?} writes escape codes: {stream}"
        );
    }
    ran
}

/// Runs the program, which must end within a minute: a file that blocks or never ends must not hold it.
pub(crate) fn run_bounded(args: &[&str]) -> Ran {
    let (out, err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut child = program()
        .args(args)
        .stdout(out.try_clone().unwrap())
        .stderr(err.try_clone().unwrap())
        .spawn()
        .expect("it runs");
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("it can be waited for") {
            break status;
        }
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().expect("it can be killed");
            panic!("{args:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let read = |mut file: std::fs::File| {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    };
    let (stdout, stderr) = (read(out), read(err));
    check(
        args,
        Output {
            status,
            stdout,
            stderr,
        },
    )
}

/// Returns true if `/dev/kvm` can be opened; otherwise prints why a test is skipped.
pub(crate) fn has_kvm() -> bool {
    let open = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = &open {
        println!("skipped: /dev/kvm cannot be opened: {error}");
    }
    open.is_ok()
}

/// The hosts that run machine code here: the software platform, and `/dev/kvm` where it can be opened.
pub(crate) fn hosts() -> impl Iterator<Item = &'static str> {
    ["sim", "kvm"]
        .into_iter()
        .filter(|host| *host == "sim" || has_kvm())
}

/// The fleet files in the repository.
pub(crate) fn examples() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fleets");
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .expect("the examples")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files
}

/// The text at which firmware has reached its boot manager.
pub(crate) const PROMPT: &str = "Press any key to enter the Boot Manager Menu";

/// Firmware for TDs: that of Debian's package ovmf-inteltdx, or the file that `KVM_OPS_TDVF` names.
pub(crate) fn tdvf() -> Option<String> {
    named_or("KVM_OPS_TDVF", "/usr/share/ovmf/OVMF.inteltdx.ms.fd")
}

/// Firmware for SEV, SEV-ES and SNP guests: that of Debian's package ovmf-amdsev, or the file that `KVM_OPS_OVMF_SEV` names.
pub(crate) fn ovmf_sev() -> Option<String> {
    named_or("KVM_OPS_OVMF_SEV", "/usr/share/ovmf/OVMF.amdsev.fd")
}

/// The end of the work of [`ovmf_sev`]'s boot manager, where nothing can be booted.
pub(crate) const NOTHING_TO_BOOT: &str = "BdsDxe: No bootable option was found.";

/// The file that a variable of the environment names. `None` and the reason on the test's output if there is none.
pub(crate) fn named(variable: &str) -> Option<String> {
    let found = std::env::var(variable).ok();
    let found = found.filter(|path| Path::new(path).is_file());
    if found.is_none() {
        println!("skipped: {variable} names no file");
    }
    found
}

/// The file that a variable of the environment names, or else that of a package. `None` and the reason on the test's output if it
/// is not there.
pub(crate) fn named_or(variable: &str, packaged: &str) -> Option<String> {
    let named = std::env::var(variable).ok();
    let path = named.unwrap_or_else(|| packaged.into());
    if Path::new(&path).is_file() {
        return Some(path);
    }
    println!("skipped: no {path}");
    None
}

/// The image of Debian's package ovmf, or the file that `KVM_OPS_OVMF` names.
pub(crate) fn ovmf() -> Option<String> {
    let named = std::env::var("KVM_OPS_OVMF").ok();
    let known = ["/usr/share/ovmf/OVMF.fd", "/usr/share/OVMF/OVMF.fd"].map(String::from);
    let found = named
        .into_iter()
        .chain(known)
        .find(|path| Path::new(path).is_file());
    if found.is_none() {
        println!("skipped: no OVMF image; install the package ovmf or set KVM_OPS_OVMF");
    }
    found
}
