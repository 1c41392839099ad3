//! Memory accesses for a caller who plays the guest.

use super::access::{Access, Fault};
use super::exits::violation_info;
use super::{Guest, GuestEvent, GuestFlow, Next, VmExit};
use crate::platform::{LpError, Platform};
use crate::vcpu::Event;

impl Platform {
    /// Reads guest-physical memory as the guest on a processor does, private or (with the shared bit) shared. RIP
    /// has moved by `advance` since the last event. `None` if the bytes were read; otherwise the result of the
    /// fault, and the bytes are undefined.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_read(
        &self,
        lp: usize,
        gpa: u64,
        bytes: &mut [u8],
        advance: u64,
    ) -> Result<Option<GuestFlow>, LpError> {
        self.guest_access(lp, gpa, Access::Read(bytes), advance)
    }

    /// Writes guest-physical memory as the guest on a processor does. `None` if the bytes were written; otherwise the
    /// result of the fault. A write across pages may have written those before the one that faults.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_write(
        &self,
        lp: usize,
        gpa: u64,
        bytes: &[u8],
        advance: u64,
    ) -> Result<Option<GuestFlow>, LpError> {
        self.guest_access(lp, gpa, Access::Write(bytes), advance)
    }

    /// An access to a page that the host's shared EPT does not map, with "suppress #VE" clear, as hosts leave it for
    /// device memory. The processor itself delivers #VE, unless the information of an earlier one was not fetched:
    /// then the guest exits with an EPT violation (SDM vol. 3, "Convertible EPT Violations").
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_device_access(
        &self,
        lp: usize,
        violation: VmExit,
        advance: u64,
    ) -> Result<GuestFlow, LpError> {
        let gprs = {
            let (this, state) = self.lp(lp)?;
            let mut guest = self.guest(lp, this, &state)?;
            let is_free = guest.ctx.vm() == 0 && guest.ctx.ve_info.is_none();
            if is_free && !guest.td.is_fatal() {
                guest.ctx.advance_rip(advance);
                guest.ctx.set_ve_info(violation_info(&violation));
                guest.ctx.note_injection(Event::VE);
                return Ok(guest.resume(Some(Event::VE), false));
            }
            guest.ctx.gprs
        };
        self.guest_event(lp, gprs, GuestEvent::Exit(violation), advance)
    }

    /// `None` if the access is done, otherwise the result of its fault.
    pub(super) fn guest_access(
        &self,
        lp: usize,
        gpa: u64,
        access: Access<'_>,
        advance: u64,
    ) -> Result<Option<GuestFlow>, LpError> {
        let (this, mut state) = self.lp(lp)?;
        let mut guest: Guest<'_> = self.guest(lp, this, &state)?;
        guest.ctx.advance_rip(advance);
        let exit = match guest.access(gpa, access) {
            Ok(()) => return Ok(None),
            Err(Fault::Exit(exit)) => exit,
            Err(Fault::MachineCheck) => {
                let Next::Leave(exit) = guest.poisoned() else {
                    return Ok(None);
                };
                let host = guest.leave(*exit);
                state.running = None;
                return Ok(Some(GuestFlow::Exit { host }));
            }
        };
        let gprs = guest.ctx.gprs;
        drop(guest);
        drop(state);
        self.guest_event(lp, gprs, GuestEvent::Exit(exit), 0)
            .map(Some)
    }
}
