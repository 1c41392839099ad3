//! Live migration of a TD between hosts: the host's side.
//!
//! | file | what it holds |
//! |---|---|
//! | `bundle` | a bundle as it travels: MBMD, entries, MACs, pages |
//! | `entry` | entries of GPA lists |
//! | `frames` | sets of frames |
//! | `journey` | what a TD knows of its migration: pages to send, pages blocked for writing |
//! | `follow` | writes of the guest while its pages travel |
//! | `lane` | the pages of host memory through which one stream's bundles pass |
//! | `service` | the migration TD, and streams |
//! | `outgoing`, `restore` | the TD that leaves; the way back |
//! | `incoming`, `adopt` | the TD that comes; its pages |
//!
//! The module encrypts and authenticates every bundle, keeps their order, and lets a TD run on one
//! host only. docs/migration.md has the order of calls and the rules.

mod adopt;
mod bundle;
mod entry;
mod follow;
mod frames;
mod incoming;
mod journey;
mod lane;
mod outgoing;
mod restore;
mod service;

pub use bundle::{Bundle, BundleError, BundleKind, MBMD_BYTES};
pub use incoming::Incoming;
pub use lane::BATCH;
pub use outgoing::{Carried, Outgoing};
pub use service::Binding;

pub(crate) use journey::Journey;

/// The most streams of a migration here, each with its buffers. The module has up to 511.
pub const MAX_STREAMS: u16 = 16;
