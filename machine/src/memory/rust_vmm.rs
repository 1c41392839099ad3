//! Memory of the crate vm-memory, in the version that this crate is built with.

use std::sync::Arc;

use kvm_ops::Gpa;
use libc::{PROT_READ, PROT_WRITE};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{GuestRam, MemoryRegion};
use crate::MachineError;

impl GuestRam {
    /// Takes the memory of an embedder that has it as a `GuestMemoryMmap`, which goes on to be of use:
    /// both are the same memory. Writes of the guest do not reach the bitmap `B`; the VM's dirty log
    /// has them.
    ///
    /// For another version of the crate see [`MemoryRegion`].
    ///
    /// ```
    /// use kvm_ops_machine::{GuestRam, MachineConfig};
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    /// let config = MachineConfig::new().guest_ram(GuestRam::from_vm_memory(&memory)?);
    /// # let _ = config;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`MemoryRegion::new`] and [`from_regions`](Self::from_regions); [`MachineError::Access`] for a
    /// region that is not mapped readable.
    pub fn from_vm_memory<B>(memory: &GuestMemoryMmap<B>) -> Result<Self, MachineError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let owner = Arc::new(memory.clone());
        let regions = memory.iter().map(|region| {
            let gpa = Gpa::new(region.start_addr().0);
            if region.prot() & PROT_READ == 0 {
                let bytes = region.len() as usize;
                return Err(MachineError::Access { gpa, bytes });
            }
            // SAFETY: `owner` keeps the mapping, which is readable, and vm-memory makes no reference to
            // its bytes. A mapping that cannot be written is made read-only.
            let ours =
                unsafe { MemoryRegion::new(gpa, region.as_ptr(), region.len(), owner.clone())? };
            Ok(match region.prot() & PROT_WRITE {
                0 => ours.read_only(),
                _ => ours,
            })
        });
        Self::from_regions(regions.collect::<Result<Vec<_>, _>>()?)
    }
}
