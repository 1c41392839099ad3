//! `KVM_SET_USER_MEMORY_REGION` and its successor.

use std::sync::Arc;

use kvm_ops_uapi::checks::region::{
    ADDRESS_SPACE, BOUND, CHANGED, COPY, DELETED, DESCRIPTOR, FILE, FLAGS, GPA, HVA, MEMORY,
    OFFSET, OLD_FLAGS, OVERLAP, PAGES, RANGE, SIZE, SLOT, WRAP,
};
use kvm_ops_uapi::memory::{
    SLOT_MAX_PAGES, USER_SLOTS, UserspaceMemoryRegion, UserspaceMemoryRegion2, slot_flags,
};

use super::slots::{Binding, Lent, Slot, space};
use super::{State, Vm};
use crate::refusal::{Result, ensure};
use crate::{Descriptor, Process, arg};

const PAGE: u64 = 4096;
/// The end of user space with 4-level paging.
const USER_END: u64 = 0x7fff_ffff_f000;
/// Guest addresses end here.
const GPA_END: u64 = 1 << 52;

pub(super) fn set_old(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let old: UserspaceMemoryRegion = arg::read(process, argument, COPY)?;
    let known = slot_flags::LOG_DIRTY_PAGES | slot_flags::READONLY;
    ensure(old.flags.get() & !known == 0, OLD_FLAGS)?;
    let region = UserspaceMemoryRegion2 {
        slot: old.slot,
        flags: old.flags,
        guest_phys_addr: old.guest_phys_addr,
        memory_size: old.memory_size,
        userspace_addr: old.userspace_addr,
        ..UserspaceMemoryRegion2::default()
    };
    set_region(vm, process, &region)
}

pub(super) fn set(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let region = arg::read(process, argument, COPY)?;
    set_region(vm, process, &region)
}

/// The structure's numbers.
struct Wanted {
    number: u32,
    flags: u32,
    gpa: u64,
    size: u64,
    hva: u64,
    offset: u64,
    fd: i32,
}

impl Wanted {
    fn of(region: &UserspaceMemoryRegion2) -> Self {
        Self {
            number: region.slot.get(),
            flags: region.flags.get(),
            gpa: region.guest_phys_addr.get(),
            size: region.memory_size.get(),
            hva: region.userspace_addr.get(),
            offset: region.guest_memfd_offset.get(),
            fd: region.guest_memfd.get() as i32,
        }
    }

    fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    fn has_file(&self) -> bool {
        self.has(slot_flags::GUEST_MEMFD)
    }

    /// Checks 3 to 11, which need no lock.
    fn check(&self, vm: &Vm) -> Result<()> {
        ensure(self.number & 0xffff < USER_SLOTS, SLOT)?;
        ensure(self.flags & !allowed_flags(vm, self.flags) == 0, FLAGS)?;
        ensure(self.size.is_multiple_of(PAGE), SIZE)?;
        ensure(self.gpa.is_multiple_of(PAGE), GPA)?;
        let end = self.hva.checked_add(self.size);
        let in_user_space = end.is_some_and(|end| end <= USER_END);
        ensure(self.hva.is_multiple_of(PAGE) && in_user_space, HVA)?;
        let fits = self.offset.is_multiple_of(PAGE) && self.offset.checked_add(self.size).is_some();
        ensure(!self.has_file() || fits, OFFSET)?;
        ensure(space(self.number) < vm.address_spaces(), ADDRESS_SPACE)?;
        ensure(self.gpa.checked_add(self.size).is_some(), WRAP)?;
        ensure(self.size / PAGE <= SLOT_MAX_PAGES, PAGES)
    }

    /// What an existing slot would have to be, to need no change.
    fn is(&self, slot: &Slot) -> bool {
        self.gpa == slot.gpa && self.flags == slot.flags
    }

