//! Migration of SEV guests.
//!
//! Between VMs of one machine a context passes without a copy and without a command: moved or
//! mirrored in two halves ([`VmOps::release_enc_context`](kvm_ops::VmOps::release_enc_context)), or
//! under a one-time token ([`SevVm::local_send`](crate::SevVm::local_send), [`StagingTable`]).
//!
//! Between hosts, a guest's pages travel under a transport key that only the two firmwares know
//! (SEND_*, RECEIVE_*): [`Sender`] and [`Receiver`] carry them over a byte stream, and can be
//! cancelled, broken off and resumed without losing the guest. docs/migration.md tells the format
//! and the states.

mod account;
mod claim;
mod ends;
mod error;
mod firmware;
mod frame;
mod group;
mod incoming;
mod layout;
mod leave;
mod orphan;
mod outgoing;
mod progress;
mod receive;
mod record;
mod send;
mod staged;
mod staging;
mod sync;
mod transfer;

pub use account::KeyAccount;
pub use ends::{FrameContent, MigrateSource, MigrateTarget, Shape, VcpuContent};
pub use error::{FrameError, MigrateError, ProtocolError, Reason, Refusal};
pub use firmware::{Mailbox, Packet, PacketOf, PlatformCerts, SessionStart};
pub use frame::PACKET_HEADER;
pub use incoming::{Incoming, RegisterWriter};
pub use layout::{FrameSet, Layout};
pub use outgoing::{Outgoing, RegisterReader};
pub use progress::{Flow, Owner, Phase, Progress};
pub use receive::Receiver;
pub use send::{SendLimits, Sender};
pub use staged::Staged;
pub use staging::{MoveToken, StagingTable};

pub use transfer::ContextFacts;

pub(crate) use account::Charge;
pub(crate) use claim::{Claim, Claimed};
pub(crate) use group::Membership;
pub(crate) use leave::{drop_out, leave, lose};
pub(crate) use orphan::Orphan;
pub(crate) use transfer::{copy_context, move_context};
