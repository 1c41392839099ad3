//! Live migration of a TD between hosts: the host's side.
//!
//! | file | what it holds |
//! |---|---|
//! | `bundle` | a bundle as it travels: MBMD, entries, MACs, pages |
//! | `entry` | entries of GPA lists |
//! | `frames` | sets of frames |
//! | `journey` | what a TD knows of its migration: pages to send, pages blocked for writing |
//! | `follow` | writes of the guest while its pages travel |
//! | `lane` | the pages of host memory through which the streams' bundles pass |
//! | `service` | the migration TD, and streams |
//! | `outgoing`, `pages`, `restore` | the TD that leaves; its pages; the way back |
//! | `incoming`, `adopt` | the TD that comes; its pages |
//! | `record` | the records of the protocol that carries a TD over a byte stream |
//! | `sender`, `receiver` | its two ends |
//! | `sending`, `rest` | one link's part at the source; what travels last |
//! | `receiving` | one link's part at the target |
//! | `taking_over` | the start token at the target |
//! | `post_copy` | pages that follow a guest over the stream, at both ends |
//! | `unconfirmed` | records that are sent again after a broken link |
//! | `threads` | streams side by side |
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
mod pages;
mod post_copy;
mod receiver;
mod receiving;
mod record;
mod rest;
mod restore;
mod sender;
mod sending;
mod service;
mod taking_over;
mod threads;
mod unconfirmed;

pub use crate::run::ExitState;
pub use bundle::{Bundle, BundleError, BundleKind, MBMD_BYTES};
pub use incoming::Incoming;
pub use kvm_ops_wire::{
    Deadline, Flow, FrameError, Layout, MigrateError, Owner, Phase, Progress, ProtocolError,
    Reason, Refusal, StreamKey,
};
pub use lane::BATCH;
pub use outgoing::{Carried, Outgoing};
pub use receiver::{ReceiveLimits, Receiver};
pub use record::Shape;
pub use sender::{ExitStates, SendLimits, Sender};
pub use service::Binding;
pub use threads::{OneThread, Threads};

pub(crate) use journey::Journey;

/// The most streams of a migration here, each with its buffers. The module has up to 511.
pub const MAX_STREAMS: u16 = 16;
