//! TDX: quotes and the collateral behind them.
//!
//! [`verify`] takes a quote, its collateral and what the caller expects, and answers with one row
//! for each check. Signatures, chains, revocation lists, dates and TCB levels are the work of the
//! crate `dcap-qvl`; the rows about what a quote says are made here.

mod backend;
mod expected;
mod quote;
mod roots;
mod sealed;
mod verify;

pub(crate) use backend::Remembering;
pub use expected::Expected;
pub use quote::{MAX_QUOTE, Quote, QuoteError, TdReport};
pub use roots::Root;
pub use sealed::{SEALED_LEN, SealedError, SealedReport};
pub(crate) use verify::verify_by;
pub use verify::{CHECKS, Evidence, MAX_COLLATERAL, Verified, verify};
