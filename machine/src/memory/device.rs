//! Guest memory as a device sees it.

use kvm_ops::{Gfn, Gpa, PAGE_SIZE};

use super::MemoryRegion;
use crate::{GuestRam, MachineError};

/// Knows the kind of a guest's memory.
pub trait SharedFrames: Sync {
    /// True for a frame that the guest shares with the host now. Of an SEV or SEV-ES guest the host reaches every
    /// frame, encrypted or not ([`VmOps::show_to_host`](kvm_ops::VmOps::show_to_host)).
    fn is_shared(&self, gfn: Gfn) -> bool;
}

/// Guest memory as a device may use it.
///
/// A device reaches RAM, and of a TD or an SNP guest only the pages that the guest shares. The host's
/// memory behind a private page holds nothing of the guest, so an access there is an error and not a
/// surprise. Of an SEV or SEV-ES guest a device reaches all memory, as it does on the processor: what the
/// guest encrypted is ciphertext to it. Writes are marked in the dirty log of a machine that has one
/// ([`MachineConfig::log_dirty`](crate::MachineConfig::log_dirty)).
///
/// A guest may take a page back while a device uses it. Then the device reads and writes the host's
/// memory, which the guest does not see any more; nothing else happens.
///
/// With the cargo feature `vm-memory` this is a `vm_memory::GuestMemory`, so that virtio-queue and other
/// crates of rust-vmm work on it.
#[derive(Clone, Copy)]
pub struct DeviceMemory<'a> {
    ram: &'a GuestRam,
    /// `None` where all memory is shared.
    frames: Option<&'a dyn SharedFrames>,
}

impl<'a> DeviceMemory<'a> {
    /// The memory of a normal VM, or of a test without a VM.
    pub const fn new(ram: &'a GuestRam) -> Self {
        Self { ram, frames: None }
    }

    /// The memory of a confidential VM.
    pub const fn with_private(ram: &'a GuestRam, frames: &'a dyn SharedFrames) -> Self {
        Self {
            ram,
            frames: Some(frames),
        }
    }

    /// The memory as the machine has it, private pages or not, for a device that maps it elsewhere, as
    /// vhost does.
    pub const fn ram(&self) -> &'a GuestRam {
        self.ram
    }

    /// Reads memory into `data`.
    ///
    /// # Errors
    /// As [`check`](Self::check); then nothing is read.
    pub fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), MachineError> {
        self.check(gpa, data.len(), false)?;
        self.ram.read(gpa, data)
    }

    /// Writes `data` to memory, and marks the pages as dirty.
    ///
    /// # Errors
    /// As [`check`](Self::check); then nothing is written.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MachineError> {
        self.check(gpa, data.len(), true)?;
        self.ram.write(gpa, data)
    }

    /// Marks pages that a device wrote in another way, as vhost does.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn mark_dirty(&self, gpa: Gpa, bytes: usize) -> Result<(), MachineError> {
        self.check(gpa, bytes, true)?;
        for (region, at, len) in self.pieces(gpa, bytes) {
            region.mark(at, len);
        }
        Ok(())
    }

    /// Checks that a device may read, or write, all of the range.
    ///
    /// # Errors
    /// [`MachineError::Private`] names a page that the guest keeps to itself; [`MachineError::Access`]
    /// where there is no memory, or for a write none that the guest could write.
    pub fn check(&self, gpa: Gpa, bytes: usize, write: bool) -> Result<(), MachineError> {
        let mut left = bytes;
        for (region, _, len) in self.pieces(gpa, bytes) {
            if write && !(region.guest_writes() && region.host_writes()) {
                break;
            }
            left -= len;
        }
        if left != 0 {
            return Err(MachineError::Access { gpa, bytes });
        }
        let (Some(frames), Some(last)) = (self.frames, (bytes as u64).checked_sub(1)) else {
            return Ok(());
        };
        let (first, last) = (gpa.get() / PAGE_SIZE, (gpa.get() + last) / PAGE_SIZE);
        match (first..=last).find(|gfn| !frames.is_shared(Gfn::new(*gfn))) {
            None => Ok(()),
            Some(gfn) => Err(MachineError::Private {
                gpa: Gpa::new((gfn * PAGE_SIZE).max(gpa.get())),
            }),
        }
    }

    /// The range cut at the borders of regions, up to the first hole.
    pub(super) fn pieces(
        &self,
        gpa: Gpa,
        bytes: usize,
    ) -> impl Iterator<Item = (&'a MemoryRegion, Gpa, usize)> + use<'a> {
        let ram = self.ram;
        let mut done = 0;
        std::iter::from_fn(move || {
            let left = bytes.checked_sub(done).filter(|left| *left != 0)?;
            let at = gpa.checked_add(done as u64)?;
            let region = ram.region(at)?;
            let room = region.end().get() - at.get();
            let len = usize::try_from(room).map_or(left, |room| left.min(room));
            done += len;
            Some((region, at, len))
        })
    }
}

impl std::fmt::Debug for DeviceMemory<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceMemory")
            .field("ram", &self.ram)
            .field("private", &self.frames.is_some())
            .finish()
    }
}
