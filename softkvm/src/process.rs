//! The caller: its memory and its descriptors.

use std::any::Any;
use std::sync::Arc;

use kvm_ops::HostRange;
use kvm_ops_uapi::Errno;

use crate::File;

/// The identity of an address space: a process, not a thread. A forked child has another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressSpace(pub u64);

/// An address that is not mapped, or not for this access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// How much memory a process may pin, in pages of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinLimits {
    /// The machine's memory.
    pub total: u64,
    /// What the process may lock: RLIMIT_MEMLOCK. No limit with CAP_IPC_LOCK.
    pub locked: u64,
}

impl PinLimits {
    /// As much as there are numbers for.
    pub const NONE: Self = Self {
        total: u64::MAX,
        locked: u64::MAX,
    };
}

/// What a descriptor number stands for.
#[derive(Clone, Debug)]
pub enum Descriptor {
    /// Nothing.
    Closed,
    /// An open file of somebody else's.
    Foreign,
    /// One of ours.
    File(File),
}

/// The process that makes a call. The kernel knows its caller; a library has to be told.
///
/// Numbers of descriptors go through three steps, as in the kernel, so that a call that has made its
/// object cannot fail for want of a number: `reserve`, then `install` or `release`.
pub trait Process {
    /// The caller's address space.
    fn address_space(&self) -> AddressSpace;

    /// Copies memory in.
    ///
    /// # Errors
    /// [`Fault`] if any of it cannot be read.
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Fault>;

    /// Copies memory out.
    ///
    /// # Errors
    /// [`Fault`] if any of it cannot be written. What precedes it may have been.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault>;

    /// True if each page of a range is mapped and can be read. A range that wraps is not.
    fn is_mapped(&self, address: u64, bytes: u64) -> bool {
        pages(address, bytes)
            .is_some_and(|mut pages| pages.all(|at| self.read(at, &mut [0]).is_ok()))
    }

    /// True if each page of a range can also be written. A byte of each is written back as it was, so ask only for memory that
    /// nobody else writes.
    fn is_writable(&self, address: u64, bytes: u64) -> bool {
        let can_be_written = |at| {
            let mut byte = [0];
            self.read(at, &mut byte).is_ok() && self.write(at, &byte).is_ok()
        };
        pages(address, bytes).is_some_and(|mut pages| pages.all(can_be_written))
    }

    /// How much memory it may pin.
    fn pin_limits(&self) -> PinLimits {
        PinLimits::NONE
    }

    /// The file behind a number.
    fn descriptor(&self, number: i32) -> Descriptor;

    /// Takes a free number.
    ///
    /// # Errors
    /// EMFILE if there is none.
    fn reserve(&self) -> Result<i32, Errno>;

    /// Gives a reserved number its file.
    fn install(&self, number: i32, file: File);

    /// Gives a reserved number back.
    fn release(&self, number: i32);

    /// The eventfd behind a number.
    ///
    /// # Errors
    /// EBADF for a number that is not open, EINVAL for another file.
    fn eventfd(&self, number: i32) -> Result<Arc<dyn EventFd>, Errno> {
        match self.descriptor(number) {
            Descriptor::Closed => Err(Errno::EBADF),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Memory that a new vCPU shares with the process, of
    /// [`MMAP_SIZE`](kvm_ops_uapi::run::MMAP_SIZE) zero bytes. With another vCPU of its VM, its page
    /// [`COALESCED_MMIO_PAGE`](kvm_ops_uapi::run::COALESCED_MMIO_PAGE) is that one's.
    ///
    /// # Errors
    /// ENOMEM.
    fn run_area(&self, other: Option<&dyn RunArea>) -> Result<Arc<dyn RunArea>, Errno>;

    /// True if the calling thread has a signal to handle.
    fn signal_pending(&self) -> bool {
        false
    }

    /// Lends memory to the software machine for as long as a slot refers to it, or until
    /// [`Kernel::invalidate`](crate::Kernel::invalidate). The promise that it stays mapped is in making a [`HostRange`].
    /// `None`: an access of guest code to it then ends `KVM_RUN` as one to memory that is not mapped, and SEV commands
    /// answer as if it could not be pinned. Guests write to it only if it is `writable`.
    fn lend(&self, address: u64, bytes: u64, writable: bool) -> Option<HostRange> {
        let _ = (address, bytes, writable);
        None
    }

    /// Lends part of the guest_memfd behind a number in the same way. Its pages are the file's that the
    /// process sees. `None`: there is no memory.
    fn lend_file(&self, number: i32, offset: u64, bytes: u64) -> Option<Arc<dyn FileMemory>> {
        let _ = (number, offset, bytes);
        None
    }
}

/// The first byte of a range in each of its pages. `None` for a range that wraps.
fn pages(address: u64, bytes: u64) -> Option<impl Iterator<Item = u64>> {
    const PAGE: u64 = 4096;
    let last = address.checked_add(bytes.saturating_sub(1))?;
    let pages = (address & !(PAGE - 1)..=last).step_by(PAGE as usize);
    Some(pages.map(move |page| page.max(address)))
}

/// An eventfd of the process. The value keeps it, also when the process has closed its numbers.
pub trait EventFd: Send + Sync {
    /// Its identity: equal for all numbers of one eventfd.
    fn id(&self) -> u64;

    /// Adds 1 to the counter.
    fn signal(&self);

    /// Calls a function whenever the counter is not 0, also from the start, and takes the counter. The
    /// function may be called from any thread.
    ///
    /// # Errors
    /// EBUSY if a function is called for it already.
    fn watch(&self, wake: Box<dyn Fn() + Send + Sync>) -> Result<Box<dyn Watch>, Errno>;
}

/// The calls for an eventfd, which end when the value is dropped.
pub trait Watch: Send + Sync {}

/// Memory of a guest_memfd that is lent until the value is dropped.
pub trait FileMemory: Send + Sync {
    /// Where it is.
    fn range(&self) -> HostRange;
}

/// The memory behind the `mmap` of a vCPU's file. Those of a process are of one type, by which
/// [`Process::run_area`] knows its own.
pub trait RunArea: Any + Send + Sync {
    /// Copies `into.len()` bytes from `offset` on. What lies outside reads as zero.
    fn read(&self, offset: u64, into: &mut [u8]);

    /// Copies bytes to `offset`. What lies outside is dropped.
    fn write(&self, offset: u64, bytes: &[u8]);

    /// True if the calling thread, which runs the vCPU, has a signal to handle: `KVM_RUN` ends then.
    fn signal_pending(&self) -> bool {
        false
    }

    /// Sets the signals that do not count in `KVM_RUN` (bit n is signal n + 1), in place of those that the thread
    /// blocks; `None` for those.
    fn set_signal_mask(&self, mask: Option<u64>) {
        let _ = mask;
    }
}
