//! Inside an SEV guest: the GHCB's MSR protocol, PVALIDATE and RMPADJUST; guest messages to the firmware,
//! over the GHCB page.
//!
//! Under SNP the RMP and the firmware are trusted, the host is not: what PVALIDATE says is a fact, a
//! response in the GHCB MSR is only what the host says. SEV and SEV-ES have no such fact about
//! memory: the C-bit in the guest's own page tables decides what is encrypted, and nothing decides
//! which page lies where.

mod adjust;
mod convert;
mod error;
mod ghcb;
mod guest;
mod guest_request;
pub mod message;
pub mod msr;
mod port;
mod request;
mod validate;

pub use adjust::{Adjust, Permissions, Vmpl};
pub use convert::{Convert, Kind, MAP_GPA_RANGE, map_gpa_range};
pub use error::{Cause, ConvertError};
pub use ghcb::{GHCB_LEN, GhcbAnswer, GhcbExit, GhcbPort, exit_code};
pub use guest::{MsrError, SevError, SevGuest, Versions};
pub use guest_request::RequestError;
pub use port::{
    GhcbMsrPort, HypercallPort, Progress, Pvalidate, PvalidatePort, Reply, RmpCode, Rmpadjust,
    RmpadjustPort, Validated,
};
pub use request::MsrRequest;
pub use validate::{Unchanged, Validate};
