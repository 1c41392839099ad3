//! Slots as back ends have them: memory that the process lends, and which frames of it are private.

use kvm_ops::sim::{SimHost, SimVm};
use kvm_ops::{AmdVm, AnyVm, Gfn, Gpa, IntelVm, MemSlot, Privacy, SlotFlags, SlotId, Step};
use kvm_ops_mmu::Attributes;

use super::{Gmem, Slot, Slots};
use crate::refusal::Result;

const PAGE: u64 = 4096;

/// A back end with its slots.
pub(crate) type BackEnd = kvm_ops::Vm<AnyVm<SimHost>>;

/// Lends a slot's memory to the back end, if the process lent it. Slots for SMM are not lent.
pub(crate) fn set_slot(vm: &mut BackEnd, number: u32, slot: &Slot) -> Result<()> {
    if number >> 16 != 0 || is_gone(vm) {
        return Ok(());
    }
    let Some(host) = slot.lent.user else {
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
    if knows(vm, number) && !is_gone(vm) {
        vm.delete_memory_slot(SlotId(number))?;
    }
    Ok(())
}

/// Moves what a confidential guest wrote since the last call into the log of the slot.
pub(super) fn harvest(vm: &BackEnd, number: u32, log: &mut [u64]) -> Result<()> {
    let id = SlotId(number);
    let logged = vm
        .slots()
        .find(|slot| slot.id == id && slot.flags.log_dirty);
    let Some(slot) = logged.filter(|_| !is_gone(vm)) else {
        return Ok(());
    };
    let pages = slot.bytes / PAGE;
    let mut bits = vec![0; pages.div_ceil(64) as usize];
    vm.dirty_log(id, &mut bits)?;
    for (word, bits) in log.iter_mut().zip(bits) {
        *word |= bits;
    }
    Ok(())
}

/// The guest went to another host or VM, and runs here no more: it has no use for slots, which stay user space's to change.
fn is_gone(vm: &BackEnd) -> bool {
    vm.step() == Step::Poisoned
}

/// The process lent the slot's memory.
fn knows(vm: &BackEnd, number: u32) -> bool {
    let id = SlotId(number);
    vm.slots().any(|slot| slot.id == id)
}

/// Makes frames of a slot private or shared. Private pages of frames that become shared are lost.
fn make(vm: &BackEnd, mut first: u64, mut pages: u64, to: Privacy) -> Result<()> {
    while pages != 0 {
        let done = vm.set_memory_attributes(Gfn::new(first), pages, to)?;
        (first, pages) = (first + done, pages - done);
    }
    Ok(())
}

/// Gives the frames of a range that lie in a slot what their attributes and the slot's file say: they are
/// private where the one says so and the other is open.
pub(crate) fn convert(
    vm: &BackEnd,
    (number, slot): (u32, &Slot),
    attributes: &Attributes,
    (gpa, size): (u64, u64),
) -> Result<()> {
    if !knows(vm, number) || is_gone(vm) {
        return Ok(());
    }
    let start = gpa.max(slot.gpa) / PAGE;
    let end = gpa.saturating_add(size).min(slot.gpa + slot.size) / PAGE;
    if start >= end {
        return Ok(());
    }
    let open = slot.file.as_ref().is_some_and(|file| file.is_open());
    for (first, pages, privacy) in attributes.runs(Gfn::new(start), end - start)? {
        let to = match (open, slot.lent.user) {
            // Shared memory that is not there is none, so that a guest that uses it leaves.
            (_, None) => Privacy::Private,
            (true, _) => privacy,
            (false, _) => Privacy::Shared,
        };
        make(vm, first.get(), pages, to)?;
    }
    Ok(())
}

/// Declares a slot's memory as missing, or no more. In a guest whose frames are private by their attribute, shared ones are
/// none any more. A guest of SEV or SEV-ES that is not pinned loses its contents with the memory, as they lie there.
pub(crate) fn set_there(
    vm: &mut BackEnd,
    (number, slot): (u32, &Slot),
    attributes: Option<&Attributes>,
) -> Result<()> {
    if let Some(attributes) = attributes {
        if slot.lent.user.is_some() {
            set_slot(vm, number, slot)?;
        }
        return convert(vm, (number, slot), attributes, (slot.gpa, slot.size));
    }
    let declare = |vm: &BackEnd, kind| {
        let first = Gfn::new(slot.gpa / PAGE);
        with_port(vm, |port| port.set_missing(first, slot.pages(), kind));
    };
    // Without a slot it is missing at any time: an access would leave as one to a device.
    if slot.lent.user.is_none() {
        declare(vm, Some(Privacy::Shared));
        return set_slot(vm, number, slot);
    }
    set_slot(vm, number, slot)?;
    declare(vm, None);
    Ok(())
}

/// Shows the VM of the software machine, without what guards a guest.
pub(crate) fn with_port<T>(vm: &BackEnd, show: impl FnOnce(&SimVm) -> T) -> Option<T> {
    match vm.back_end() {
        AnyVm::Intel(IntelVm::Vmx(vm)) => Some(show(vm.port())),
        AnyVm::Intel(IntelVm::Tdx(vm)) => vm.with_port(show),
        AnyVm::Amd(AmdVm::Svm(vm)) => Some(show(vm.port())),
        AnyVm::Amd(AmdVm::Sev(vm)) => Some(show(vm.port())),
        // With the feature `kvm` of the facade, VMs that the system below holds.
        #[allow(unreachable_patterns)]
        _ => None,
    }
}

/// Brings the frames of all slots into line with attributes that changed in a range.
pub(crate) fn set_attributes(
    vm: &BackEnd,
    slots: &Slots,
    attributes: &Attributes,
    range: (u64, u64),
) -> Result<()> {
    let mut slots = slots.iter();
    slots.try_for_each(|slot| convert(vm, slot, attributes, range))
}

/// Frees the private pages behind a range of a file, whose contents are gone.
pub(crate) fn zap(
    vm: &BackEnd,
    slots: &Slots,
    attributes: &Attributes,
    file: &Gmem,
    range: (u64, u64),
) -> Result<()> {
    for (number, slot) in slots.iter().filter(|(number, _)| knows(vm, *number)) {
        let Some((gpa, size)) = slot.guest_range(file, range) else {
            continue;
        };
        make(vm, gpa / PAGE, size / PAGE, Privacy::Shared)?;
        convert(vm, (number, slot), attributes, (gpa, size))?;
    }
    Ok(())
}
