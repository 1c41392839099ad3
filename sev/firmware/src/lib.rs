#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod attestation;
mod builder;
mod cipher;
pub mod command;
#[cfg(feature = "conform")]
pub mod conform;
pub mod crypto;
mod dump;
mod firmware;
mod identity;
mod inject;
mod machine;
pub mod measure;
pub mod message;
mod observe;
mod platform;
mod status;
mod sync;
mod vlek;
mod wire;

pub use builder::{BuildError, Builder, CpuidLimit, Features, TcbVersion};
pub use command::{Command, CommandStruct, SevPolicy, SnpPolicy};
pub use dump::{GuestInfo, RmpRange, Snapshot, SnpGuestInfo};
pub use firmware::asid::{AsidState, GuestId};
pub use firmware::rules::{GuestState, PlatformState, SnpState};
pub use identity::RootOfTrust;
pub use inject::{Failure, RandomFailures};
pub use machine::Instruction;
pub use machine::access::{AccessFault, GuestPage};
pub use machine::entry::{PageSize, PageState, RmpEntry, permission};
pub use machine::open::GuestFrame;
pub use machine::rmp_types::{GuestRmpError, RmpAdjust, RmpError, RmpUpdate};
pub use machine::turn::GuestTurn;
pub use observe::{Counters, Operation, TraceEntry};
pub use platform::Platform;
pub use status::Status;
pub use vlek::{VlekSeed, WrappedVlek};
