//! Physical memory for firmware and guests.

use crate::{Hpa, Level, Page, PortId, Result};

/// Physical memory that the host may give to firmware and to guests.
///
/// A page that is never given back is one that firmware still owns.
pub trait PagePort: Send + Sync {
    /// The identity of this source of pages, which its [`Page`]s carry.
    fn id(&self) -> PortId;

    /// Takes a naturally aligned page of 4 KiB or 2 MiB out of the host's use.
    ///
    /// # Errors
    /// [`Error::NoMemory`](crate::Error::NoMemory), or
    /// [`Error::Invalid`](crate::Error::Invalid) for another level.
    fn alloc(&self, level: Level) -> Result<Page>;

    /// Gives a page back. Firmware and guests hold no part of it any more.
    ///
    /// # Errors
    /// The page itself, if it is not one of this port.
    fn free(&self, page: Page) -> Result<(), Page>;

    /// Writes as the host does, with no KeyID and no C-bit.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for an address that is not memory of this port;
    /// [`Error::Busy`](crate::Error::Busy) if the processor refuses the host the page (an RMP
    /// fault).
    fn write(&self, at: Hpa, data: &[u8]) -> Result<()>;

    /// Reads as the host does: private memory reads as ciphertext or poison.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()>;
}
