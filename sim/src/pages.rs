//! Physical memory that the machine gives to firmware and to confidential guests.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ops::{Error, Field, Hpa, Level, PagePort, Pfn, Result};

use crate::frames::Frames;

/// Memory of a software platform, as the host reads and writes it.
pub(crate) trait HostMemory: Send + Sync {
    fn write(&self, at: Hpa, data: &[u8]) -> Result<()>;
    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()>;
}

/// The physical memory of a software machine that holds confidential VMs.
pub struct SoftPages {
    frames: Mutex<Frames>,
    memory: Box<dyn HostMemory>,
}

impl SoftPages {
    pub(crate) fn new(frames: Frames, memory: impl HostMemory + 'static) -> Self {
        Self {
            frames: Mutex::new(frames),
            memory: Box::new(memory),
        }
    }

    fn frames(&self) -> MutexGuard<'_, Frames> {
        // No operation of the allocator panics half-way.
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many 4 KiB frames were ever given out, each time counted; a 2 MiB page counts as 512.
    pub fn frames_taken(&self) -> u64 {
        self.frames().taken()
    }

    /// How many 4 KiB frames are given out and did not come back; a 2 MiB page counts as 512.
    pub fn frames_out(&self) -> u64 {
        self.frames().out()
    }
}

impl PagePort for SoftPages {
    fn alloc(&self, level: Level) -> Result<Pfn> {
        if !matches!(level, Level::Size4K | Level::Size2M) {
            return Err(Error::Invalid(Field::Level, level as u64));
        }
        let frame = self.frames().alloc(level).ok_or(Error::NoMemory)?;
        Ok(Pfn::new(frame))
    }

    /// A page that is not given out, or not whole, is ignored. A 2 MiB page may come back in
    /// pieces of 4 KiB.
    fn free(&self, page: Pfn, level: Level) {
        self.frames().free(page.get(), level);
    }

    fn write(&self, at: Hpa, data: &[u8]) -> Result<()> {
        self.memory.write(at, data)
    }

    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()> {
        self.memory.read(at, data)
    }
}

impl fmt::Debug for SoftPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftPages")
            .field("frames_out", &self.frames_out())
            .finish_non_exhaustive()
    }
}

/// The error for an address that is not memory.
pub(crate) const fn no_memory_at(at: Hpa) -> Error {
    Error::Invalid(Field::HostAddress, at.get())
}
