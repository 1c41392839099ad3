//! Replays vector files and folders: `cargo run --features conform --example conform -- PATH...`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let paths: Vec<_> = std::env::args_os().skip(1).collect();
    if paths.is_empty() {
        eprintln!("usage: conform PATH...");
        return ExitCode::from(2);
    }
    let summary = soft_amd_sp::conform::replay_paths(paths);
    println!("{summary}");
    if summary.is_success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
