//! The instructions themselves (feature `instructions`, x86_64): the only `unsafe` of this crate.
//!
//! Each port is made by an `unsafe` constructor, because the duty is the same for all its calls:
//! the code runs at privilege level 0 in such a guest, and what the calls do to memory is what
//! its owner wants. None of this can be executed by a test; what carries registers to TDCALL and back
//! is tested around another instruction.

mod ghcb;
mod snp;
mod tdcall;

pub use ghcb::Ghcb;
pub use snp::{GhcbMsr, Snp, Translate, pvalidate, rmpadjust};
pub use tdcall::Tdcall;
