//! The program's memory, read and written by the kernel, so that a bad address is an answer and not
//! a signal.

use kvm_ops_softkvm::Fault;
use libc::{c_long, c_void, iovec};

use crate::own::own;
use crate::raw;

fn copy(call: c_long, ours: *mut c_void, address: u64, len: usize) -> Result<(), Fault> {
    if len == 0 {
        return Ok(());
    }
    let local = iovec {
        iov_base: ours,
        iov_len: len,
    };
    let remote = iovec {
        iov_base: address as *mut c_void,
        iov_len: len,
    };
    let vectors = [&raw const local as u64, &raw const remote as u64];
    let args = [u64::from(own().id), vectors[0], 1, vectors[1], 1, 0];
    // SAFETY: both vectors live through the call; the local one names `len` bytes of the caller's,
    // and the other is the kernel's to check.
    let copied = unsafe { raw::syscall(call, args) };
    if copied == len as i64 {
        Ok(())
    } else {
        Err(Fault)
    }
}

pub(crate) fn read(address: u64, into: &mut [u8]) -> Result<(), Fault> {
    copy(
        libc::SYS_process_vm_readv,
        into.as_mut_ptr().cast(),
        address,
        into.len(),
    )
}

pub(crate) fn write(address: u64, bytes: &[u8]) -> Result<(), Fault> {
    let ours = bytes.as_ptr().cast_mut().cast();
    copy(libc::SYS_process_vm_writev, ours, address, bytes.len())
}
