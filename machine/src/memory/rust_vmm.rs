//! The crate vm-memory, in the version that this crate is built with: its memory under a machine, and a
//! machine's memory under devices that are built on it.

use std::io;
use std::iter::FusedIterator;
use std::marker::PhantomData;
use std::sync::Arc;

use kvm_ops::Gpa;
use libc::{PROT_READ, PROT_WRITE};
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, Permissions, VolatileSlice,
};

use super::{DeviceMemory, GuestRam, MemoryRegion};
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

/// The dirty log of a machine, from some address of a region on.
#[derive(Clone, Copy, Debug)]
pub struct Written<'m> {
    region: &'m MemoryRegion,
    from: Gpa,
}

impl Written<'_> {
    /// The address at an offset; the end of the region for one beyond it.
    fn at(&self, offset: usize) -> Gpa {
        let at = self.from.checked_add(offset as u64);
        at.unwrap_or(self.region.end()).min(self.region.end())
    }
}

impl<'m> WithBitmapSlice<'_> for Written<'m> {
    type S = Written<'m>;
}

impl BitmapSlice for Written<'_> {}

impl<'m> Bitmap for Written<'m> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.region.mark(self.at(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.region.is_marked(self.at(offset))
    }

    fn slice_at(&self, offset: usize) -> Written<'m> {
        Written {
            region: self.region,
            from: self.at(offset),
        }
    }
}

/// Pieces of memory, as vm-memory has them, for as long as the borrow that they were asked of.
struct Slices<'a, I>(I, PhantomData<&'a ()>);

impl<'a, 'm: 'a, I> Iterator for Slices<'a, I>
where
    I: Iterator<Item = (&'m MemoryRegion, Gpa, usize)>,
{
    type Item = Result<VolatileSlice<'a, Written<'m>>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (region, from, len) = self.0.next()?;
        let (host, _) = region.place(from)?;
        let written = Written { region, from };
        // SAFETY: `len` bytes from `from` on lie in the region, which stays mapped for as long as it is
        // borrowed here, and it is writable: `get_slices` refuses others. No reference to it exists.
        Some(Ok(unsafe {
            VolatileSlice::with_bitmap(host, len, written, None)
        }))
    }
}

impl<'a, 'm: 'a, I> FusedIterator for Slices<'a, I> where
    I: FusedIterator<Item = (&'m MemoryRegion, Gpa, usize)>
{
}

impl<'a, 'm: 'a, I> GuestMemorySliceIterator<'a, Written<'m>> for Slices<'a, I> where
    I: FusedIterator<Item = (&'m MemoryRegion, Gpa, usize)>
{
}

/// Accesses to private pages fail with an `IOError` that holds the [`MachineError`]. Writes mark pages in
/// the dirty log of the machine.
impl<'m> GuestMemory for DeviceMemory<'m> {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = Written<'m>;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.check(Gpa::new(addr.0), count, access.has_write())
            .is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        let gpa = Gpa::new(addr.0);
        match self.check(gpa, count, access.has_write()) {
            Ok(()) => {}
            Err(error @ MachineError::Private { .. }) => {
                return Err(GuestMemoryError::IOError(io::Error::other(error)));
            }
            Err(_) => return Err(GuestMemoryError::InvalidGuestAddress(addr)),
        }
        // A slice can be written whatever it was asked for.
        let mut pieces = self.pieces(gpa, count);
        if pieces.any(|(region, ..)| !region.host_writes()) {
            return Err(GuestMemoryError::HostAddressNotAvailable);
        }
        Ok(Slices(self.pieces(gpa, count).fuse(), PhantomData))
    }
}
