//! The memory that a vCPU shares with the program: a file in memory, which the program maps, and our
//! mapping of it.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ops_softkvm::RunArea;
use kvm_ops_uapi::run::MMAP_SIZE;
use libc::c_int;

use crate::{raw, signals};

const LEN: usize = MMAP_SIZE as usize;

pub(crate) struct Area {
    bytes: NonNull<AtomicU8>,
    /// Signals that do not count, if the program says which.
    mask: Mutex<Option<u64>>,
}

// SAFETY: the mapping belongs to the value, and is only touched as atomic bytes.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// Maps a file in memory of the right length.
    pub(crate) fn map(fd: c_int) -> Option<Self> {
        if !raw::set_len(fd, MMAP_SIZE) {
            return None;
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe { raw::mmap(std::ptr::null_mut(), LEN, prot, libc::MAP_SHARED, fd, 0) };
        (at != libc::MAP_FAILED)
            .then(|| NonNull::new(at.cast()))
            .flatten()
            .map(|bytes| Self {
                bytes,
                mask: Mutex::default(),
            })
    }

    fn mask(&self) -> MutexGuard<'_, Option<u64>> {
        self.mask.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: `LEN` bytes are mapped until the value is dropped, and the file has them: the
        // program gets EINVAL for changing its length. Bytes that the program writes meanwhile are
        // why they are atomic.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr(), LEN) }
    }

    fn from(&self, offset: u64) -> &[AtomicU8] {
        let bytes = self.bytes();
        let from = usize::try_from(offset).map_or(LEN, |from| from.min(LEN));
        &bytes[from..]
    }
}

impl RunArea for Area {
    fn read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        for (to, byte) in into.iter_mut().zip(self.from(offset)) {
            *to = byte.load(Ordering::Relaxed);
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        for (byte, from) in self.from(offset).iter().zip(bytes) {
            byte.store(*from, Ordering::Relaxed);
        }
    }

    fn signal_pending(&self) -> bool {
        signals::pending(*self.mask())
    }

    fn set_signal_mask(&self, mask: Option<u64>) {
        *self.mask() = mask;
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: our mapping, which nothing refers to any more.
        unsafe { libc::munmap(self.bytes.as_ptr().cast(), LEN) };
    }
}
