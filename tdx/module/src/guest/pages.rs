//! Guest-physical pages for a processor that keeps translations.

use super::Guest;
use super::access::Access;
use crate::memory::{GuestFrame, GuestTurn};
use crate::platform::{LpError, Platform};

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

    /// Reads as [`Platform::guest_read`] does, in the middle of an instruction: false if there is a fault, which is
    /// not played.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_try_read(&self, lp: usize, gpa: u64, bytes: &mut [u8]) -> Result<bool, LpError> {
        let (this, state) = self.lp(lp)?;
        let mut guest = self.guest(lp, this, &state)?;
        Ok(guest.access(gpa, Access::Read(bytes)).is_ok())
    }

    /// Writes as [`Platform::guest_write`] does, in the middle of an instruction: false if there is a fault, which
    /// is not played.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_try_write(&self, lp: usize, gpa: u64, bytes: &[u8]) -> Result<bool, LpError> {
        let (this, state) = self.lp(lp)?;
        let mut guest = self.guest(lp, this, &state)?;
        Ok(guest.access(gpa, Access::Write(bytes)).is_ok())
    }

    /// Waits for a turn at the private memory of the TD on a processor.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_turn(&self, lp: usize) -> Result<GuestTurn, LpError> {
        let turns = {
            let (this, state) = self.lp(lp)?;
            let guest = self.guest(lp, this, &state)?;
            self.mem.keys.turns(guest.td.key().as_ref()).clone()
        };
        Ok(turns.take())
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
    fn page(&self, gpa: u64, write: bool) -> GuestPage {
        if gpa >> self.td.gpa_width() != 0 {
            return GuestPage::Violation;
        }
        let shared = self.td.shared_bit();
        if gpa & shared != 0 && self.has_shared_ept() {
            return GuestPage::Shared { gpa: gpa & !shared };
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
