//! The client of the kernel's interface, over the server: `create` on a `KvmHost` that opens the library's `/dev/kvm`.
//!
//! Each test runs itself again with the library in front of libc. The log of that run shows the order of the calls.

#[path = "../common/mod.rs"]
mod common;
mod conversions;
mod errors;
mod guest;
mod journey;
mod kit;
mod launch;
mod machine;
mod moves;
mod offer;
mod order;
mod private;
mod random;
mod requests;
mod td;
