//! Tests that each kind of mistake has the exit code of the one table, whatever the command.

mod common;

use std::path::Path;
use std::process::Command;

use common::{hosts, run, run_bounded};

/// A directory with a file of each kind of trouble.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        files.write("text", b"root:x:0:0:root:/root:/bin/sh\n");
        files.write("ud2", &[0x0f, 0x0b]);
        files.write("hlt", &[0xf4]);
        files.write("bad.toml", b"[[vm]]\nname = 1\n");
        files.write(
            "crash.toml",
            b"[[vm]]\nname = \"a\"\nimage = \"ud2\"\nformat = \"flat\"\n",
        );
        files.write("gone.toml", b"[[vm]]\nname = \"a\"\nimage = \"gone\"\n");
        files.write("text.toml", b"[[vm]]\nname = \"a\"\nimage = \"text\"\n");
        files.write(
            "host.toml",
            b"[[vm]]\nname = \"a\"\nkind = \"tdx\"\nhost = \"kvm\"\npayload = \"hello\"\n",
        );
        files.write(
            "keys.toml",
            b"[[vm]]\nname = \"a\"\nkind = \"tdx\"\ncount = 500\npayload = \"hello\"\n",
        );
        std::fs::create_dir(files.path("empty")).unwrap();
        files
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// Runs the program with the words, in which `@name` is a file of the directory.
    fn run(&self, command: &str) -> common::Ran {
        let words: Vec<_> = command
            .split_whitespace()
            .map(|word| match word.strip_prefix('@') {
                Some(name) => self.path(name),
                None => word.to_owned(),
            })
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        run_bounded(&words)
    }

    fn ends(&self, commands: &[&str], code: i32) {
        for command in commands {
            let ran = self.run(command);
            assert_eq!(ran.code, Some(code), "{command}: {}{}", ran.out, ran.err);
        }
    }
}

#[test]
fn a_wrong_command_line_is_2_everywhere() {
    Files::new().ends(
        &[
            "run @hlt --format elff",
            "run @hlt --format flat --memory 5T",
            "run @hlt --format flat --memory 5000",
            "run @hlt --format flat --cmdline quiet",
            "run @hlt --format flat --memory 4K",
            "run --tech tdx --cmdline quiet",
            "run",
            "fleet @bad.toml",
            "measure snp @text",
            "measure sev",
            "attest verify @text",
            "attest new @new --report-data xyz",
            "migrate receive nonsense",
            "migrate send 127.0.0.1:99999",
            "migrate hosts --memory 5000",
            "conform tdx",
            "completions tcsh",
            "with --amd",
            "man --onto x",
            "doctor --yaml",
        ],
        2,
    );
}

#[test]
fn a_file_that_is_not_what_it_should_be_is_5_everywhere() {
    Files::new().ends(
        &[
            "run @gone",
            "run @text",
            "run @hlt",
            "run @empty",
            "run --tech tdx @gone",
            "run --tech tdx @text",
            "fleet @gone",
            "fleet @empty",
            "fleet @gone.toml",
            "measure tdx @gone",
            "measure tdx @text",
            "measure sev @gone",
            "measure sev @text",
            "measure seves @text --vcpus 1 --vcpu-type EPYC",
            "measure snp @text --vcpus 1 --vcpu-type EPYC",
            "attest verify @gone --cert-chain @text",
            "attest verify @text --cert-chain @gone",
            "attest verify @text --cert-chain @text --root @text",
            "attest verify @text --collateral @gone",
            "migrate hosts --key @gone",
            "migrate hosts --key @text",
            "conform tdx @gone",
            "conform sev @gone",
            "conform tdx @empty",
            "conform sev @empty",
        ],
        5,
    );
}

