#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

extern crate alloc;
extern crate kvm_ops_core as kvm_ops;

mod deadline;
mod error;
mod frame;
mod layout;
mod migrate_error;
mod payload;
mod progress;
mod ready;
mod seal;

pub use deadline::Deadline;
pub use error::{FrameError, WireError};
pub use frame::{HEADER, Kinds, Wire};
pub use layout::{FrameSet, Layout, MAX_RANGES};
pub use migrate_error::{MigrateError, ProtocolError, Reason, Refusal};
pub use payload::Fields;
pub use progress::{Flow, Owner, Phase, Progress};
pub use ready::TargetState;
pub use seal::{Challenge, Direction, Seal, StreamKey, TAG, next_challenge};
