//! The importing side.

mod cpuid;
mod image;
mod mem;
mod page;
mod state;
mod token;

pub(crate) use mem::mem;
pub(crate) use state::{Incoming, immutable, td, vp};
pub(crate) use token::{abort, commit, end, track};
