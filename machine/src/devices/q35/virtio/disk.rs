//! Disk images: the file, and the counts of what a guest did with it.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::MachineError;

/// Counts that the machine reads while the disk is in use.
pub(in super::super) type SharedCounts = Arc<Mutex<DiskCounts>>;

/// Bytes of a sector, the unit of virtio's requests.
pub(super) const SECTOR: u64 = 512;

/// A disk image: the sectors are the bytes of a regular file ("raw").
///
/// The file is locked while it is in use: one machine may write it, or several may read it.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    counts: SharedCounts,
}

impl Disk {
    /// Opens a disk image to be read and written.
    ///
    /// # Errors
    /// [`MachineError::Disk`] if the file cannot be opened or is in use, [`MachineError::NotAFile`], and
    /// [`MachineError::DiskSize`] if its size is no multiple of 512 bytes, or zero.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, MachineError> {
        Self::of(path.as_ref(), false)
    }

    /// Opens a disk image that the guest cannot write.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, MachineError> {
        Self::of(path.as_ref(), true)
    }

    fn of(path: &Path, read_only: bool) -> Result<Self, MachineError> {
        let failed = |source| MachineError::Disk {
            path: path.to_owned(),
            source,
        };
        // A pipe would keep whoever opens it.
        let about = std::fs::metadata(path).map_err(failed)?;
        if !about.is_file() {
            return Err(MachineError::NotAFile {
                path: path.to_owned(),
            });
        }
        let file = File::options().read(true).write(!read_only).open(path);
        let file = file.map_err(failed)?;
        lock(&file, read_only).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(MachineError::DiskSize {
                path: path.to_owned(),
                bytes,
            });
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            sectors: bytes / SECTOR,
            read_only,
            counts: SharedCounts::default(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the disk.
    pub const fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// True if the guest cannot write it.
    pub const fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The counts, which grow while the disk is in use.
    pub(in super::super) fn counts(&self) -> SharedCounts {
        SharedCounts::clone(&self.counts)
    }

    /// Changes the counts.
    pub(super) fn count(&self, change: impl FnOnce(&mut DiskCounts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The first byte of a run of sectors; `None` if the disk does not have all of them.
    pub(super) fn place(&self, sector: u64, bytes: u64) -> Option<u64> {
        let first = sector.checked_mul(SECTOR)?;
        let end = first.checked_add(bytes)?;
        (bytes.is_multiple_of(SECTOR) && end <= self.bytes()).then_some(first)
    }

    pub(super) fn read(&self, at: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, at)
    }

    pub(super) fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, at)
    }

    /// Waits until what was written is on the host's disk.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Locks a file for this machine, or for all that read it.
fn lock(file: &File, shared: bool) -> io::Result<()> {
    let locked = match shared {
        true => file.try_lock_shared(),
        false => file.try_lock(),
    };
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => {
            io::Error::new(io::ErrorKind::ResourceBusy, "another machine uses it")
        }
        TryLockError::Error(error) => error,
    })
}

/// The things that a guest did with a disk.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounts {
    /// Requests to read that succeeded.
    pub reads: u64,
    /// Bytes that they read.
    pub bytes_read: u64,
    /// Requests to write that succeeded.
    pub writes: u64,
    /// Bytes that they wrote.
    pub bytes_written: u64,
    /// Requests to write caches back that succeeded.
    pub flushes: u64,
    /// Requests that were answered with an error, or as not supported.
    pub failed: u64,
    /// Times that the device was told to use memory which the guest keeps private. It used none of it, and needed a reset.
    pub private: u64,
    /// Times that the driver broke the protocol, those of `private` among them: the device stopped until it was reset.
    pub resets_needed: u64,
}
