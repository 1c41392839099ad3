//! Memory that changes between private and shared, as the guest asks or does.

use kvm_ops::{
    AnyVm, Error, Field, Gfn, Gpa, Host, PAGE_SIZE, Privacy, Result, SlotInfo, VcpuId, Vm, VmOps,
};

use crate::{GuestRam, Inside, Stopper};

/// The answer to a guest when a conversion failed for a reason that is not its own.
const EIO: u64 = 5;

/// A machine as its vCPU threads see it.
pub(crate) struct Parts<'a, H: Host> {
    pub(crate) vm: &'a Vm<AnyVm<H>>,
    pub(crate) ram: &'a GuestRam,
    pub(crate) stopper: &'a Stopper,
}

impl<H: Host> Inside for Parts<'_, H> {
    fn memory(&self) -> &GuestRam {
        self.ram
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.vm.back_end().deliver_interrupt(vcpu, vector)
    }

    fn kick(&self, vcpu: VcpuId) {
        self.stopper.kick(vcpu);
    }

    fn convert(&self, gpa: Gpa, pages: u64, to: Privacy) -> Result<()> {
        if !self.is_memory(gpa, pages) {
            return Err(Error::Invalid(Field::Gpa, gpa.get()));
        }
        let (mut first, mut left) = (Gfn::containing(gpa), pages);
        loop {
            let done = self.vm.set_memory_attributes(first, left, to)?;
            left = left.saturating_sub(done);
            if left == 0 {
                return Ok(());
            }
            let overflow = Error::Invalid(Field::Gpa, gpa.get());
            first = first.checked_add(done).ok_or(overflow)?;
        }
    }
}

impl<H: Host> Parts<'_, H> {
    /// True if every page of the range lies in a slot. A guest that asks for more would make the host
    /// keep books of pages that do not exist.
    fn is_memory(&self, gpa: Gpa, pages: u64) -> bool {
        let Some(bytes) = pages.checked_mul(PAGE_SIZE) else {
            return false;
        };
        let (mut at, mut left) = (gpa.get(), bytes);
        while left != 0 {
            let holds = |slot: &SlotInfo| at.wrapping_sub(slot.gpa.get()) < slot.bytes;
            let Some(slot) = self.vm.slots().find(holds) else {
                return false;
            };
            let inside = slot.bytes - (at - slot.gpa.get());
            left = left.saturating_sub(inside);
            at = at.wrapping_add(inside);
        }
        true
    }
}

/// The answer to `KVM_HC_MAP_GPA_RANGE`: 0, or a positive errno.
pub(crate) fn answer(machine: &dyn Inside, gpa: Gpa, pages: u64, to: Privacy) -> u64 {
    match machine.convert(gpa, pages, to) {
        Ok(()) => 0,
        Err(error) => u64::try_from(error.errno()).unwrap_or(EIO),
    }
}

/// Answers a touch that memory of the other kind received, as QEMU does: the page is converted to the
/// kind that the guest touched it as.
pub(crate) fn follow(machine: &dyn Inside, gpa: Gpa, bytes: u64, access: Privacy) -> Result<()> {
    let first = gpa.get() & !(PAGE_SIZE - 1);
    let pages = (gpa.get() - first)
        .saturating_add(bytes)
        .div_ceil(PAGE_SIZE);
    machine.convert(Gpa::new(first), pages.max(1), access)
}
