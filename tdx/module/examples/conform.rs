//! Replays recorded transcripts: `conform [--encrypt] PATH...`. Exits with 1 if any differs.

use soft_tdx_module::conform::{Options, replay_paths};
use std::process::ExitCode;

fn main() -> ExitCode {
    let (flags, paths): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|a| a.starts_with("--"));
    let options = Options {
        encrypt_memory: flags.iter().any(|f| f == "--encrypt"),
    };
    let summary = replay_paths(&paths, options);
    println!("{summary}");
    if summary.is_success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
