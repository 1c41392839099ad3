//! Guest memory: RAM with the hole below 4 GiB, and the ROM in that hole.

use std::fmt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use kvm_ops::{Gpa, HostRange, MemSlot, PAGE_SIZE, SlotId};

use crate::MachineError;
use crate::layout::{FOUR_GIB, RAM_HOLE, RAM_MAX};

/// The memory of a machine: anonymous memory of this process, lent to the VM slot by slot.
///
/// Reads and writes are volatile, since the guest changes the memory at any time; there is no way
/// to a Rust reference into it. The guest cannot write the ROM; this type can.
pub struct GuestRam {
    map: GuestMemoryMmap,
    ram: u64,
    rom: u64,
    /// True if the guest may write the memory that ends at 4 GiB: a confidential VM has no read-only memory.
    rom_writable: bool,
}

impl GuestRam {
    /// Maps `ram` bytes of RAM and `rom` bytes of ROM that end at 4 GiB.
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
        let ranges: Vec<_> = [
            (0, ram.min(RAM_HOLE)),
            (FOUR_GIB - rom, rom),
            (FOUR_GIB, ram.saturating_sub(RAM_HOLE)),
        ]
        .into_iter()
        .filter(|(_, bytes)| *bytes != 0)
        .map(|(start, bytes)| (GuestAddress(start), bytes as usize))
        .collect();
        let map = GuestMemoryMmap::from_ranges(&ranges).map_err(|source| MachineError::Map {
            bytes: ram,
            source: Box::new(source),
        })?;
        Ok(Self {
            map,
            ram,
            rom,
            rom_writable,
        })
    }

    /// Bytes of RAM, without the ROM.
    pub const fn size(&self) -> u64 {
        self.ram
    }

    /// The end of the RAM below 4 GiB.
    pub const fn low_end(&self) -> Gpa {
        if self.ram < RAM_HOLE {
            Gpa::new(self.ram)
        } else {
            Gpa::new(RAM_HOLE)
        }
    }

    /// The RAM as ranges of first byte and size.
    pub fn ram_ranges(&self) -> impl Iterator<Item = (Gpa, u64)> {
        let low = self.low_end().get();
        [(Gpa::new(0), low), (Gpa::new(FOUR_GIB), self.ram - low)]
            .into_iter()
            .filter(|(_, bytes)| *bytes != 0)
    }

    /// Reads memory into `data`.
    ///
    /// # Errors
    /// [`MachineError::Access`] where the range is not all memory; `data` may be filled in part.
    pub fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), MachineError> {
        let bytes = data.len();
        self.map
            .read_slice(data, GuestAddress(gpa.get()))
            .map_err(|source| MachineError::Access { gpa, bytes, source })
    }

    /// Writes `data` to memory.
    ///
    /// # Errors
    /// [`MachineError::Access`] where the range is not all memory; it may be written in part.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MachineError> {
        self.map
            .write_slice(data, GuestAddress(gpa.get()))
            .map_err(|source| MachineError::Access {
                gpa,
                bytes: data.len(),
                source,
            })
    }

    /// The memory as the rust-vmm crates know it, for devices and loaders of the embedder.
    pub const fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// A slot for each region, numbered from 0, the ROM read-only.
    ///
    /// Whoever puts them into a VM keeps this value until they are deleted from it, or the VM is
    /// gone.
    pub(crate) fn slots(&self, log_dirty: bool) -> Result<Vec<MemSlot>, MachineError> {
        let step = "describe a memory slot";
        (0..)
            .zip(self.map.iter())
            .map(|(id, region)| {
                let start = region.start_addr();
                let host =
                    self.map
                        .get_host_address(start)
                        .map_err(|source| MachineError::Access {
                            gpa: Gpa::new(start.0),
                            bytes: 0,
                            source,
                        })?;
                // SAFETY: the region is mapped readable and writable for as long as `self` lives,
                // which the machine keeps until the slot is deleted or leaks (`Machine::tear_down`).
                // vm-memory hands out volatile accesses and raw pointers only, no references.
                let host = unsafe { HostRange::new(host as u64, region.len()) }
                    .map_err(|source| MachineError::Step { step, source })?;
                let mut slot = MemSlot::new(SlotId(id), Gpa::new(start.0), host);
                slot.flags.read_only = !self.rom_writable && self.is_rom(slot.gpa);
                slot.flags.log_dirty = log_dirty && !slot.flags.read_only;
                Ok(slot)
            })
            .collect()
    }

    fn is_rom(&self, gpa: Gpa) -> bool {
        (FOUR_GIB - self.rom..FOUR_GIB).contains(&gpa.get())
    }
}

impl fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRam")
            .field("ram", &self.ram)
            .field("rom", &self.rom)
            .finish()
    }
}
