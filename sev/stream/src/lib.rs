#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

extern crate alloc;
extern crate kvm_ops_core as kvm_ops;

mod deadline;
mod ends;
mod error;
mod frame;
mod layout;
mod packet;
mod progress;
mod receiver;
mod record;
mod seal;
mod sender;

pub use deadline::Deadline;
pub use ends::{FrameContent, MigrateSource, MigrateTarget, Shape, VcpuContent};
pub use error::{FrameError, MigrateError, ProtocolError, Reason, Refusal};
pub use frame::MAX_BLOB;
pub use layout::{FrameSet, Layout};
pub use packet::{PACKET_HEADER, PAGE, Packet, PlatformCerts, SessionStart};
pub use progress::{Flow, Owner, Phase, Progress};
pub use receiver::{ReceiveLimits, Receiver};
pub use seal::StreamKey;
pub use sender::{SendLimits, Sender};
