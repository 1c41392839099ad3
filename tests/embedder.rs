//! An embedder's package outside of the workspace builds and passes its tests.

use std::process::Command;

#[test]
fn an_out_of_tree_back_end_joins_an_enum_of_ours_and_passes_the_kit() {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/embedder/Cargo.toml");
    let target = concat!(env!("CARGO_TARGET_TMPDIR"), "/embedder");
    let output = Command::new(env!("CARGO"))
        .args([
            "test",
            "--quiet",
            "--locked",
            "--manifest-path",
            manifest,
            "--target-dir",
            target,
        ])
        // The settings of the outer cargo apply to the outer package only.
        .env_remove("CARGO_MANIFEST_DIR")
        .env_remove("RUSTFLAGS")
        .output()
        .expect("cargo starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("4 passed"), "{text}");
}
