//! Memory that changes between private and shared, as the guest asks or does.

use crate::{Backend, Error, Gfn, Gpa, PAGE_SIZE, Privacy, SlotInfo, Vm};

/// What a guest is answered when a conversion failed for a reason that is not its own.
const EIO: u64 = 5;

/// Converts a VM's memory while its vCPUs run.
pub(super) trait Convert: Sync {
    /// Makes the range private or shared.
    fn convert(&self, gpa: Gpa, pages: u64, to: Privacy) -> Result<(), Error>;

    /// Whether memory lies there at all.
    fn is_memory(&self, gpa: Gpa) -> bool;
}

impl<B: Backend> Convert for Vm<B> {
    fn convert(&self, gpa: Gpa, pages: u64, to: Privacy) -> Result<(), Error> {
        let (mut first, mut left) = (Gfn::containing(gpa), pages);
        loop {
            let done = self.set_memory_attributes(first, left, to)?;
            left = left.saturating_sub(done);
            if left == 0 {
                return Ok(());
            }
            let overflow = Error::Invalid(crate::Field::Gpa, gpa.get());
            first = first.checked_add(done).ok_or(overflow)?;
        }
    }

    fn is_memory(&self, gpa: Gpa) -> bool {
        let holds = |slot: SlotInfo| gpa.get().wrapping_sub(slot.gpa.get()) < slot.bytes;
        self.slots().any(holds)
    }
}

/// Answers `KVM_HC_MAP_GPA_RANGE`: 0, or a positive errno.
pub(super) fn answer(vm: &dyn Convert, gpa: Gpa, pages: u64, to: Privacy) -> u64 {
    match vm.convert(gpa, pages, to) {
        Ok(()) => 0,
        Err(error) => u64::try_from(error.errno()).unwrap_or(EIO),
    }
}

/// Answers a touch that memory of the other kind received, as QEMU does: what the guest touches is
/// converted to what it was touched as. `false` where nothing can be done.
pub(super) fn follow(vm: &dyn Convert, gpa: Gpa, bytes: u64, access: Privacy) -> bool {
    let first = gpa.get() & !(PAGE_SIZE - 1);
    let pages = (gpa.get() - first)
        .saturating_add(bytes)
        .div_ceil(PAGE_SIZE);
    vm.is_memory(gpa) && vm.convert(Gpa::new(first), pages.max(1), access).is_ok()
}
