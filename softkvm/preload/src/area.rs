//! The memory that a vCPU shares with the program: a file in memory, which the program maps, and our
//! mapping of it.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ops_softkvm::RunArea;
use kvm_ops_uapi::run::{COALESCED_MMIO_PAGE, MMAP_SIZE};
use libc::{c_int, c_void, off_t};

use crate::{raw, signals};

const LEN: usize = MMAP_SIZE as usize;
const PAGE: usize = 4096;
/// Where the ring of coalesced writes is, a page that all vCPUs of a VM share.
const RING: usize = COALESCED_MMIO_PAGE as usize * PAGE;

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
    /// The run area as one of ours. `None` for another process', of which there is none.
    pub(crate) fn of(area: &dyn RunArea) -> Option<&Self> {
        <dyn Any>::downcast_ref(area)
    }

    /// Maps a file in memory of the right length. With another vCPU of the VM, the ring is that one's.
    pub(crate) fn map(fd: c_int, other: Option<&Self>) -> Option<Self> {
        if !raw::set_len(fd, MMAP_SIZE) {
            return None;
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe { raw::mmap(std::ptr::null_mut(), LEN, prot, libc::MAP_SHARED, fd, 0) };
        let bytes = NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED)?;
        let area = Self {
            bytes,
            mask: Mutex::default(),
        };
        let shown = other.is_none_or(|other| {
            // SAFETY: the page is in our new mapping, to which nothing refers.
            unsafe { other.show_ring(at.cast::<u8>().add(RING).cast()) }
        });
        shown.then_some(area)
    }

    /// Maps the ring in place of a page of the program's or ours, for reading and writing.
    ///
    /// # Safety
    /// The page is a mapping of a run area's file.
    unsafe fn show_ring(&self, page: *mut c_void) -> bool {
        // SAFETY: the offset is in our mapping.
        let ring = unsafe { self.bytes.as_ptr().add(RING) };
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // An old length of 0 makes a second mapping of shared pages.
        let args = [ring as u64, 0, PAGE as u64, flags as u64, page as u64, 0];
        // SAFETY: the old mapping stays, and the caller's promise.
        unsafe { raw::syscall(libc::SYS_mremap, args) == page as i64 }
    }

    /// Puts the ring into the program's new mapping of the file, if it has the ring's page.
    ///
    /// # Safety
    /// `len` bytes at `at` map the area's file from an offset on.
    pub(crate) unsafe fn complete(
        &self,
        at: *mut c_void,
        len: usize,
        offset: off_t,
        prot: c_int,
    ) -> bool {
        let Some(distance) = usize::try_from(offset)
            .ok()
            .and_then(|offset| RING.checked_sub(offset))
        else {
            return true;
        };
        if distance >= len {
            return true;
        }
        // SAFETY: the distance is less than the mapping's length.
        let page = unsafe { at.cast::<u8>().add(distance) };
        let args = [page as u64, PAGE as u64, prot as u64, 0, 0, 0];
        // SAFETY: the page is part of that mapping, which is new.
        unsafe { self.show_ring(page.cast()) && raw::syscall(libc::SYS_mprotect, args) == 0 }
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
