//! Prints which command does what in which state, by trying each on the running model, beside what
//! public sources say: `cargo run -p soft-amd-sp --example states > docs/states.md`.

#[path = "../../tests/common/mod.rs"]
mod common;
#[allow(dead_code)] // What the test of this page uses.
mod table;

fn main() {
    print!("{}", table::Comparison::new().page());
}
