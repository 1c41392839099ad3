//! Cargo and other programs, for tests that look at compiled code.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Cargo, in the root of the repository.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    // Compiler flags of the tests (coverage, other processors) and incremental builds would change the code under inspection.
    cargo
        .current_dir(ROOT)
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_INCREMENTAL")
        .env_remove("CARGO_PROFILE_RELEASE_LTO")
        // The tests look at instructions and symbols, which are there without.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "none");
    cargo
}

/// The directory for builds of the test of that name.
pub(crate) fn target_dir(test: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(test)
}

/// The standard output of a command that succeeds.
pub(crate) fn stdout(mut command: Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        status.success(),
        "{command:?}: {status}\n{}",
        String::from_utf8_lossy(&stderr)
    );
    String::from_utf8(stdout).expect("tools print UTF-8")
}

/// True if the tool is installed.
pub(crate) fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        println!("skipped: {tool} is not installed");
    }
    found
}
