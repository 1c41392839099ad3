//! Migration of SEV guests.
//!
//! Between VMs of one machine a context passes without a copy and without a command:
//! [`move_context`](kvm_ops::Backend::move_context) and
//! [`copy_context`](kvm_ops::Backend::copy_context) between two VMs of a program, or a one-time token
//! between programs ([`local_send`](kvm_ops::Backend::local_send)).
//!
//! Between hosts, a guest's pages travel under a transport key that only the two firmwares know
//! (SEND_*, RECEIVE_*). [`Outgoing`] and [`Incoming`] make a VM an end of the stream of
//! [`kvm_ops_sev_stream`], whose types are here too. SNP guests go swapped out, from a [`SnpSender`] to a [`SnpReceiver`].

mod account;
mod carry;
mod group;
mod incoming;
mod journey;
mod leave;
mod mailbox;
mod orphan;
mod outgoing;
mod range;
mod staged;
mod transfer;

pub use account::KeyAccount;
pub use carry::{MigrationAgent, SnpImage};
pub use incoming::{Incoming, RegisterWriter};
pub use journey::{SnpReceiver, SnpSender};
pub use kvm_ops_sev_stream::*;
pub use mailbox::{Mailbox, PacketOf};
pub use outgoing::{Outgoing, RegisterReader};
pub use transfer::ContextFacts;

pub(crate) use account::Charge;
pub(crate) use group::Membership;
pub(crate) use leave::{drop_out, leave, lose};
pub(crate) use orphan::Orphan;
pub(crate) use staged::{local_receive, local_send};
pub(crate) use transfer::{copy_context, is_plain_owner, move_context};
