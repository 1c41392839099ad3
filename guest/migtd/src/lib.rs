#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

#[cfg(feature = "attest")]
mod dcap;
mod failure;
mod handshake;
#[cfg(feature = "host")]
mod host;
mod identity;
mod io;
mod message;
mod policy;
mod program;
mod request;
mod seal;
mod steps;

#[cfg(feature = "attest")]
pub use dcap::{CollateralSource, Dcap};
pub use failure::Failure;
#[cfg(feature = "host")]
pub use host::{ExchangeError, MigrationTd};
pub use identity::{EvidenceVerifier, Identity, Untrusted};
pub use message::MAX_MESSAGE;
pub use policy::{Measurements, Mismatch, Policy, Svn};
pub use program::Program;
pub use request::{Exchange, Role};
