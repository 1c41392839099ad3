//! Guests and hosts for the tests, over the software platforms. No interface: each test uses a part.
#![allow(dead_code, unreachable_pub)]

pub mod snp;
pub mod td;
