//! A debugger outside of the guest.

use crate::cpu::Cpu;
use crate::fault::{Event, EventKind, Exception};
use crate::flags;
use crate::state::Core;

/// What a debugger wants of a processor whose guest does not know of it (Linux: `KVM_SET_GUEST_DEBUG`).
///
/// An exception that is the debugger's, unless a host injected it, leaves as [`Cause::Exception`](crate::Cause::Exception), with RIP where a handler of the
/// guest would return to. The guest's registers are as without it, DR6 and RFLAGS too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Debugger {
    /// Each instruction is followed by #DB, and every #DB leaves.
    pub step: bool,
    /// INT3 leaves, with RIP at the instruction.
    pub int3: bool,
    /// DR0 to DR3 and DR7 in place of the guest's, which keeps its own to read and write. Every #DB leaves.
    pub breakpoints: Option<([u64; 4], u64)>,
    /// No interrupt and no NMI is taken.
    pub hold_events: bool,
}

impl Debugger {
    pub(crate) const fn takes_debug(&self) -> bool {
        self.step || self.breakpoints.is_some()
    }

    /// True if an event that the processor raised leaves in place of being delivered.
    pub(crate) fn takes(&self, event: &Event) -> bool {
        let int3 = event.kind == EventKind::SoftwareException && event.vector == Exception::BP;
        event.is_debug() && self.takes_debug() || int3 && self.int3
    }
}

impl Cpu {
    /// The debugger, [`Debugger::default`] at first. It stays over a reset.
    pub fn debugger(&self) -> &Debugger {
        &self.core.debugger
    }

    /// Sets the debugger.
    pub fn set_debugger(&mut self, debugger: Debugger) {
        self.core.debugger = debugger;
        self.core.update_watch();
    }
}

impl Core {
    /// The running instruction is followed by #DB, by TF or for the debugger.
    pub(crate) fn steps(&self) -> bool {
        self.debugger.step || self.system_flags & flags::TF != 0
    }

    /// DR0 to DR3 and DR7, as accesses meet them.
    pub(crate) fn breakpoints(&self) -> ([u64; 4], u64) {
        let [d0, d1, d2, d3, _, _, _, dr7] = self.dr;
        self.debugger.breakpoints.unwrap_or(([d0, d1, d2, d3], dr7))
    }
}
