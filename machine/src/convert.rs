//! Memory that changes between private and shared, as the guest asks or does.

use kvm_ops::{Gpa, PAGE_SIZE, Privacy, Result};

use crate::Inside;

/// The answer to a guest when a conversion failed for a reason that is not its own.
const EIO: u64 = 5;

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
