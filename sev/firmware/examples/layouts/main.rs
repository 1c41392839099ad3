//! Prints number, length and fields of every command buffer:
//! `cargo run --example layouts > docs/layouts.md`.

mod page;

fn main() {
    print!("{}", page::page());
}
