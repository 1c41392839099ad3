//! Memory as the start maps it: the first 512 GiB to themselves, private, and once more from the middle of the address space
//! on, shared.

use core::arch::asm;

use kvm_ops_guest::instructions::Translate;
use kvm_ops_guest::{Flush, GpaRange, PageSize, SharedBuffer};

/// The start of shared memory.
const SHARED: u64 = 0xffff_8000_0000_0000;
/// Bytes of a line of the caches.
const LINE: usize = 64;

/// Memory that the host sees.
pub struct Shared {
    start: *mut u8,
}

impl Shared {
    /// The memory of a range.
    ///
    /// # Safety
    /// The guest has shared the range, and uses it by this value alone.
    pub unsafe fn new(range: GpaRange) -> Self {
        Self {
            start: (SHARED + range.start()) as *mut u8,
        }
    }
}

impl SharedBuffer for Shared {
    fn read(&mut self, offset: usize, bytes: &mut [u8]) {
        for (n, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: the offsets that are asked for lie in the range, which is mapped. The host may write it at any time, so
            // each byte is read once.
            *byte = unsafe { self.start.add(offset + n).read_volatile() };
        }
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            // SAFETY: as above.
            unsafe { self.start.add(offset + n).write_volatile(*byte) };
        }
    }
}

/// The private mapping.
pub struct Identity;

impl Translate for Identity {
    fn private(&self, gpa: u64, _: PageSize) -> u64 {
        gpa
    }
}

/// Flushes what a conversion asks for, on the only vCPU. Both mappings stay; the kernel uses one of them at a time.
pub fn flush(range: GpaRange, what: Flush) {
    if what.caches {
        for line in (range.start()..range.end()).step_by(LINE) {
            // SAFETY: the line is mapped as private, and CLFLUSH changes no memory.
            unsafe { asm!("clflush [{}]", in(reg) line, options(nostack, preserves_flags)) };
        }
    }
    if what.tlb {
        // SAFETY: CR3 gets the value that it has.
        unsafe {
            asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags))
        };
    }
}
