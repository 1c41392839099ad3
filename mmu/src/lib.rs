#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

pub use kvm_ops_core::{Gfn, Gpa, Level, Pfn, Privacy, PrivateSpte, SharedMask, SpteChange};
