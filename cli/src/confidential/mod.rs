//! Confidential VMs on the software platform: what they start with, what runs in them, and the
//! account of what they took from the firmware and gave back.

mod books;
mod guest;
mod sev;
mod start;
mod td;
mod tour;

pub(crate) use books::{Account, Books, Firmware, Leaks};
pub(crate) use start::{Measurement, Start};
pub(crate) use td::TdImage;
pub(crate) use tour::{MESSAGE, Tour};
