//! Inside a TD: TDCALLs to the TDX module, and through it to the host.
//!
//! The TDX module is trusted; the host is not. So a status in RAX is a fact, while everything that
//! TDG.VP.VMCALL brings back in R10 to R15 is only what the host says.

mod accept;
mod convert;
mod decode;
mod error;
mod get_quote;
mod guest;
mod info;
mod mapgpa;
mod port;
mod quote;
mod report;
mod status;
mod vmcall;

pub use accept::{Accept, AlreadyAccepted, accept_operand};
pub use convert::{Convert, Limits, Progress};
pub use error::{Cause, ConvertError};
pub use get_quote::{QuoteError, REPORT_LEN};
pub use guest::{TdError, TdGuest};
pub use info::{TdInfo, VeInfo, VeKind, report_request, rtmr_extend_request};
pub use mapgpa::MapGpa;
pub use port::{Gpaw, Regs, TdcallPort, leaf};
pub use quote::{QuoteHeader, QuoteStatus};
pub use report::TdReport;
pub use status::{CompletionStatus, VmcallStatus};
pub use vmcall::{CallError, Vmcall, Width};
