//! Memory that the program lends to its guests.

use std::sync::Arc;

use kvm_ops::HostRange;
use kvm_ops_softkvm::FileMemory;
use libc::{c_int, c_void, off_t};

use crate::raw;

/// True if all of a range is mapped now, in whatever way.
pub(crate) fn is_mapped(address: u64, bytes: u64) -> bool {
    let args = [address, bytes, libc::MS_ASYNC as u64, 0, 0, 0];
    // SAFETY: the call writes nothing to the range, and fails for one that is not mapped.
    unsafe { raw::syscall(libc::SYS_msync, args) == 0 }
}

/// Our mapping of a guest_memfd.
struct Mapping(HostRange);

/// Maps part of a guest_memfd.
pub(crate) fn map(fd: c_int, offset: u64, bytes: u64) -> Option<Arc<dyn FileMemory>> {
    let len = usize::try_from(bytes).ok()?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let at = std::ptr::null_mut();
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let at: *mut c_void = unsafe { raw::mmap(at, len, prot, flags, fd, offset as off_t) };
    if at == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the mapping is this value's, which the slot keeps until it is taken back, and nothing else
    // refers to it.
    let range = unsafe { HostRange::new(at as u64, bytes) }.ok()?;
    Some(Arc::new(Mapping(range)))
}

impl FileMemory for Mapping {
    fn range(&self) -> HostRange {
        self.0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let args = [self.0.address(), self.0.bytes(), 0, 0, 0, 0];
        // SAFETY: our mapping, which no slot has any more.
        unsafe { raw::syscall(libc::SYS_munmap, args) };
    }
}
