#![doc = include_str!("../README.md")]

#[cfg_attr(
    not(feature = "snp"),
    allow(dead_code) // Without a technology, there is nothing to make rows of.
)]
mod row;
#[cfg(feature = "snp")]
pub mod snp;
#[cfg(feature = "software")]
pub mod software;
#[cfg(feature = "snp")]
pub mod x509;

pub use row::{Check, Outcome, Row, Verdict, WaiverError, Waivers, Weight};
