//! Confidential VMs on the software platform: what they start with, what runs in them, and the
//! account of what they took from the firmware and gave back.

#![cfg_attr(
    not(all(feature = "sim", feature = "tdx", feature = "sev")),
    allow(dead_code) // Without VMs of the kind, nothing of theirs is asked for.
)]

mod books;
mod guest;
#[cfg(all(feature = "sim", feature = "sev"))]
mod sev;
mod start;
#[cfg(feature = "tdx")]
mod td;
#[cfg(feature = "tdx")]
mod tour;

pub(crate) use books::{Account, Books, Firmware, Leaks};
#[cfg(all(feature = "sim", feature = "sev"))]
pub(crate) use sev::Told;
pub(crate) use start::{Measurement, Start};
#[cfg(feature = "tdx")]
pub(crate) use td::TdImage;
#[cfg(feature = "tdx")]
pub(crate) use tour::{MESSAGE, Tour};
