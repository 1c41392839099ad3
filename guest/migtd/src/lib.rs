#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

#[cfg(feature = "snp")]
pub mod agent;
#[cfg(feature = "attest")]
mod dcap;
#[cfg(feature = "host")]
mod desk;
mod exchange;
mod failure;
mod handshake;
#[cfg(feature = "host")]
mod host;
mod identity;
mod io;
mod message;
mod module;
mod policy;
mod program;
mod request;
mod seal;
mod steps;

#[cfg(feature = "attest")]
pub use dcap::{CollateralSource, Dcap};
#[cfg(feature = "host")]
pub use desk::ExchangeError;
pub use failure::Failure;
#[cfg(feature = "host")]
pub use host::MigrationTd;
pub use identity::{EvidenceVerifier, Identity, Untrusted};
pub use message::MAX_MESSAGE;
pub use policy::{Measurements, Mismatch, Policy, Svn};
pub use program::Program;
pub use request::{Exchange, Role};
