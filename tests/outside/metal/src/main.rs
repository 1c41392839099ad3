//! A kernel where no operating system is. Where one is, there is nothing to boot.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod kernel;

#[cfg(not(target_os = "none"))]
fn main() {
    println!("build this for x86_64-unknown-none");
}
