//! Moves of a guest between two VMs of one host, as far as they are the same for every technology.
//!
//! | | |
//! |---|---|
//! | [`Claim`] | one move at a time for each VM; a second one is refused, and waits for nothing |
//! | [`StagingTable`], [`MoveToken`] | one-time tokens, each of which names a source |
//! | [`MoveState`], [`Movable`] | what a VM keeps about moves, and what it can do for one |
//! | [`claim_both`], [`stage`], [`receive`], [`cancel`], [`unstage`] | the steps around a hand-over, which the back end makes |
//!
//! Back ends use these; embedders call [`Backend`](crate::Backend).

mod claim;
mod staged;
mod staging;
mod sync;

pub use claim::{Claim, Claimed};
pub use staged::{
    Movable, MoveState, cancel, claim_both, mark_left, mark_moved, receive, stage, unstage,
};
pub use staging::{MoveToken, StagingTable};

use crate::Hpa;

/// A guest's name in its firmware, which stays the same when the guest moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestName {
    /// The handle of an SEV or SEV-ES guest.
    Handle(u32),
    /// The context page of an SNP guest, or the TDR of a TD.
    Page(Hpa),
}
