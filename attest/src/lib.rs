#![doc = include_str!("../README.md")]

#[cfg(any(feature = "snp", feature = "tdx"))]
mod bytes;
pub mod event_log;
#[cfg(any(feature = "snp", feature = "tdx"))]
pub mod flip;
#[cfg_attr(
    not(any(feature = "snp", feature = "tdx")),
    allow(dead_code) // Without a technology, there is nothing to make rows of.
)]
mod row;
#[cfg(feature = "snp")]
pub mod snp;
#[cfg(all(feature = "software", any(feature = "snp", feature = "tdx")))]
pub mod software;
#[cfg(feature = "tdx")]
pub mod tdx;
#[cfg(any(feature = "snp", feature = "tdx"))]
pub mod x509;

pub use row::{Check, Outcome, Row, Verdict, WaiverError, Waivers, Weight};
