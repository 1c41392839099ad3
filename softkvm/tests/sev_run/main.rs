//! `KVM_RUN` of SEV, SEV-ES and SNP guests. Where a test re-tells a case of the kernel's self-tests, it names it.

mod commands;
#[path = "../common/mod.rs"]
mod common;
mod dirty;
mod exits;
mod guest;
mod hosts;
mod local;
mod memory;
mod mirror;
mod secret;
mod smoke;
