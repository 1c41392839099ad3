//! `cargo bench`: rebuilds the program with branches kept off 32-byte boundaries, measures every
//! design, and writes target/figures/dispatch.json.
//!
//! The option matters on Intel processors with the JCC erratum (Skylake to Comet Lake): without it,
//! a branch's position in its cache line has more effect than the differences between designs.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    // `cargo test --benches` also runs this, and must not spend minutes on measurements.
    if !env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let manifest = env!("CARGO_MANIFEST_DIR");
    let target = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(manifest).join("../target"), PathBuf::from);
    let out = target.join("figures/dispatch.json");
    let done = Command::new(env!("CARGO"))
        .args([
            "run",
            "--release",
            "--quiet",
            "--package",
            "kvm-ops-bench",
            "--target-dir",
        ])
        .arg(target.join("aligned"))
        .args(["--", "time", "--out"])
        .arg(&out)
        .current_dir(manifest)
        .env(
            "RUSTFLAGS",
            "-Cllvm-args=-x86-branches-within-32B-boundaries --cfg kvm_ops_bench_aligned",
        )
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status();
    match done {
        Ok(status) if status.success() => {
            println!("figures: {}", out.display());
            println!("for the report: copy them to bench/figures/MACHINE/dispatch.json, then");
            println!("  cargo run --release -p kvm-ops-bench -- report");
            ExitCode::SUCCESS
        }
        Ok(status) => {
            eprintln!("error: the measurement failed: {status}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: cannot run cargo: {error}");
            ExitCode::FAILURE
        }
    }
}
