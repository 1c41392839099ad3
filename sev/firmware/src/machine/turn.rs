//! Turns at the pages that the processors of a guest have open.

use super::Owner;
use crate::cipher::MemoryKey;
use kvm_ops_turns::Turn;
use std::fmt;
use std::sync::Arc;

/// The right to use the bytes of a guest's [`GuestFrame`](crate::GuestFrame)s by their pointers, until it is
/// dropped. The platform waits for a turn alone wherever it touches such a page, so a thread that has one
/// calls nothing of the platform but [`Platform::guest_frame`](crate::Platform::guest_frame).
pub struct GuestTurn {
    pub(super) turn: Turn,
    pub(crate) asid: u32,
    pub(crate) key: Arc<MemoryKey>,
    pub(crate) owner: Owner,
}

impl GuestTurn {
    /// A number that grows when a page of the guest is closed: all its frames are asked for again then. It does not
    /// change while the turn lasts.
    pub fn closed(&self) -> u64 {
        self.turn.closed()
    }
}

impl fmt::Debug for GuestTurn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestTurn")
            .field("asid", &self.asid)
            .finish_non_exhaustive()
    }
}
