//! Evidence of software platforms: the certificates that a vendor's services issue for hardware, and
//! the quotes that a quoting enclave makes.
//!
//! The private keys of these authorities are part of this crate, so that anyone can make evidence.
//! It proves nothing about hardware, and verdicts call its root by that name.

#[cfg(feature = "snp")]
mod kds;
mod parts;
#[cfg(feature = "tdx")]
mod pcs;
#[cfg(feature = "tdx")]
mod quoting;
pub mod samples;

#[cfg(feature = "snp")]
pub use kds::{Kds, Revocation, Subject, VekRequest};
pub use parts::IssueError;
#[cfg(feature = "tdx")]
pub use pcs::{Collateral, Level, Pcs, Platform};
#[cfg(feature = "tdx")]
pub use quoting::{QuoteFormat, QuotingError, QuotingService, TD_REPORT_LEN, TdReportMac};
