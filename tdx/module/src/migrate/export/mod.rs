//! The exporting side.

mod block;
mod mem;
mod state;
mod token;

pub(crate) use block::{blockw, restore, unblockw};
pub(crate) use mem::mem;
pub(crate) use state::{Outgoing, immutable, td, vp};
pub(crate) use token::{OUT_OF_ORDER_EPOCH, abort, pause, track};
