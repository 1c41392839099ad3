#!/bin/sh
# Builds and runs the fuzz target without cargo-fuzz: run.sh [SECONDS]
set -eu
cd "$(dirname "$0")"
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions=on -Coverflow-checks=on"
# A target given explicitly keeps the instrumentation out of build scripts.
target=$(rustc -vV | sed -n 's/^host: //p')
cargo build --release --target "$target"
mkdir -p corpus/calls
exec "${CARGO_TARGET_DIR:-target}/$target/release/calls" -max_total_time="${1:-60}" -max_len=8192 corpus/calls
