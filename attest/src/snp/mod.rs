//! SEV-SNP: attestation reports and the X.509 chains behind them.
//!
//! [`verify`] takes a report, its certificates and what the caller expects, and answers with one
//! row for each check.
//!
//! A signature (r, n - s) verifies as (r, s) does, here as in every implementation of ECDSA, and
//! hardware gives either. The bytes of a report are therefore no identity: name a guest by its
//! report id, and a request by the report data.

mod chain;
pub(crate) mod endorsement;
mod expected;
mod report;
mod roots;
pub mod table;
mod tcb;
mod verify;

pub use endorsement::{Endorsement, KeyKind};
pub use expected::Expected;
pub use report::{REPORT_LEN, Report, ReportError, SIGNED_LEN, SigningKey};
pub use roots::{Root, Roots};
pub use tcb::{Product, Tcb};
pub use verify::{CHECKS, Evidence, Verified, verify};

pub(crate) use chain::chain_of;
pub(crate) use roots::is_software;
