#![doc = include_str!("../README.md")]
#![no_std]

extern crate alloc;

mod arena;
mod attributes;
mod bulk;
#[cfg(not(loom))]
mod chunks;
mod entry;
mod hooks;
mod list;
mod lock;
#[cfg(all(loom, test))]
mod loom_models;
mod mirror;
#[cfg(loom)]
mod model_nodes;
mod mutex;
mod node;
mod owner;
mod range;
mod resize;
mod slots;
mod sync;
mod visit;

pub use attributes::Attributes;
pub use bulk::Cursor;
pub use hooks::{MirrorHooks, Removal};
pub use kvm_ops_core::{
    Error, Gfn, Gpa, Level, Page, Pfn, PortId, Privacy, PrivateSpte, Result, SharedMask, SpteChange,
};
pub use list::{PageKind, Stats};
pub use lock::{ReadGuard, ReaderLock, WriteGuard};
pub use mirror::{Lookup, Mapped, Mirror};
pub use mutex::{Mutex, MutexGuard};
pub use range::{EmptyTables, Zapped};
pub use slots::Slots;
