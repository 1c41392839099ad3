//! The AMD secure processor.

use crate::{AsidPools, Hpa, Result};

/// The mailbox of the AMD secure processor, and the instructions that go with it.
pub trait PspPort: Send + Sync {
    /// Issues one command with its buffer and returns the firmware's status, 0 for success.
    ///
    /// # Errors
    /// An error of the mailbox itself.
    ///
    /// # Safety
    /// The caller owns the pages that the operands name, and stops using a page that it gives to firmware
    /// or to a guest until it comes back.
    unsafe fn command(&self, id: u32, buffer: &mut [u8]) -> Result<u32>;

    /// WBINVD on every processor.
    fn wbinvd_all(&self);

    /// RMPUPDATE of the page at `page`: `entry` is the 16-byte source operand of the instruction
    /// (APM vol. 3). Returns EAX, 0 for success.
    ///
    /// # Errors
    /// Unsupported without SNP.
    ///
    /// # Safety
    /// The caller owns the pages that the operands name, and stops using a page that it gives to firmware
    /// or to a guest until it comes back.
    unsafe fn rmpupdate(&self, page: Hpa, entry: &[u8; 16]) -> Result<u32> {
        let _ = (page, entry);
        not_offered!("rmpupdate")
    }

    /// PSMASH of the 2 MiB page at `page`. Returns EAX, 0 for success.
    ///
    /// # Errors
    /// Unsupported without SNP.
    ///
    /// # Safety
    /// The caller owns the pages that the operands name, and stops using a page that it gives to firmware
    /// or to a guest until it comes back.
    unsafe fn psmash(&self, page: Hpa) -> Result<u32> {
        let _ = page;
        not_offered!("psmash")
    }

    /// RMPREAD of the page at `page`: the entry in the layout that [`rmpupdate`](Self::rmpupdate)
    /// takes.
    ///
    /// # Errors
    /// Unsupported without SNP; [`Error::Invalid`](crate::Error::Invalid) for an address that has
    /// no entry.
    fn rmpread(&self, page: Hpa) -> Result<[u8; 16]> {
        let _ = page;
        not_offered!("rmpread")
    }

    /// Called in every turn of a loop that waits for another processor.
    fn relax(&self) {
        core::hint::spin_loop();
    }

    /// The ASIDs of the machine: one value for all guests, however many handles the port has.
    fn asid_pools(&self) -> &AsidPools;

    /// The bit of a guest-physical address that is the C-bit (CPUID 8000_001F EBX\[5:0\]).
    fn c_bit(&self) -> u32;

    /// The number of ASIDs, and the first that is for plain SEV (CPUID 8000_001F ECX, EDX).
    /// ASIDs are 1 to the first; those below the second are for SEV-ES and SNP.
    fn asids(&self) -> (u32, u32);
}
