//! The guest_memfds behind slots, the attributes of frames, and conversions between the two kinds of memory.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ops::{
    Call, Error, Field, Gfn, MemSlot, PAGE_SIZE, Privacy, PrivateBacking, Result, SlotId,
};

use crate::error::from_errno;
use crate::{KvmVm, sys};

/// The guest_memfd of each slot that the embedder gave none. A file lives as long as its slot.
#[derive(Debug, Default)]
pub(crate) struct Files(Mutex<BTreeMap<SlotId, OwnedFd>>);

impl Files {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SlotId, OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot with private memory behind it: the embedder's, or that of its file here.
    pub(crate) fn backed(&self, slot: &MemSlot) -> MemSlot {
        let files = self.lock();
        let own = files.get(&slot.id).map(|file| PrivateBacking {
            fd: file.as_raw_fd(),
            offset: 0,
        });
        MemSlot {
            private: slot.private.or(own),
            ..*slot
        }
    }

    /// Creates a slot with private memory, all of whose frames begin so.
    pub(crate) fn set(&self, vm: &KvmVm, slot: &MemSlot, begins: Privacy) -> Result<()> {
        if slot.flags.read_only && begins == Privacy::Shared {
            // The kernel has no read-only slots with private memory: a ROM is shared for ever.
            return vm.slots().set(vm.fd(), slot);
        }
        if let Some(old) = vm.slots().get(slot.id) {
            let backed = self.backed(slot);
            // The kernel refuses even a call that changes nothing, if the slot has private memory.
            return match old.is_same_place(&backed) && old.flags == backed.flags {
                true => Ok(()),
                false => vm.slots().set(vm.fd(), &backed),
            };
        }
        let mut made = None;
        let mut backed = *slot;
        if slot.private.is_none() {
            let file = made.insert(vm.create_guest_memfd(slot.bytes(), 0)?);
            backed.private = Some(PrivateBacking {
                fd: file.as_raw_fd(),
                offset: 0,
            });
        }
        vm.slots().set(vm.fd(), &backed)?;
        let is_private = begins == Privacy::Private;
        if let Err(error) = sys::set_attributes(vm.fd(), slot.gpa.get(), slot.bytes(), is_private) {
            // A slot whose memory is of the other kind is not the one that was asked for.
            vm.slots().delete(vm.fd(), &backed)?;
            return Err(error);
        }
        if let Some(file) = made {
            self.lock().insert(slot.id, file);
        }
        Ok(())
    }

    /// Deletes a slot, and the private memory behind it. Its frames have no attribute afterwards.
    pub(crate) fn delete(&self, vm: &KvmVm, slot: &MemSlot) -> Result<()> {
        vm.slots().delete(vm.fd(), &self.backed(slot))?;
        self.lock().remove(&slot.id);
        if let Err(error) = sys::set_attributes(vm.fd(), slot.gpa.get(), slot.bytes(), false) {
            // An access to frames without a slot leaves the guest in either case.
            tracing::warn!(slot = slot.id.0, %error, "the attributes of a deleted slot stay");
        }
        Ok(())
    }
}

/// Converts frames that slots cover.
///
/// # Errors
/// [`Error::NotOffered`] for private frames in a slot that has none; the answer of the kernel.
pub(super) fn convert(vm: &KvmVm, first: Gfn, pages: u64, to: Privacy) -> Result<()> {
    let invalid = Error::Invalid(Field::Gfn, first.get());
    let gpa = first.base().ok_or(invalid)?.get();
    let bytes = pages.checked_mul(PAGE_SIZE).ok_or(invalid)?;
    vm.slots()
        .each_part(gpa, bytes, |slot, _, _| match slot.private {
            None if to == Privacy::Private => {
                kvm_ops::not_offered!("private memory in a read-only slot")
            }
            _ => Ok(()),
        })?;
    sys::set_attributes(vm.fd(), gpa, bytes, to == Privacy::Private)?;
    vm.slots()
        .each_part(gpa, bytes, |slot, offset, len| match to {
            Privacy::Shared => punch_hole(slot, offset, len),
            Privacy::Private => {
                give_up_shared(slot, offset, len);
                Ok(())
            }
        })
}

/// Frees the private pages of a part of a slot.
fn punch_hole(slot: &MemSlot, offset: u64, len: u64) -> Result<()> {
    let Some(PrivateBacking { fd, offset: start }) = slot.private else {
        return Ok(());
    };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // The file has that part, or the kernel had not taken the slot.
    let (at, len) = ((start + offset) as i64, len as i64);
    // SAFETY: no memory is passed. The pages are private: no mapping of this process has them.
    if unsafe { libc::fallocate(fd, mode, at, len) } == 0 {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error().raw_os_error();
    Err(from_errno(Call::PunchHole, errno.unwrap_or(0)))
}

/// Gives the shared memory of a part of a slot back to the system, as far as it is anonymous. It costs memory and
/// nothing else if that fails, as for parts of huge pages.
fn give_up_shared(slot: &MemSlot, offset: u64, len: u64) {
    let at = std::ptr::with_exposed_provenance_mut((slot.host.address() + offset) as usize);
    // SAFETY: the memory is lent to the guest, which may change it at any time; no Rust reference covers it. It stays
    // mapped, and reads as zeros or as its file.
    if unsafe { libc::madvise(at, len as usize, libc::MADV_DONTNEED) } != 0 {
        let errno = std::io::Error::last_os_error();
        tracing::debug!(slot = slot.id.0, %errno, "shared memory not given up");
    }
}

/// Maps frames before the guest touches them, and returns how many.
pub(super) fn pre_fault(vm: &KvmVm, first: Gfn, pages: u64) -> Result<u64> {
    let invalid = Error::Invalid(Field::Gfn, first.get());
    let gpa = first.base().ok_or(invalid)?.get();
    let bytes = pages.checked_mul(PAGE_SIZE).ok_or(invalid)?;
    let Some(vcpu) = vm.first_vcpu() else {
        return Err(Error::Invalid(Field::VcpuCount, 0));
    };
    let left = sys::pre_fault(vcpu, gpa, bytes)?;
    Ok((bytes - left.min(bytes)) / PAGE_SIZE)
}