#[test]
fn files_that_block_or_never_end_are_refused_at_once() {
    let files = Files::new();
    let made = Command::new("mkfifo").arg(files.path("fifo")).status();
    if !made.is_ok_and(|status| status.success()) {
        println!("skipped: mkfifo makes no pipe here");
        return;
    }
    for file in ["@fifo", "/dev/zero", "/dev/null"] {
        for command in [
            "run FILE",
            "run @hlt --format elf --initrd FILE",
            "run --tech tdx FILE",
            "fleet FILE",
            "measure tdx FILE",
            "measure sev FILE",
            "attest verify FILE --cert-chain @text",
            "attest verify @text --cert-chain FILE",
            "attest verify @text --collateral FILE",
            "migrate hosts --key FILE",
            "conform tdx FILE",
            "conform sev FILE",
        ] {
            let ran = files.run(&command.replace("FILE", file));
            assert_eq!(ran.code, Some(5), "{command} {file}: {}", ran.err);
            assert!(ran.err.contains("not a regular file"), "{}", ran.err);
        }
    }
}

/// A file of 300 MiB of zeros, packed by gzip, in 300 KiB.
#[test]
fn a_file_that_unpacks_without_end_is_refused() {
    let files = Files::new();
    let script = format!("head -c 300M /dev/zero | gzip > {}", files.path("bomb.gz"));
    let packed = Command::new("sh").args(["-c", &script]).status();
    if !packed.is_ok_and(|status| status.success()) {
        println!("skipped: there is no gzip");
        return;
    }
    for platform in ["tdx", "sev"] {
        let ran = files.run(&format!("conform {platform} @bomb.gz"));
        assert_eq!(ran.code, Some(1), "{platform}: {}", ran.err);
        let words = "unpacks to more than 0x10000000 bytes";
        assert!(ran.out.contains(words), "{platform}: {}", ran.out);
    }
    files.ends(
        &[
            "measure sev @bomb.gz",
            "run @bomb.gz",
            "run --tech tdx @bomb.gz",
        ],
        5,
    );
}

#[test]
fn what_host_system_or_peer_refuse_is_6_everywhere() {
    let files = Files::new();
    files.ends(
        &[
            "run --tech tdx --irqchip full",
            "fleet @host.toml",
            "fleet @keys.toml",
            "man --into @gone/man",
            "attest new @text/new",
            "migrate send 127.0.0.1:1 --timeout 5s",
            "migrate receive 192.0.2.1:1",
            "migrate hosts --memory 200G",
        ],
        6,
    );
}

#[test]
fn keys_that_are_used_up_come_with_a_hint() {
    let ran = Files::new().run("fleet @keys.toml");
    for words in [
        "no free KeyID or ASID",
        "take fewer at once",
        "no VM was started",
    ] {
        assert!(ran.err.contains(words), "{words}: {}", ran.err);
    }
}

#[test]
fn memory_that_cannot_be_mapped_is_found_before_a_machine_is_built() {
    let files = Files::new();
    files.write(
        "two.toml",
        b"[defaults]\nmemory = \"8G\"\n[[vm]]\nname = \"a\"\npayload = \"hello\"\ncount = 2\n",
    );
    files.write(
        "large.toml",
        b"[[vm]]\nname = \"a\"\npayload = \"hello\"\nmemory = \"5T\"\n",
    );
    let ran = files.run("fleet @large.toml");
    assert_eq!(ran.code, Some(2), "{}", ran.err);
    assert!(
        ran.err.contains("4:10") && ran.err.contains("more than 1T"),
        "{}",
        ran.err
    );
    // 4 GiB of address space for each process.
    let limited = |arguments: &str| {
        let kvm_ops = env!("CARGO_BIN_EXE_kvm-ops");
        let script = format!("ulimit -v 12582912 && exec {kvm_ops} {arguments}");
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        common::check(&[arguments], output)
    };
    for (arguments, words) in [
        (
            format!("fleet {}", files.path("two.toml")),
            "the fleet has more memory than",
        ),
        (
            "run --tech tdx --memory 20G".to_owned(),
            "that this process may map",
        ),
    ] {
        let ran = limited(&arguments);
        assert_eq!(ran.code, Some(6), "{arguments}: {}", ran.err);
        assert!(
            ran.err.contains(words) && ran.err.contains("ulimit -v"),
            "{}",
            ran.err
        );
    }
}

