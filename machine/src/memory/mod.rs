//! Guest memory: the machine's or the embedder's, RAM with the hole below 4 GiB, and the ROM in that hole.

mod device;
mod dirty;
mod region;
#[cfg(feature = "vm-memory")]
mod rust_vmm;
#[cfg(test)]
mod tests;

use kvm_ops::{Gpa, MemSlot, PAGE_SIZE, SlotId};

pub use device::{DeviceMemory, SharedFrames};
pub use region::MemoryRegion;
#[cfg(feature = "vm-memory")]
pub use rust_vmm::Written;

use crate::MachineError;
use crate::error::REGION;
use crate::layout::{FOUR_GIB, RAM_MAX, low_ram};

/// The memory of a machine, lent to the VM slot by slot.
///
/// By default it is anonymous memory of this process ([`MachineConfig::memory`]). An embedder that has
/// memory already makes one of that ([`from_regions`](Self::from_regions)) and hands it over with
/// [`MachineConfig::guest_ram`].
///
/// Reads and writes are volatile, since the guest changes the memory at any time; there is no way
/// to a Rust reference into it. They are the host's: they reach the ROM too, and they know nothing of
/// private memory, which a confidential guest keeps elsewhere.
///
/// [`MachineConfig::memory`]: crate::MachineConfig::memory
/// [`MachineConfig::guest_ram`]: crate::MachineConfig::guest_ram
#[derive(Debug)]
pub struct GuestRam {
    /// Sorted, without overlaps.
    regions: Vec<MemoryRegion>,
}

impl GuestRam {
    /// Maps `ram` bytes of RAM and `rom` bytes of ROM that end at 4 GiB. A guest whose `rom_writable` is
    /// true may write the ROM too: a confidential VM has no read-only memory.
    pub(crate) fn new(ram: u64, rom: u64, rom_writable: bool) -> Result<Self, MachineError> {
        let bad_size = |problem| MachineError::MemorySize {
            bytes: ram,
            problem,
        };
        if ram == 0 {
            return Err(bad_size("no memory"));
        }
        if !ram.is_multiple_of(PAGE_SIZE) {
            return Err(bad_size("not a multiple of 4 KiB"));
        }
        if ram > RAM_MAX {
            return Err(bad_size("more than 1 TiB"));
        }
        let low = low_ram(ram);
        let mut regions = vec![MemoryRegion::anonymous(Gpa::new(0), low)?];
        if ram > low {
            let high = MemoryRegion::anonymous(Gpa::new(FOUR_GIB), ram - low)?;
            regions.push(high);
        }
        Self::from_regions(regions)?.with_rom(rom, rom_writable)
    }

    /// Takes the regions of an embedder's own memory. Their order does not matter.
    ///
    /// Images, and the memory map that a kernel gets, need RAM from address 0 on, as a PC has it. A
    /// ROM image gets memory of the machine's own, unless a region lies where it belongs.
    ///
    /// ```
    /// use std::alloc::{Layout, alloc_zeroed};
    /// use std::sync::Arc;
    ///
    /// use kvm_ops::{Gpa, Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{GuestRam, Machine, MachineConfig, MemoryRegion, RunLimits};
    ///
    /// const BYTES: usize = 1 << 20;
    /// let layout = Layout::from_size_align(BYTES, 4096)?;
    /// // SAFETY: the layout is not empty. Nothing frees the memory or makes a reference to it.
    /// let region = unsafe {
    ///     MemoryRegion::new(Gpa::new(0), alloc_zeroed(layout), BYTES as u64, Arc::new(()))?
    /// };
    /// let ram = GuestRam::from_regions([region])?;
    /// let program = Script::new().write(Gpa::new(0x1000), b"guest");
    /// let config = MachineConfig::new().guest_ram(ram).program(program);
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// machine.run(&machine.devices(Default::default()), RunLimits::none())?;
    /// let mut read = [0; 5];
    /// machine.memory().read(Gpa::new(0x1000), &mut read)?;
    /// assert_eq!(&read, b"guest");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`MachineError::MemorySize`] without RAM; [`MachineError::Overlap`] for two regions at one
    /// address.
    pub fn from_regions(
        regions: impl IntoIterator<Item = MemoryRegion>,
    ) -> Result<Self, MachineError> {
        let mut regions: Vec<_> = regions.into_iter().collect();
        regions.sort_by_key(MemoryRegion::gpa);
        if !regions.iter().any(MemoryRegion::is_ram) {
            return Err(MachineError::MemorySize {
                bytes: 0,
                problem: "no memory",
            });
        }
        for pair in regions.windows(2) {
            if pair[0].end() > pair[1].gpa() {
                return Err(MachineError::Overlap {
                    what: REGION,
                    start: pair[1].gpa(),
                    end: pair[1].end(),
                    with: "the region before it",
                });
            }
        }
        Ok(Self { regions })
    }

    /// Adds a ROM of that many bytes that ends at 4 GiB, unless there is memory.
    pub(crate) fn with_rom(self, bytes: u64, guest_writes: bool) -> Result<Self, MachineError> {
        let at = Gpa::new(FOUR_GIB - bytes);
        if bytes == 0 || self.is_memory(at, bytes) {
            return Ok(self);
        }
        let rom = MemoryRegion::anonymous(at, bytes)?.rom(guest_writes);
        Self::from_regions(self.regions.into_iter().chain([rom]))
    }

