//! Guest-physical pages for a processor that keeps translations.

use super::Guest;
use super::access::Access;
use crate::memory::{GuestFrame, GuestTurn};
use crate::platform::{LpError, Platform};
use kvm_ops_turns::Turns;
use std::sync::Arc;

/// What an access to a guest-physical page leads to: an entry of a processor's TLB.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum GuestPage {
    /// Private memory.
    Private(GuestFrame),
    /// Private memory with a line that the TD's key did not write. Each access goes through
    /// [`Platform::guest_try_read`] or [`Platform::guest_try_write`]; one to such a line is a machine check, which
    /// [`Platform::guest_read`] of the page plays.
    Damaged,
    /// Memory that the host's shared EPT translates.
    Shared {
        /// The address without the shared bit.
        gpa: u64,
    },
    /// No such access: a violation, or beyond the width of addresses.
    Violation,
}

impl Platform {
    /// Translates the page at `gpa` for the guest on a processor, to read (and execute) or to write it, as the
    /// processor's walk of the EPTs does. The answer holds until the vCPU is entered in another epoch
    /// ([`Platform::guest_epoch`]) or [`GuestTurn::closed`] tells another number.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_page(&self, lp: usize, gpa: u64, write: bool) -> Result<GuestPage, LpError> {
        let (this, state) = self.lp(lp)?;
        Ok(self.guest(lp, this, &state)?.page(gpa & !0xFFF, write))
    }

    /// Reads private memory within a page that [`GuestPage::Damaged`] was answered for, in the middle of an instruction.
    /// False if there is a fault, which is not played, or if the page has no damaged line any more and another processor
    /// has it as a frame: then the instruction begins again.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_try_read(&self, lp: usize, gpa: u64, bytes: &mut [u8]) -> Result<bool, LpError> {
        let (this, state) = self.lp(lp)?;
        Ok(self
            .guest(lp, this, &state)?
            .try_access(gpa, Access::Read(bytes)))
    }

    /// Writes in the same way.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_try_write(&self, lp: usize, gpa: u64, bytes: &[u8]) -> Result<bool, LpError> {
        let (this, state) = self.lp(lp)?;
        Ok(self
            .guest(lp, this, &state)?
            .try_access(gpa, Access::Write(bytes)))
    }

    /// Waits for a turn at the private memory of the TD on a processor, which nobody else has.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_turn(&self, lp: usize) -> Result<GuestTurn, LpError> {
        Ok(GuestTurn::new(self.turns(lp)?.take()))
    }

    /// Waits for a turn that other processors of the TD share, each for the thread that calls this: they use the TD's frames
    /// by atomic accesses.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_turn_shared(&self, lp: usize) -> Result<GuestTurn, LpError> {
        Ok(GuestTurn::new(self.turns(lp)?.share()))
    }

    /// Those of the TD on a processor. They are waited for without its lock.
    fn turns(&self, lp: usize) -> Result<Arc<Turns>, LpError> {
        let (this, state) = self.lp(lp)?;
        let guest = self.guest(lp, this, &state)?;
        Ok(self.mem.keys.turns(guest.td.key().as_ref()).clone())
    }

    /// The TLB epoch in which the vCPU on a processor was entered. In another one no translation of the last
    /// is left (TDH.MEM.TRACK).
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_epoch(&self, lp: usize) -> Result<u64, LpError> {
        use std::sync::atomic::Ordering::Acquire;
        let (this, state) = self.lp(lp)?;
        Ok(self.guest(lp, this, &state)?.vcpu.epoch.load(Acquire))
    }
}

impl Guest<'_> {
    /// An access to private memory within a page, in a turn of the guest. True if it was done.
    fn try_access(&self, gpa: u64, access: Access<'_>) -> bool {
        let beyond =
            gpa >> self.td.gpa_width() != 0 || (gpa as usize & 0xFFF) + access.len() > 4096;
        if beyond || self.is_shared(gpa) {
            return false;
        }
        let Some(pa) = self.private_address(gpa, &access) else {
            return false;
        };
        let (key, mem) = (self.td.key(), &self.p.mem);
        let done = match access {
            Access::Read(bytes) => mem.private_try_read(pa, bytes, key.as_deref()),
            Access::Write(bytes) => mem.private_try_write(pa, bytes, key.as_deref()),
        };
        done.is_ok()
    }

    /// True for an address that the host's shared EPT translates.
    fn is_shared(&self, gpa: u64) -> bool {
        gpa & self.td.shared_bit() != 0 && self.has_shared_ept()
    }

    fn page(&self, gpa: u64, write: bool) -> GuestPage {
        if gpa >> self.td.gpa_width() != 0 {
            return GuestPage::Violation;
        }
        if self.is_shared(gpa) {
            let gpa = gpa & !self.td.shared_bit();
            return GuestPage::Shared { gpa };
        }
        let address = |write| match write {
            true => self.private_address(gpa, &Access::Write(&[])),
            false => self.private_address(gpa, &Access::Read(&mut [])),
        };
        let Some(pa) = address(write) else {
            return GuestPage::Violation;
        };
        match self.p.mem.open(pa, self.td.key().as_ref()) {
            Ok(page) => {
                GuestPage::Private(GuestFrame::new(page, write || address(true) == Some(pa)))
            }
            Err(_) => GuestPage::Damaged,
        }
    }
}