    /// Check 13: what cannot change while the slot exists.
    fn keeps(&self, slot: &Slot) -> bool {
        let fixed = slot_flags::READONLY | slot_flags::GUEST_MEMFD;
        !self.has_file()
            && self.hva == slot.hva
            && self.size == slot.size
            && (self.flags ^ slot.flags) & fixed == 0
    }

    fn slot(&self, vm: &Vm, process: &dyn Process, file: Option<Binding>) -> Slot {
        let lent = Lent {
            user: process.lend(self.hva, self.size, self.flags & slot_flags::READONLY == 0),
            file: match vm.is_plain() && file.is_some() {
                true => process.lend_file(self.fd, self.offset, self.size),
                false => None,
            },
        };
        Slot {
            flags: self.flags,
            gpa: self.gpa,
            size: self.size,
            hva: self.hva,
            file,
            lent,
        }
    }

    /// Check 16: the file behind the slot.
    fn binding(&self, vm: &Vm, descriptor: &Descriptor) -> Result<Option<Binding>> {
        if !self.has_file() {
            return Ok(None);
        }
        let file = match descriptor {
            Descriptor::Closed => return Err(DESCRIPTOR.into()),
            Descriptor::Foreign => return Err(FILE.into()),
            Descriptor::File(file) => file,
        };
        let gmem = file.as_gmem().ok_or(FILE)?;
        ensure(std::ptr::eq(Arc::as_ptr(gmem.vm()), vm), FILE)?;
        ensure(self.offset + self.size <= gmem.size(), FILE)?;
        Ok(Some(Binding::new(gmem, self.offset, self.size)))
    }
}

/// The flags that may be given, of those that were.
fn allowed_flags(vm: &Vm, given: u32) -> u32 {
    if given & slot_flags::GUEST_MEMFD != 0 {
        // Neither dirty log nor read-only.
        return slot_flags::GUEST_MEMFD;
    }
    let read_only = if vm.has_protected_state() {
        0
    } else {
        slot_flags::READONLY
    };
    slot_flags::LOG_DIRTY_PAGES | read_only | slot_flags::GUEST_MEMFD
}

fn set_region(vm: &Vm, process: &dyn Process, region: &UserspaceMemoryRegion2) -> Result<i64> {
    let wanted = Wanted::of(region);
    wanted.check(vm)?;
    // Outlives the lock: the end of a guest_memfd takes it.
    let descriptor = process.descriptor(wanted.fd);
    let mut guard = vm.lock();
    let state = &mut *guard;
    if wanted.size == 0 {
        return delete(state, wanted.number);
    }
    let old = state.slots.get(wanted.number).cloned();
    if let Some(old) = &old {
        ensure(wanted.keeps(old), CHANGED)?;
        if wanted.is(old) {
            return Ok(0);
        }
    }
    ensure(
        !state.slots.overlaps(wanted.number, wanted.gpa, wanted.size),
        OVERLAP,
    )?;
    vm.kernel().faults().allocate(MEMORY)?;
    let binding = wanted.binding(vm, &descriptor)?;
    let end = state.td.shared_bit().unwrap_or(GPA_END);
    ensure(wanted.gpa + wanted.size <= end, RANGE)?;
    if let Some(binding) = &binding {
        ensure(!state.slots.uses(binding), BOUND)?;
    }
    let slot = wanted.slot(vm, process, binding);
    state.show_slot(wanted.number, &slot)?;
    if let Some(old) = old.filter(|old| old.gpa != slot.gpa) {
        state.take_back(wanted.number, &old)?;
        state.flushes += 1;
    }
    state.lend(wanted.number, &slot)?;
    state.dirty.keep(wanted.number, &slot);
    state.slots.insert(wanted.number, slot);
    Ok(0)
}

fn delete(state: &mut State, number: u32) -> Result<i64> {
    let slot = state.slots.get(number).cloned().ok_or(DELETED)?;
    state.hide_slot(number)?;
    state.take_back(number, &slot)?;
    state.flushes += 1;
    state.slots.remove(number);
    state.dirty.forget(number);
    Ok(0)
}