    /// The regions, in the order of their addresses.
    pub fn regions(&self) -> impl Iterator<Item = &MemoryRegion> {
        self.regions.iter()
    }

    /// Bytes of RAM, without what the guest cannot write.
    pub fn size(&self) -> u64 {
        self.ram_ranges().map(|(_, bytes)| bytes).sum()
    }

    /// The end of the RAM that begins at address 0; 0 if none does. On a machine's own memory that is
    /// less than 2.75 GiB.
    pub fn low_end(&self) -> Gpa {
        match self.ram_ranges().next() {
            Some((start, bytes)) if start.get() == 0 => Gpa::new(bytes.min(FOUR_GIB)),
            _ => Gpa::new(0),
        }
    }

    /// The RAM as ranges of first byte and size, adjacent regions as one.
    pub fn ram_ranges(&self) -> impl Iterator<Item = (Gpa, u64)> {
        let mut regions = self.regions.iter().filter(|region| region.is_ram());
        let mut next = regions.next();
        std::iter::from_fn(move || {
            let first = next?;
            let mut end = first.end();
            loop {
                next = regions.next();
                match next {
                    Some(region) if region.gpa() == end => end = region.end(),
                    _ => return Some((first.gpa(), end.get() - first.gpa().get())),
                }
            }
        })
    }

    /// The region that the address lies in.
    fn region(&self, gpa: Gpa) -> Option<&MemoryRegion> {
        let after = self.regions.partition_point(|region| region.gpa() <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (gpa < region.end()).then_some(region)
    }

    /// True if all of the range is memory.
    fn is_memory(&self, gpa: Gpa, bytes: u64) -> bool {
        let (mut at, mut left) = (gpa, bytes);
        while left != 0 {
            let Some(region) = self.region(at) else {
                return false;
            };
            left = left.saturating_sub(region.end().get() - at.get());
            at = region.end();
        }
        true
    }

    /// Reads memory into `data`.
    ///
    /// ```
    /// # use kvm_ops::{Gpa, Vendor, sim::SimHost};
    /// # use kvm_ops_machine::{Machine, MachineConfig, MachineError};
    /// # let config = MachineConfig::new().memory(1 << 20);
    /// # let machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// let memory = machine.memory();
    /// memory.write(Gpa::new(0x1ffe), b"text")?; // across two pages
    /// let mut data = [0; 4];
    /// memory.read(Gpa::new(0x1ffe), &mut data)?;
    /// assert_eq!(&data, b"text");
    /// let outside = memory.read(Gpa::new(1 << 20), &mut data).unwrap_err();
    /// assert_eq!(outside.to_string(), "no memory at 0x100000 for 0x4 bytes");
    /// # Ok::<(), MachineError>(())
    /// ```
    ///
    /// # Errors
    /// [`MachineError::Access`] where the range is not all memory; `data` may be filled in part.
    pub fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), MachineError> {
        let bytes = data.len();
        walk(gpa, bytes, |at, done| {
            self.region(at)?.read(at, &mut data[done..])
        })
    }

    /// Writes `data` to memory.
    ///
    /// # Errors
    /// [`MachineError::Access`] where the range is not all memory, or
    /// [read-only](MemoryRegion::read_only) for the host; it may be written in part.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MachineError> {
        walk(gpa, data.len(), |at, done| {
            self.region(at)?.write(at, &data[done..])
        })
    }

    /// Fills a range with zeros. Pages that are zero already are only read, so that memory without
    /// pages stays so.
    pub(crate) fn clear(&self, gpa: Gpa, bytes: u64) -> Result<(), MachineError> {
        const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        let mut page = ZEROS;
        walk(gpa, bytes as usize, |at, done| {
            let len = (bytes as usize - done).min(page.len());
            let len = self.region(at)?.read(at, &mut page[..len])?;
            if page[..len] == ZEROS[..len] {
                return Some(len);
            }
            self.region(at)?.write(at, &ZEROS[..len])
        })
    }

    /// Marks what is written from now on.
    pub(crate) fn log_writes(&mut self) {
        self.regions.iter_mut().for_each(MemoryRegion::log_writes);
    }

    /// Takes the marks of the region at that address, and adds them to its bitmap.
    pub(crate) fn take_written(&self, gpa: Gpa, bitmap: &mut [u64]) {
        if let Some(region) = self.region(gpa) {
            region.take_written(bitmap);
        }
    }

    /// A slot for each region, numbered from 0.
    ///
    /// Whoever puts them into a VM keeps this value until they are deleted from it, or the VM is
    /// gone.
    pub(crate) fn slots(&self, log_dirty: bool) -> Vec<MemSlot> {
        (0..)
            .zip(&self.regions)
            .map(|(id, region)| {
                let mut slot = MemSlot::new(SlotId(id), region.gpa(), region.host());
                slot.flags.read_only = !region.guest_writes();
                slot.flags.log_dirty = log_dirty && region.guest_writes();
                slot
            })
            .collect()
    }
}

/// Calls `piece` with address and offset until all bytes are done.
fn walk(
    gpa: Gpa,
    bytes: usize,
    mut piece: impl FnMut(Gpa, usize) -> Option<usize>,
) -> Result<(), MachineError> {
    let mut done = 0;
    while done < bytes {
        done += gpa
            .checked_add(done as u64)
            .and_then(|at| piece(at, done))
            .ok_or(MachineError::Access { gpa, bytes })?;
    }
    Ok(())
}
