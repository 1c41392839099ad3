//! Guest accesses to memory: cut at pages, each piece through the second-level table.

use kvm_ops::{Error, Field, Gfn, Gpa, PAGE_SIZE, Result};
use vm_memory::VolatileSlice;

use crate::vm::VmInner;

/// The bytes of one MMIO exit at the most, as on KVM.
const MMIO_BYTES: usize = 8;

/// What a piece of an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many bytes were copied.
    Memory(usize),
    /// So many bytes must leave as MMIO.
    Mmio(usize),
    /// The frame is private: a shared access to it is a violation. Only in a confidential VM.
    #[cfg_attr(not(any(feature = "tdx", feature = "sev")), allow(dead_code))]
    NotShared,
}

/// What to do with memory.
pub(crate) enum Copy<'a> {
    FromGuest(&'a mut [u8]),
    ToGuest(&'a [u8]),
}

/// Does the first piece of an access at `gpa`: what lies in its page.
pub(crate) fn first_piece(vm: &VmInner, gpa: Gpa, copy: Copy<'_>) -> Piece {
    let gfn = Gfn::containing(gpa);
    let inside = (gpa.get() % PAGE_SIZE) as usize;
    let (write, len) = match &copy {
        Copy::FromGuest(buffer) => (false, buffer.len()),
        Copy::ToGuest(buffer) => (true, buffer.len()),
    };
    let len = len.min(PAGE_SIZE as usize - inside);
    loop {
        {
            let memory = vm.read();
            if let Some(mapping) = memory.lookup(gfn).filter(|m| m.writable || !write) {
                // SAFETY: the mapping comes from a slot that is not deleted, so by the contract of
                // `HostRange::new` its memory is mapped, writable where the mapping is, and no
                // Rust reference to it exists. The deletion of a slot takes the lock that is held
                // here for writing before it returns, so the memory stays valid for this block.
                // `inside + len` is at most one page, which the mapping covers.
                let page =
                    unsafe { VolatileSlice::new((mapping.host as *mut u8).add(inside), len) };
                match copy {
                    Copy::FromGuest(buffer) => page.copy_to(&mut buffer[..len]),
                    Copy::ToGuest(buffer) => {
                        page.copy_from(&buffer[..len]);
                        len
                    }
                };
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

/// Reads what slots lend, as the host does: private frames or not.
pub(crate) fn read_slot(vm: &VmInner, gpa: Gpa, data: &mut [u8]) -> Result<()> {
    let memory = vm.read();
    let mut done = 0;
    while done < data.len() {
        let not_found = Error::NotFound(Field::Gpa, gpa.get());
        let at = gpa.checked_add(done as u64).ok_or(not_found)?;
        let inside = (at.get() % PAGE_SIZE) as usize;
        let len = (PAGE_SIZE as usize - inside).min(data.len() - done);
        let mapping = memory.slot_page(Gfn::containing(at)).ok_or(not_found)?;
        // SAFETY: as in `first_piece`: the slot is not deleted while the lock is held, its memory
        // is mapped and readable, and `inside + len` is at most the page.
        let page = unsafe { VolatileSlice::new((mapping.host as *mut u8).add(inside), len) };
        page.copy_to(&mut data[done..done + len]);
        done += len;
    }
    Ok(())
}

/// Writes what slots lend, as the host does. A read-only slot need not be writable.
pub(crate) fn write_slot(vm: &VmInner, gpa: Gpa, data: &[u8]) -> Result<()> {
    let memory = vm.read();
    let mut done = 0;
    while done < data.len() {
        let not_found = Error::NotFound(Field::Gpa, gpa.get());
        let at = gpa.checked_add(done as u64).ok_or(not_found)?;
        let inside = (at.get() % PAGE_SIZE) as usize;
        let len = (PAGE_SIZE as usize - inside).min(data.len() - done);
        let host = memory
            .writable_slot_page(Gfn::containing(at))
            .ok_or(not_found)?;
        // SAFETY: as in `read_slot`, and the slot is not read-only, so its memory is writable.
        let page = unsafe { VolatileSlice::new((host as *mut u8).add(inside), len) };
        page.copy_from(&data[done..done + len]);
        done += len;
    }
    Ok(())
}
