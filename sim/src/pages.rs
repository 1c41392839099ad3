//! Physical memory that the machine gives to firmware and to confidential guests.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::{Error, Field, Hpa, Level, Page, PagePort, Pfn, PortId, Result};

use crate::frames::Frames;

/// Memory of a software platform, as the host reads and writes it.
pub(crate) trait HostMemory: Send + Sync {
    fn write(&self, at: Hpa, data: &[u8]) -> Result<()>;
    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()>;
}

/// The physical memory of a software machine that holds confidential VMs. Clones are handles to it.
#[derive(Clone)]
pub struct SoftPages {
    id: PortId,
    frames: Arc<Mutex<Frames>>,
    memory: Arc<dyn HostMemory>,
}

impl SoftPages {
    pub(crate) fn new(frames: Frames, memory: impl HostMemory + 'static) -> Self {
        Self {
            id: PortId::new(),
            frames: Arc::new(Mutex::new(frames)),
            memory: Arc::new(memory),
        }
    }

    fn frames(&self) -> MutexGuard<'_, Frames> {
        // No operation of the allocator panics half-way.
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of 4 KiB frames ever given out, each time counted; a 2 MiB page counts as 512.
    pub fn frames_taken(&self) -> u64 {
        self.frames().taken()
    }

    /// The number of 4 KiB frames that are given out and did not come back; a 2 MiB page counts as 512.
    pub fn frames_out(&self) -> u64 {
        self.frames().out()
    }
}

impl PagePort for SoftPages {
    fn id(&self) -> PortId {
        self.id
    }

    fn alloc(&self, level: Level) -> Result<Page> {
        if !matches!(level, Level::Size4K | Level::Size2M) {
            return Err(Error::Invalid(Field::Level, level as u64));
        }
        let frame = self.frames().alloc(level).ok_or(Error::NoMemory)?;
        // SAFETY: the allocator gives out aligned frames of this memory, each once until it is freed.
        Ok(unsafe { Page::from_raw(Pfn::new(frame), level, self.id) })
    }

    /// A 2 MiB page may come back in pieces of 4 KiB, and pieces as one.
    fn free(&self, page: Page) -> Result<(), Page> {
        if page.port() == self.id && self.frames().free(page.pfn().get(), page.level()) {
            return Ok(());
        }
        tracing::error!(?page, "this memory did not give the page out");
        Err(page)
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
