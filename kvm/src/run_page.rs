//! The pages that a vCPU shares with the kernel (`struct kvm_run` and the I/O data behind it).
//!
//! kvm-ioctls maps them too, but hands out only `&mut kvm_run`, which no other thread may touch
//! meanwhile. Kicks write one byte of it from other threads, so this is a second mapping, of which
//! only single fields are ever borrowed.

use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU8;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use kvm_ops::{Call, Result};

use crate::error::from_errno;

/// A mapping of a vCPU's shared pages.
#[derive(Debug)]
pub(crate) struct RunPage {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to no thread. All access from `&self` is to `immediate_exit`, an
// atomic; access to the rest goes through `run`, whose callers own the vCPU.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the shared pages of a vCPU; `bytes` is the answer of `KVM_GET_VCPU_MMAP_SIZE`.
    pub(crate) fn map(vcpu: &VcpuFd, bytes: usize) -> Result<Self> {
        if bytes < size_of::<kvm_run>() {
            // No Linux answers that; the fields would lie outside of the mapping.
            return Err(from_errno(Call::Mmap, libc::EINVAL));
        }
        Self::mmap(bytes, libc::MAP_SHARED, vcpu.as_raw_fd())
    }

    /// Memory that no kernel fills, for tests of the code that reads it.
    #[cfg(test)]
    pub(crate) fn anonymous(bytes: usize) -> Self {
        assert!(bytes >= size_of::<kvm_run>());
        Self::mmap(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).unwrap()
    }

    fn mmap(bytes: usize, flags: i32, fd: i32) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let address = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            let errno = std::io::Error::last_os_error().raw_os_error();
            return Err(from_errno(Call::Mmap, errno.unwrap_or(0)));
        }
        match NonNull::new(address.cast()) {
            Some(base) => Ok(Self { base, bytes }),
            None => Err(from_errno(Call::Mmap, libc::EINVAL)),
        }
    }

    /// The first byte; the structure is valid for `bytes()` from here.
    pub(crate) fn run(&self) -> *mut kvm_run {
        self.base.as_ptr().cast()
    }

    /// The number of mapped bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The byte that makes `KVM_RUN` return at once.
    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        let offset = offset_of!(kvm_run, immediate_exit);
        // SAFETY: inside the mapping (`map` checked its size), which lives as long as `self`;
        // every access of this process to the byte is atomic, and the kernel only reads it.
        unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(offset)) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every borrow of it ended with `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
