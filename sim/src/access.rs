//! Guest accesses to memory: cut at pages, each piece through the second-level table.

use kvm_ops::guest::GuestFault;
use kvm_ops::{Error, Field, Gfn, Gpa, PAGE_SIZE, Privacy, Result, volatile};

use crate::vm::VmInner;

/// The bytes of one MMIO exit at the most, as on KVM.
const MMIO_BYTES: usize = 8;

/// The result of a piece of an access to shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many bytes were copied.
    Memory(usize),
    /// So many bytes must leave as MMIO.
    Mmio(usize),
    /// The frame is private: a shared access to it is a violation. Only in a confidential VM.
    NotShared,
}

/// The result of a piece of an access of a vCPU.
#[allow(dead_code)] // Only the encrypted memory of a SEV guest lets an access leave or fail.
pub(crate) enum Touch {
    Memory(usize),
    Mmio(usize),
    Fault(GuestFault),
    /// It leaves as a memory fault.
    Leave(Privacy),
    /// The run fails.
    Fail(Error),
}

/// The direction of an access, with the program's bytes.
pub(crate) enum Copy<'a> {
    FromGuest(&'a mut [u8]),
    ToGuest(&'a [u8]),
}

impl Copy<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::FromGuest(buffer) => buffer.len(),
            Self::ToGuest(buffer) => buffer.len(),
        }
    }

    /// Copies the first `len` bytes from or to host memory.
    ///
    /// # Safety
    /// `len` bytes from `host` on are mapped, and writable for [`Copy::ToGuest`], and no Rust
    /// reference to them exists.
    unsafe fn copy(&mut self, host: u64, len: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::FromGuest(buffer) => {
                    volatile::copy_from(host as *const u8, &mut buffer[..len]);
                }
                Self::ToGuest(buffer) => volatile::copy_to(host as *mut u8, &buffer[..len]),
            }
        }
    }
}

/// The offset of `gpa` in its page, and the number of the `len` bytes that lie in that page.
fn in_page(gpa: Gpa, len: usize) -> (u64, usize) {
    let offset = gpa.get() % PAGE_SIZE;
    (offset, len.min((PAGE_SIZE - offset) as usize))
}

/// Does the first piece of an access at `gpa`: the part in its page.
pub(crate) fn first_piece(vm: &VmInner, gpa: Gpa, copy: &mut Copy<'_>) -> Piece {
    let gfn = Gfn::containing(gpa);
    let write = matches!(copy, Copy::ToGuest(_));
    let (offset, len) = in_page(gpa, copy.len());
    loop {
        {
            let memory = vm.read();
            if let Some(mapping) = memory.lookup(gfn).filter(|m| m.writable || !write) {
                // SAFETY: the mapping comes from a slot that is not deleted, so by the contract of
                // `HostRange::new` its memory is mapped, writable where the mapping is, and no
                // Rust reference to it exists. The deletion of a slot takes the lock that is held
                // here for writing before it returns, so the memory stays valid for this block.
                // `offset + len` is at most one page, which the mapping covers.
                unsafe { copy.copy(mapping.host + offset, len) };
                return Piece::Memory(len);
            }
        }
        // Once resolved, another thread may zap the entry again before the copy: walk anew.
        let mut memory = vm.write();
        if memory.is_private(gfn) {
            return Piece::NotShared;
        }
        if memory.resolve(gfn, write).is_none() {
            return Piece::Mmio(len.min(MMIO_BYTES));
        }
    }
}

/// Reads or writes the memory of slots as the host does, private frames or not.
///
/// # Errors
/// [`Error::NotFound`] if a part of the range is in no slot, or in a read-only slot for a write.
pub(crate) fn host_access(vm: &VmInner, gpa: Gpa, mut copy: Copy<'_>) -> Result<()> {
    let memory = vm.read();
    let mut at = gpa;
    loop {
        let (offset, len) = in_page(at, copy.len());
        if len == 0 {
            return Ok(());
        }
        let write = matches!(copy, Copy::ToGuest(_));
        let not_found = Error::NotFound(Field::Gpa, at.get());
        let page = memory.slot_page(Gfn::containing(at), write);
        let host = page.ok_or(not_found)?;
        // SAFETY: as in `first_piece`: the slot is not deleted while the lock is held, its memory
        // is mapped, and writable for a write; `offset + len` is at most the page.
        unsafe { copy.copy(host + offset, len) };
        copy = match copy {
            Copy::FromGuest(buffer) => Copy::FromGuest(&mut buffer[len..]),
            Copy::ToGuest(buffer) => Copy::ToGuest(&buffer[len..]),
        };
        if copy.len() != 0 {
            at = at.checked_add(len as u64).ok_or(not_found)?;
        }
    }
}
