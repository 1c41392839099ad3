//! Prints which command does what in which state, by trying each on the running model:
//! `cargo run --example states > docs/states.md`.

#[path = "../../tests/common/mod.rs"]
mod common;
mod table;

fn main() {
    print!("{}", table::page());
}
