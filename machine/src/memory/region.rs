//! A piece of guest memory, and the owner that keeps it mapped.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use kvm_ops::{Error, Field, Gpa, HostRange, volatile};
use memmap2::{MmapOptions, MmapRaw};

use super::dirty::DirtyLog;
use crate::MachineError;

/// Host memory that the guest finds at a guest-physical address, with whatever keeps it mapped.
///
/// Any memory of the process becomes one: an anonymous mapping, a memfd shared with another process,
/// huge pages, or a region of `vm-memory` of any version. With the crate itself named `vm_memory`:
///
/// ```
/// # use vm_memory_old as vm_memory;
/// use std::sync::Arc;
///
/// use kvm_ops::Gpa;
/// use kvm_ops_machine::{GuestRam, MemoryRegion};
/// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
///
/// let theirs = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let owner = Arc::new(theirs.clone());
/// let regions = theirs.iter().map(|region| {
///     let (gpa, host) = (Gpa::new(region.start_addr().0), region.as_ptr());
///     // SAFETY: `owner` keeps the mapping, and vm-memory makes no reference to its bytes.
///     unsafe { MemoryRegion::new(gpa, host, region.len(), owner.clone()) }
/// });
/// let ram = GuestRam::from_regions(regions.collect::<Result<Vec<_>, _>>()?)?;
/// assert_eq!(ram.size(), 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A memfd, with the crate `memmap2`:
///
/// ```
/// use std::sync::Arc;
///
/// use kvm_ops::Gpa;
/// use kvm_ops_machine::MemoryRegion;
/// use memmap2::{MmapOptions, MmapRaw};
///
/// # let file = tempfile::tempfile()?;
/// file.set_len(1 << 20)?; // or a memfd, or a file on hugetlbfs
/// let map: MmapRaw = MmapOptions::new().map_raw(&file)?;
/// let host = map.as_mut_ptr();
/// // SAFETY: the region keeps `map`, and there is no reference to its bytes.
/// let region = unsafe { MemoryRegion::new(Gpa::new(0), host, 1 << 20, Arc::new(map))? };
/// # let _ = region;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MemoryRegion {
    gpa: Gpa,
    host: HostRange,
    kind: Kind,
    /// The pages that this process wrote, of a machine with a dirty log.
    written: Option<DirtyLog>,
    /// Held, never read.
    _owner: Arc<dyn Any + Send + Sync>,
}

/// The use of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Memory that a kernel may use.
    Ram,
    /// A ROM that the host fills. Only a confidential guest may write it.
    Rom { guest_writes: bool },
    /// Memory that neither the guest nor the host writes.
    ReadOnly,
}

