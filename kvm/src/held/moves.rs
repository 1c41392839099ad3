//! Contexts of SEV and SEV-ES guests that move to another VM, or that a mirror shares.
//!
//! The kernel moves ASID, handle, pinned regions and, for SEV-ES, the registers. Slots, attributes and the registers of a
//! plain SEV guest are the embedder's. After a move the source answers EIO to every call.

use std::os::fd::AsRawFd;
use std::sync::{MutexGuard, TryLockError};

use kvm_bindings::{KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM};
use kvm_ops::{Call, Error, Result, Step};

use super::sev::{Context, Launch, SevGuest};
use crate::KvmVm;
use crate::vm::enable;

impl SevGuest {
    /// The steps of this guest, for a call that looks at two guests: two such calls never wait for each other.
    fn try_launch(&self) -> Result<MutexGuard<'_, Launch>> {
        match self.launch.try_lock() {
            Ok(launch) => Ok(launch),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Error::Busy),
        }
    }
}

fn guest(vm: &KvmVm) -> Result<&SevGuest> {
    match vm.held_state()?.guest.as_sev() {
        Some(guest) => Ok(guest),
        None => kvm_ops::not_offered!("moves of guests other than SEV and SEV-ES"),
    }
}

/// Enables a capability of a VM whose argument is another VM.
fn enable_from(vm: &KvmVm, (cap, call): (u32, Call), other: &KvmVm) -> Result<()> {
    enable(vm.fd(), cap, other.fd().as_raw_fd() as u64).map_err(|error| match error {
        Error::Sys(_, errno) => Error::Sys(call, errno),
        error => error,
    })
}

/// Moves the guest of `from` to `to`. No vCPU of `from` is in its guest.
pub(crate) fn take(to: &KvmVm, from: &KvmVm) -> Result<()> {
    let (mut here, mut there) = (guest(to)?.try_launch()?, guest(from)?.try_launch()?);
    // A guest finds its memory in the very pages that it left, and only those are pinned for it.
    to.slots().check_within(from.slots())?;
    enable_from(
        to,
        (KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, Call::MoveContext),
        from,
    )?;
    *here = std::mem::take(&mut there);
    there.context = Context::Gone;
    // The kernel takes no calls about the dead VM's slots. No vCPU runs in it, and pages that the process unmaps leave
    // its tables as they leave those of any VM.
    from.slots().forget();
    Ok(())
}

/// Makes `mirror` a mirror of `owner`, whose launch has begun.
pub(crate) fn share(mirror: &KvmVm, owner: &KvmVm) -> Result<()> {
    let (mut here, there) = (guest(mirror)?.try_launch()?, guest(owner)?.try_launch()?);
    if there.context == Context::Own && !there.started {
        // The mirror would have no handle of the guest for ever.
        return Err(Error::WrongState(Step::Initialized));
    }
    enable_from(
        mirror,
        (KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, Call::CopyContext),
        owner,
    )?;
    here.context = Context::Lent;
    Ok(())
}
