//! Confidential VMs on the software platform: their measured start, their guests, and the account
//! of the firmware resources that they use.

mod books;
mod certificates;
mod event_log;
mod guest;
mod measured;
mod quotes;
mod sev;
mod start;
mod td;
mod tour;

pub(crate) use books::{Account, Books, Firmware, Leaks};
pub(crate) use certificates::certificates;
pub(crate) use measured::Measured;
pub(crate) use quotes::Quotes;
pub(crate) use start::{Measurement, Start};
pub(crate) use td::{TdImage, td_params};
pub(crate) use tour::{MESSAGE, Tour};
