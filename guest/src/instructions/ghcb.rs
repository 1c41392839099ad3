//! VMGEXIT with the GHCB page.

use crate::SharedBuffer;
use crate::sev::{GhcbAnswer, GhcbExit, GhcbPort};
use core::arch::asm;

/// The GHCB page with VMGEXIT as a port.
#[derive(Debug)]
pub struct Ghcb<M> {
    page: M,
}

impl<M: SharedBuffer> Ghcb<M> {
    /// The port over the GHCB, mapped as shared.
    ///
    /// # Safety
    /// * The code runs at privilege level 0 in an SEV-ES or SNP guest, and at every call the GHCB MSR holds
    ///   the address of this page, which nothing else uses meanwhile: interrupts are off.
    /// * `page` reads and writes memory of that page and nothing else.
    /// * Exits that make the host write to memory name shared memory that nothing else of this guest uses.
    pub const unsafe fn new(page: M) -> Self {
        Self { page }
    }
}

impl<M: SharedBuffer> GhcbPort for Ghcb<M> {
    fn ghcb_exit(&mut self, exit: GhcbExit) -> GhcbAnswer {
        exit.write(&mut self.page);
        // SAFETY: whoever made this port vouched for privilege level, guest and page. VMGEXIT (REP VMMCALL)
        // changes no register: under SEV-ES the host sees and changes only what the GHCB passes. It is
        // taken to read and write memory, so the page is written before and read after it.
        unsafe {
            asm!(
                ".byte 0xf3, 0x0f, 0x01, 0xd9",
                options(nostack, preserves_flags)
            );
        }
        GhcbAnswer::read(&mut self.page)
    }
}
