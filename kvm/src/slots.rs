//! The memory slots that a VM has, so that errors name them and none outlives the VM.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};
use kvm_ioctls::{Cap, VmFd};
use kvm_ops::{Call, Error, Field, MemSlot, Result, SlotId};

use crate::error::{host_lacks, sys};

#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<BTreeMap<SlotId, MemSlot>>);

impl Slots {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SlotId, MemSlot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a slot or changes its flags.
    pub(crate) fn set(&self, fd: &VmFd, slot: &MemSlot) -> Result<()> {
        let mut slots = self.lock();
        slot.last()?;
        if let Some(old) = slots.get(&slot.id) {
            // KVM would move a slot to another address; here a slot only changes its flags.
            if (old.gpa, old.host, old.private) != (slot.gpa, slot.host, slot.private) {
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
            // EEXIST says that it overlaps a slot, and not which.
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
    pub(crate) fn delete(&self, fd: &VmFd, id: SlotId) -> Result<()> {
        let mut slots = self.lock();
        let Some(slot) = slots.get(&id) else {
            return Err(Error::NotFound(Field::Slot, id.0.into()));
        };
        set_region(fd, slot, 0)?;
        slots.remove(&id);
        Ok(())
    }

    /// Deletes every slot; those that the kernel keeps stay listed. The first error is returned.
    pub(crate) fn delete_all(&self, fd: &VmFd) -> Result<()> {
        let mut slots = self.lock();
        let mut result = Ok(());
        slots.retain(|_, slot| match set_region(fd, slot, 0) {
            Ok(()) => false,
            Err(error) => {
                result = result.and(Err(error));
                true
            }
        });
        result
    }
}

/// Tells the kernel. A size of 0 deletes the slot.
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
