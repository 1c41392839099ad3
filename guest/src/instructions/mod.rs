//! The instructions themselves (feature `instructions`, x86_64): the only `unsafe` of this crate.
//!
//! Each port is made by an `unsafe` constructor, because the duty is the same for all its calls:
//! the code runs at privilege level 0 in such a guest, and what the calls do to memory is what
//! its owner wants. No unit test can execute them; guest/example does, in a TD and in an SNP guest of the software platform.
//! What carries registers to TDCALL and back is tested around another instruction.

mod ghcb;
mod snp;
mod tdcall;

pub use ghcb::Ghcb;
pub use snp::{GhcbMsr, Snp, Translate, pvalidate, rmpadjust};
pub use tdcall::Tdcall;