#[test]
fn a_guest_that_crashes_is_3_everywhere() {
    Files::new().ends(
        &[
            "run @ud2 --format flat --memory 1M",
            "run @ud2 --format flat --memory 1M --host sim",
            "fleet @crash.toml",
            "fleet @crash.toml --host sim",
        ],
        3,
    );
}

#[test]
fn evidence_and_vectors_that_fail_are_1() {
    let files = Files::new();
    assert_eq!(files.run("attest new @evidence").code, Some(0));
    files.write("vectors.json", b"{}");
    files.ends(
        &[
            "attest verify @evidence --root software",
            "attest verify @evidence",
            "conform sev @vectors.json",
            "conform tdx @vectors.json",
        ],
        1,
    );
}

/// The codes and meanings of the table in `--help`.
fn table() -> Vec<(String, String)> {
    let help = run(&["--help"]).out;
    let (_, table) = help.split_once("Exit codes:\n").expect("the table");
    let mut rows: Vec<(String, String)> = Vec::new();
    for line in table.lines().map(str::trim).filter(|line| !line.is_empty()) {
        match line.split_once(' ') {
            Some((code, meaning)) if code.parse::<u8>().is_ok() => {
                rows.push((code.to_owned(), meaning.trim().to_owned()));
            }
            _ => {
                // A line that the help has folded.
                let (_, meaning) = rows.last_mut().expect("a first row");
                meaning.push_str(&format!(" {line}"));
            }
        }
    }
    rows
}

#[test]
fn the_readme_and_every_page_of_the_manual_have_the_table_of_the_help() {
    let table = table();
    let codes: Vec<&str> = table.iter().map(|(code, _)| code.as_str()).collect();
    assert_eq!(codes, ["0", "1", "2", "3", "4", "5", "6", "130"]);
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    let pages = tempfile::tempdir().unwrap();
    let into = pages.path().to_str().unwrap();
    assert_eq!(run(&["man", "--into", into]).code, Some(0));
    for (code, meaning) in &table {
        let row = format!("| {code} | {meaning} |");
        assert!(readme.contains(&row), "{row}");
        for page in std::fs::read_dir(pages.path()).unwrap() {
            let page = std::fs::read_to_string(page.unwrap().path()).unwrap();
            let (_, section) = page.split_once("EXIT STATUS").expect("a section");
            let plain = section.replace("\\-", "-").replace("\\(aq", "'");
            assert!(
                plain.contains(&format!("{code}\n{meaning}")),
                "{code}: {section}"
            );
        }
    }
}

#[test]
fn every_table_and_report_has_json() {
    let files = Files::new();
    assert_eq!(files.run("attest new @evidence").code, Some(0));
    let vectors = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors");
    for command in [
        "doctor --json".to_owned(),
        "run --tech tdx --json".to_owned(),
        "attest new @more --json".to_owned(),
        "attest new @td --tech tdx --json".to_owned(),
        "attest verify @evidence --root software --json".to_owned(),
        "migrate move --json".to_owned(),
        format!("conform tdx {vectors}/tdx/sys.tar.zst --json"),
        format!("conform sev {vectors}/sev --json"),
    ] {
        let ran = files.run(&command);
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(&ran.out);
        assert!(
            parsed.is_ok_and(|value| value.is_object()),
            "{command}: {}",
            ran.out
        );
    }
    for host in hosts() {
        let ran = files.run(&format!(
            "run @hlt --format flat --memory 1M --json --host {host}"
        ));
        let report: serde_json::Value = serde_json::from_str(&ran.out).expect(&ran.out);
        assert_eq!(report["outcome"], "halted");
        assert_eq!(report["exit_code"], 0);
        assert_eq!(report["taken_for"]["stated"], true);
    }
}
