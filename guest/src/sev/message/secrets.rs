//! The secrets page, which the firmware writes at launch (SNP firmware ABI, "Secrets Page").

use core::fmt;

/// The length of the page in bytes.
pub const SECRETS_LEN: usize = 0x1000;
const VMPCK0: usize = 0x20;
const SEQUENCE0: usize = 0xA0;

/// The secrets page of an SNP guest.
///
/// Private memory of the guest; whoever reads it can speak to the firmware as the guest.
#[derive(Clone, Copy)]
pub struct Secrets<'a>(&'a [u8; SECRETS_LEN]);

impl fmt::Debug for Secrets<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").finish_non_exhaustive()
    }
}

impl<'a> Secrets<'a> {
    /// The page, as it lies in private memory.
    pub const fn new(page: &'a [u8; SECRETS_LEN]) -> Self {
        Self(page)
    }

    /// The message key of a VMPL. `None` above 3, and for a key of zeros: firmware or an earlier stage
    /// erased it.
    pub fn vmpck(&self, vmpl: u8) -> Option<&'a [u8; 32]> {
        let at = VMPCK0 + 32 * usize::from(vmpl);
        let key = (vmpl < 4).then(|| self.0[at..].first_chunk())??;
        (*key != [0; 32]).then_some(key)
    }

    /// The last sequence number that an earlier stage used with the key of a VMPL, in the area that is
    /// the guest's own: Linux keeps it there across kexec. 0 above VMPL3.
    pub fn sequence(&self, vmpl: u8) -> u64 {
        let at = SEQUENCE0 + 4 * usize::from(vmpl);
        let number = (vmpl < 4).then(|| self.0[at..].first_chunk()).flatten();
        number.map_or(0, |bytes| u32::from_le_bytes(*bytes).into())
    }
}
