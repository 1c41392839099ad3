//! Slots as back ends have them: memory that the process lends.

use kvm_ops::sim::SimHost;
use kvm_ops::{AnyVm, Gpa, MemSlot, SlotFlags, SlotId};

use super::Slot;
use crate::Process;
use crate::refusal::Result;

/// A back end with its slots.
pub(crate) type BackEnd = kvm_ops::Vm<AnyVm<SimHost>>;

/// Lends a slot's memory to the back end, if the process does. Slots for SMM are not lent.
pub(crate) fn set_slot(
    vm: &mut BackEnd,
    process: &dyn Process,
    number: u32,
    slot: &Slot,
) -> Result<()> {
    if number >> 16 != 0 {
        return Ok(());
    }
    let Some(host) = process.lend(slot.hva, slot.size, !slot.is_read_only()) else {
        return delete_slot(vm, number);
    };
    let id = SlotId(number);
    let new = MemSlot {
        flags: SlotFlags {
            read_only: slot.is_read_only(),
            // No back end of a TD keeps a dirty log.
            log_dirty: slot.logs_dirty() && vm.tech() != kvm_ops::Tech::Tdx,
        },
        ..MemSlot::new(id, Gpa::new(slot.gpa), host)
    };
    let old = vm.slots().find(|old| old.id == id);
    if old.is_some_and(|old| old.gpa != new.gpa || old.bytes != new.bytes()) {
        vm.delete_memory_slot(id)?;
    }
    vm.set_memory_slot(new)?;
    Ok(())
}

pub(crate) fn delete_slot(vm: &mut BackEnd, number: u32) -> Result<()> {
    let id = SlotId(number);
    if vm.slots().any(|old| old.id == id) {
        vm.delete_memory_slot(id)?;
    }
    Ok(())
}
