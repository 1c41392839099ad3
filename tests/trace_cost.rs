//! The cost of spans and events on the hot paths of a TD, in instructions.
//!
//! One program (bench/trace) runs private faults and exits of a TD over ports that do nothing. It is
//! built three times: with tracing as it is, with every level compiled out, and in a workspace of its
//! own where the macros of tracing expand to nothing. valgrind counts the instructions inside of the
//! hot function, which are the same in every run. If a tool is missing, the test prints that and
//! passes.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tools::{cargo, have, stdout, target_dir};

const PAGES: u64 = 512;
const RUNS: u64 = 1000;

/// The most instructions that an event costs which nobody listens to: the compare of the level, and
/// the operands kept where the event could read them. With rustc 1.95 a fault has 22 more, a run 46
/// more, for a span and an event.
const MOST_FOR_A_FAULT: f64 = 32.0;
const MOST_FOR_A_RUN: f64 = 64.0;

/// Builds the program in a separate directory for each `name`, and returns its path. One unit, so that
/// what is counted does not depend on how the compiler splits the program.
fn build(name: &str, arguments: &[&str]) -> PathBuf {
    let target = target_dir("trace_cost").join(name);
    let mut build = cargo();
    build.args(["build", "--release", "--quiet", "--locked"]);
    build.args(arguments).arg("--target-dir").arg(&target);
    build.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
    stdout(build);
    target.join("release/kvm-ops-trace-cost")
}

/// With tracing as it is.
fn dynamic() -> PathBuf {
    build("dynamic", &["--package", "kvm-ops-trace-cost"])
}

/// With every level compiled out.
fn off() -> PathBuf {
    let arguments = ["--package", "kvm-ops-trace-cost", "--features", "off"];
    build("off", &arguments)
}

/// As if the library had never heard of tracing.
fn untraced() -> PathBuf {
    let manifest = "bench/trace/untraced/Cargo.toml";
    build("untraced", &["--manifest-path", manifest])
}

/// The instructions of the hot function for that many pages and runs.
fn count(program: &Path, pages: u64, runs: u64) -> f64 {
    let file = program.with_extension(format!("{pages}-{runs}.out"));
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--quiet"]);
    valgrind.arg("--toggle-collect=kvm_ops_trace_hot");
    valgrind.arg(format!("--callgrind-out-file={}", file.display()));
    valgrind
        .arg(program)
        .args([pages.to_string(), runs.to_string()]);
    stdout(valgrind);
    let text = fs::read_to_string(&file).expect("callgrind writes its file");
    let totals = text.lines().find_map(|line| line.strip_prefix("totals: "));
    let count = totals.and_then(|totals| totals.trim().parse().ok());
    count.expect("callgrind counts instructions")
}

#[test]
fn compiled_out_events_cost_no_instruction_and_others_a_bounded_number_where_nobody_listens() {
    if !have("valgrind") {
        return;
    }
    let (off, untraced, dynamic) = (off(), untraced(), dynamic());
    for (pages, runs) in [(PAGES, 0), (1, RUNS), (PAGES, RUNS)] {
        let (off, untraced) = (count(&off, pages, runs), count(&untraced, pages, runs));
        assert!(
            untraced > (pages + runs) as f64 * 100.0,
            "the path was counted"
        );
        assert_eq!(off, untraced, "{pages} pages, {runs} runs: off, untraced");
    }
    let more = |pages, runs| count(&dynamic, pages, runs) - count(&untraced, pages, runs);
    let fault = more(PAGES, 0) / PAGES as f64;
    let run = (more(1, RUNS) - more(1, 0)) / RUNS as f64;
    println!("nobody listens: {fault:.1} instructions more for a fault, {run:.1} for a run");
    assert!(fault <= MOST_FOR_A_FAULT, "{fault}");
    assert!(run <= MOST_FOR_A_RUN, "{run}");
}
