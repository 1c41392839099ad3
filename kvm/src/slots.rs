//! The memory slots of a VM. KVM identifies a slot by its number only; here a slot that is deleted
//! or read must also be the slot that was set, so that a caller cannot delete another slot by its
//! number and free memory that the guest still uses.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};
use kvm_ioctls::{Cap, VmFd};
use kvm_ops::{Call, Error, Field, Gpa, MemSlot, Result, SlotId};

use crate::error::{host_lacks, sys};

#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<BTreeMap<SlotId, MemSlot>>);

impl Slots {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SlotId, MemSlot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot of that number.
    pub(crate) fn get(&self, id: SlotId) -> Option<MemSlot> {
        self.lock().get(&id).copied()
    }

    /// The slot that covers an address, and the offset of the address in it.
    pub(crate) fn covering(&self, gpa: Gpa) -> Option<(MemSlot, u64)> {
        let slots = self.lock();
        let offset = |slot: &MemSlot| gpa.get().checked_sub(slot.gpa.get());
        let mut covering = slots
            .values()
            .filter_map(|slot| Some((*slot, offset(slot)?)));
        covering.find(|(slot, offset)| *offset < slot.bytes())
    }

    /// True if one slot lends the guest that host memory, for writing too.
    pub(crate) fn lends(&self, address: u64, bytes: u64) -> bool {
        let slots = self.lock();
        let mut writable = slots.values().filter(|slot| !slot.flags.read_only);
        writable.any(|slot| {
            let offset = address.checked_sub(slot.host.address());
            offset.is_some_and(|offset| {
                offset <= slot.bytes() && bytes != 0 && bytes <= slot.bytes() - offset
            })
        })
    }

