#![doc = include_str!("../README.md")]
#![no_std]

extern crate alloc;

mod attributes;
mod hooks;
mod lock;
mod mirror;
mod sync;

pub use attributes::Attributes;
pub use hooks::{MirrorHooks, Removal};
pub use kvm_ops_core::{
    Error, Gfn, Gpa, Level, Pfn, Privacy, PrivateSpte, Result, SharedMask, SpteChange,
};
pub use lock::{ReadGuard, ReaderLock, WriteGuard};
pub use mirror::{EmptyTables, Held, Lookup, Mapped, Mirror, Stats, Zapped};