impl MemoryRegion {
    /// Describes `bytes` bytes at `host`, which the guest finds at `gpa`.
    ///
    /// # Errors
    /// [`MachineError::Region`] for an address or a size that is not a multiple of 4 KiB, for a size of
    /// 0, and for a range that wraps.
    ///
    /// # Safety
    /// For as long as `owner` or a clone of it exists:
    /// * the memory stays mapped at `host`, readable, and writable unless the region is made
    ///   [`read_only`](Self::read_only);
    /// * no Rust reference to its bytes exists, because the guest writes it at any time.
    pub unsafe fn new(
        gpa: Gpa,
        host: *mut u8,
        bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, MachineError> {
        let refused = |source| MachineError::Region { source };
        // SAFETY: the region keeps the owner, so the caller's promise holds for as long as the region
        // exists; a machine keeps its regions until their slots are deleted, or leaks them.
        let range = unsafe { HostRange::new(host as u64, bytes) }.map_err(refused)?;
        if !gpa.is_page_aligned() || gpa.checked_add(bytes).is_none() {
            return Err(refused(Error::Invalid(Field::Gpa, gpa.get())));
        }
        Ok(Self {
            gpa,
            host: range,
            kind: Kind::Ram,
            written: None,
            _owner: owner,
        })
    }

    /// The region as memory that neither the guest nor the host writes, as a file that is mapped
    /// for reading. A guest's write leaves as an exit.
    #[must_use]
    pub fn read_only(self) -> Self {
        Self {
            kind: Kind::ReadOnly,
            ..self
        }
    }

    /// Anonymous memory of this process, zero and without pages until it is touched.
    pub(crate) fn anonymous(gpa: Gpa, bytes: u64) -> Result<Self, MachineError> {
        let map = usize::try_from(bytes)
            .map_err(std::io::Error::other)
            .and_then(|len| MmapOptions::new().len(len).no_reserve_swap().map_anon())
            .map(MmapRaw::from)
            .map_err(|source| MachineError::Map { bytes, source })?;
        let host = map.as_mut_ptr();
        // SAFETY: the region keeps the mapping, of which only this raw pointer is used.
        unsafe { Self::new(gpa, host, bytes, Arc::new(map)) }
    }

    /// The region as a ROM, which the host fills.
    pub(crate) fn rom(self, guest_writes: bool) -> Self {
        Self {
            kind: Kind::Rom { guest_writes },
            ..self
        }
    }

    /// The guest-physical address of the first byte.
    pub const fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// The guest-physical address of the byte after the last.
    pub const fn end(&self) -> Gpa {
        Gpa::new(self.gpa.get() + self.host.bytes())
    }

    /// The size in bytes.
    pub const fn bytes(&self) -> u64 {
        self.host.bytes()
    }

    /// The address of the first byte in this process, to hand it to another mapper, such as vhost. The
    /// guest writes there at any time, so make no reference of it.
    pub const fn host_address(&self) -> *mut u8 {
        self.host.address() as *mut u8
    }

    /// True if the guest may write it.
    pub fn guest_writes(&self) -> bool {
        matches!(self.kind, Kind::Ram | Kind::Rom { guest_writes: true })
    }

    /// True if the host may write it.
    pub fn host_writes(&self) -> bool {
        self.kind != Kind::ReadOnly
    }

    /// True for memory that a kernel may use.
    pub fn is_ram(&self) -> bool {
        self.kind == Kind::Ram
    }

    pub(crate) const fn host(&self) -> HostRange {
        self.host
    }

    /// The place of a guest-physical address in the region, and the bytes from there to its end.
    pub(crate) fn place(&self, gpa: Gpa) -> Option<(*mut u8, u64)> {
        let offset = gpa.get().checked_sub(self.gpa.get())?;
        let left = self.bytes().checked_sub(offset).filter(|left| *left != 0)?;
        Some((self.host_address().wrapping_add(offset as usize), left))
    }

    /// Reads from the region; the bytes after its end are left alone. Returns the number read.
    pub(crate) fn read(&self, gpa: Gpa, data: &mut [u8]) -> Option<usize> {
        let (host, left) = self.place(gpa)?;
        let len = data.len().min(left as usize);
        // SAFETY: `len` bytes from `host` on lie in the region, which its owner keeps mapped, and no
        // Rust reference to them exists (the promise of `new`).
        unsafe { volatile::copy_from(host, &mut data[..len]) };
        Some(len)
    }

    /// Writes to the region as far as it reaches. Returns the number written.
    pub(crate) fn write(&self, gpa: Gpa, data: &[u8]) -> Option<usize> {
        let (host, left) = self.place(gpa).filter(|_| self.host_writes())?;
        let len = data.len().min(left as usize);
        // SAFETY: as in `read`; the region is writable, because it was not made read-only.
        unsafe { volatile::copy_to(host, &data[..len]) };
        self.mark(gpa, len);
        Some(len)
    }

    /// Marks what is written from now on, for the dirty log of a machine.
    pub(crate) fn log_writes(&mut self) {
        self.written = Some(DirtyLog::new(self.bytes()));
    }

    /// Marks pages of the region as written.
    pub(crate) fn mark(&self, gpa: Gpa, bytes: usize) {
        let offset = gpa.get().checked_sub(self.gpa.get());
        if let (Some(log), Some(offset)) = (&self.written, offset) {
            log.mark(offset, bytes);
        }
    }

    /// True if the page of that address is marked.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn is_marked(&self, gpa: Gpa) -> bool {
        let offset = gpa.get().checked_sub(self.gpa.get());
        matches!((&self.written, offset), (Some(log), Some(offset)) if log.is_marked(offset))
    }

    /// Takes the marks, and adds them to a bitmap of the region.
    pub(crate) fn take_written(&self, bitmap: &mut [u64]) {
        if let Some(log) = &self.written {
            log.take(bitmap);
        }
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegion")
            .field("gpa", &self.gpa)
            .field("bytes", &self.bytes())
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}
