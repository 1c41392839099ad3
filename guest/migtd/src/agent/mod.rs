//! Migration agents of SNP guests.
//!
//! Firmware gives the context of a guest that is swapped out to the guest's migration agent alone, another SNP guest on the same
//! platform, and takes one from any guest. Two agents carry a context from platform to platform: they judge each other and agree on
//! keys by the exchange that migration TDs use, with an attestation report of each in place of a quote.
//!
//! ```text
//!  source's agent                                       target's agent
//!    | Hello: ephemeral key on P-256 --------------------->|  MSG_REPORT_REQ
//!    |<------------- Reply: ephemeral key, report, table |
//!    | authentic? for this exchange? as the policy?         |
//!    | MSG_REPORT_REQ                                        |
//!    | SourceKey: report, table, sealed ------------------>|  authentic? for this exchange? as the policy?
//!    |<------------------------------ TargetKey: sealed |
//!    | Done: sealed -------------------------------------->|
//!    | MSG_EXPORT_REQ: the context, sealed --------------->|  MSG_IMPORT_REQ
//! ```
//!
//! The table has the certificates behind the report and the root's revocation list. REPORT_DATA is over both ephemeral keys, which are new at each exchange and stand for nonces, and over the side. The keys that
//! come out of it seal contexts, and authenticate the frames between the hosts: [`SnpAgent::exchange`] gives the host that
//! one key. The context has the guest's VMRK too, so its derived keys go with it.
//!
//! The guest is software's: it asks its host for messages to be carried by hypercalls of its own, where a real one uses GHCB exits.

mod host;
mod io;
mod judge;
mod policy;
mod program;
mod request;

pub use host::SnpAgent;
pub use judge::AgentVerifier;
pub use policy::{AgentPolicy, LeastTcb};
pub use program::AgentProgram;
