//! `KVM_RUN` of SEV, SEV-ES and SNP guests. Where a test re-tells a case of the kernel's self-tests, it names it.

#[path = "../common/mod.rs"]
mod common;
mod exits;
mod guest;
mod hosts;
mod local;
mod memory;
mod secret;
mod smoke;
