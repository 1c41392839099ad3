#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

extern crate alloc;
extern crate kvm_ops_core as kvm_ops;

mod ends;
mod frame;
mod packet;
mod receiver;
mod record;
mod sender;

pub use ends::{FrameContent, MigrateSource, MigrateTarget, Shape, VcpuContent};
pub use frame::MAX_BLOB;
pub use kvm_ops_wire::{
    Deadline, Fields, Flow, FrameError, FrameSet, Layout, MigrateError, Owner, Phase, Progress,
    ProtocolError, Reason, Refusal, StreamKey,
};
pub use packet::{PACKET_HEADER, PAGE, Packet, PlatformCerts, SessionStart};
pub use receiver::{ReceiveLimits, Receiver};
pub use sender::{SendLimits, Sender};

pub(crate) type Result<T> = core::result::Result<T, MigrateError>;

/// Names the operation that failed.
pub(crate) fn at<T>(operation: &'static str, result: kvm_ops::Result<T>) -> Result<T> {
    MigrateError::at(operation, result)
}
