//! Turns at the memory that the processors of a TD have open.

use kvm_ops_turns::Turn;

/// The right to use the bytes of [`GuestFrame`](super::GuestFrame)s of a TD by their pointers, until it is dropped. The
/// module itself takes a turn alone when it touches such a page, on any thread: a thread that has one must not call
/// the module, but for [`Platform::guest_page`](crate::Platform::guest_page),
/// [`Platform::guest_try_read`](crate::Platform::guest_try_read) and
/// [`Platform::guest_try_write`](crate::Platform::guest_try_write).
#[derive(Debug)]
pub struct GuestTurn(Turn);

impl GuestTurn {
    pub(crate) fn new(turn: Turn) -> Self {
        Self(turn)
    }

    /// How often a frame of the TD was taken back. It does not change while the turn lasts.
    #[must_use]
    pub fn closed(&self) -> u64 {
        self.0.closed()
    }

    /// How often the module wrote to a frame of the TD: a report, zeros, what a debugger writes. A processor that keeps
    /// decoded code compares it with memory when this is another number. It does not change while the turn lasts.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.0.written()
    }
}