    /// Calls `body` for each part of slots in a range: the slot, the offset of the part, and its bytes.
    pub(crate) fn each_part(
        &self,
        gpa: u64,
        bytes: u64,
        mut body: impl FnMut(&MemSlot, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let end = gpa.saturating_add(bytes);
        for slot in self.lock().values() {
            let start = slot.gpa.get();
            let from = gpa.max(start);
            let to = end.min(start.saturating_add(slot.bytes()));
            if from < to {
                body(slot, from - start, to - from)?;
            }
        }
        Ok(())
    }

    /// Checks that the memory of each slot is that of a slot of the other VM.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the first slot with other memory.
    pub(crate) fn check_within(&self, other: &Self) -> Result<()> {
        let own: Vec<MemSlot> = self.lock().values().copied().collect();
        let other = other.lock();
        let is_there = |slot: &&MemSlot| other.values().any(|known| known.host == slot.host);
        match own.iter().find(|slot| !is_there(slot)) {
            Some(slot) => Err(Error::Invalid(Field::Slot, slot.id.0.into())),
            None => Ok(()),
        }
    }

    /// Forgets every slot, for a VM whose slots the kernel does not use any more.
    pub(crate) fn forget(&self) {
        self.lock().clear();
    }

    /// Creates a slot or changes its flags.
    pub(crate) fn set(&self, fd: &VmFd, slot: &MemSlot) -> Result<()> {
        let mut slots = self.lock();
        slot.last()?;
        if let Some(old) = slots.get(&slot.id) {
            // KVM would move the slot to another address; here only its flags may change.
            if !old.is_same_place(slot) {
                return Err(Error::Exists(Field::Slot, slot.id.0.into()));
            }
        }
        if slot.flags.read_only && !fd.check_extension(Cap::ReadonlyMem) {
            return host_lacks!("KVM_CAP_READONLY_MEM");
        }
        if slot.private.is_some() && !fd.check_extension(Cap::GuestMemfd) {
            return host_lacks!("KVM_CAP_GUEST_MEMFD");
        }
        set_region(fd, slot, slot.bytes()).map_err(|error| match error.errno() {
            // EEXIST means an overlap but does not name the other slot.
            libc::EEXIST => match slots.values().find(|other| other.overlaps(slot)) {
                Some(other) => Error::Invalid(Field::OverlappedSlot, other.id.0.into()),
                None => error,
            },
            libc::EINVAL if slot.id.0 as i32 >= fd.check_extension_int(Cap::NrMemslots) => {
                Error::Invalid(Field::Slot, slot.id.0.into())
            }
            _ => error,
        })?;
        slots.insert(slot.id, *slot);
        Ok(())
    }

    /// Deletes a slot.
    pub(crate) fn delete(&self, fd: &VmFd, slot: &MemSlot) -> Result<()> {
        let mut slots = self.lock();
        find(&slots, slot)?;
        set_region(fd, slot, 0)?;
        slots.remove(&slot.id);
        Ok(())
    }

    /// Deletes every slot. Slots that the kernel refuses to delete stay listed; the first error is
    /// returned.
    pub(crate) fn delete_all(&self, fd: &VmFd) -> Result<()> {
        let mut result = Ok(());
        self.lock().retain(|_, slot| match set_region(fd, slot, 0) {
            Ok(()) => false,
            Err(error) => {
                tracing::error!(slot = slot.id.0, gpa = %slot.gpa, %error, "slot not deleted");
                result = result.and(Err(error));
                true
            }
        });
        result
    }

    /// Reads and clears the dirty log of a slot.
    ///
    /// The kernel writes one bit for each page of *its* slot, so the size must be that of the slot
    /// that was set: a smaller one would make it write past the end of the buffer.
    pub(crate) fn dirty_log(&self, fd: &VmFd, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        let slots = self.lock();
        find(&slots, slot)?;
        if bitmap.len() != slot.dirty_words() {
            return Err(Error::Invalid(Field::BufferLength, bitmap.len() as u64));
        }
        let log =
            fd.get_dirty_log(slot.id.0, slot.bytes() as usize)
                .map_err(|error| match error.errno() {
                    libc::ENOENT => not_found(slot),
                    _ => sys(Call::GetDirtyLog)(error),
                })?;
        bitmap.copy_from_slice(&log);
        Ok(())
    }
}

fn not_found(slot: &MemSlot) -> Error {
    Error::NotFound(Field::Slot, slot.id.0.into())
}

/// Fails unless this very slot was set.
fn find(slots: &BTreeMap<SlotId, MemSlot>, slot: &MemSlot) -> Result<()> {
    match slots.get(&slot.id) {
        Some(known) if known.is_same_place(slot) => Ok(()),
        _ => Err(not_found(slot)),
    }
}

/// `KVM_SET_USER_MEMORY_REGION`. A size of 0 deletes the slot.
fn set_region(fd: &VmFd, slot: &MemSlot, bytes: u64) -> Result<()> {
    let mut flags = 0;
    if slot.flags.read_only {
        flags |= KVM_MEM_READONLY;
    }
    if slot.flags.log_dirty {
        flags |= KVM_MEM_LOG_DIRTY_PAGES;
    }
    let failed = sys(Call::SetMemoryRegion);
    match slot.private {
        Some(private) if bytes != 0 => {
            let region = kvm_userspace_memory_region2 {
                slot: slot.id.0,
                flags: flags | KVM_MEM_GUEST_MEMFD,
                guest_phys_addr: slot.gpa.get(),
                memory_size: bytes,
                userspace_addr: slot.host.address(),
                guest_memfd_offset: private.offset,
                // The field is unsigned; a descriptor that does not exist is the kernel's to
                // refuse.
                guest_memfd: private.fd as u32,
                ..Default::default()
            };
            // SAFETY: whoever made `slot.host` promised that the memory stays mapped, and without
            // Rust references, until the slot is deleted or the VM freed (`HostRange::new`).
            unsafe { fd.set_user_memory_region2(region) }.map_err(failed)
        }
        _ => {
            let region = kvm_userspace_memory_region {
                slot: slot.id.0,
                flags: if bytes == 0 { 0 } else { flags },
                guest_phys_addr: slot.gpa.get(),
                memory_size: bytes,
                userspace_addr: slot.host.address(),
            };
            // SAFETY: as above; a deletion lends nothing.
            unsafe { fd.set_user_memory_region(region) }.map_err(failed)
        }
    }
}
