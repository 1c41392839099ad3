//! A TD moves to another VM of the same machine.
//!
//! The module is not asked: it knows a TD by its TDR, a vCPU by its TDVPR and a page by the Secure-EPT,
//! and none of them changes. The records of the two VMs change places, so the cost does not depend on
//! the TD's memory, and no step after the port's can fail. The source gets what the destination had: a
//! TD that was initialised and is not used, whose key and pages the source's teardown gives back.
//!
//! The rules are those of Linux for SEV (`sev_vm_move_enc_context_from`), which the patches proposed
//! for TDs share (June 2025, not merged): a finalised source, a destination that is not. Here vCPUs
//! stay associated with their processors, where the patches flush each, and a failure leaves the source
//! as it was, where they may leave it dead.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::mem::swap;
use core::sync::atomic::Ordering;

use kvm_ops::moves::{self, GuestName, Movable, MoveState, MoveToken, StagingTable};
use kvm_ops::{Error, Field, Host, Life, Result, SeamPort, Step, VmPort};

use super::{Td, Vcpu};
use crate::vcpu::Tried;

impl<H: Host> Movable for Td<H> {
    fn life(&self) -> &Life {
        &self.life
    }

    fn move_state(&self) -> &MoveState {
        &self.moving
    }

    /// Gets every vCPU out of the TD, and then out of `vcpu_run`, or to a wait in it.
    fn halt(&self) -> Result<()> {
        let held = self.hold_out();
        for vcpu in self.ready_vcpus() {
            loop {
                match vcpu.seat.claim(|| self.relax()) {
                    Tried::Done(()) => break,
                    Tried::Wait => self.relax(),
                    Tried::No => {
                        self.unclaim_vcpus();
                        return Err(Error::Busy);
                    }
                }
            }
        }
        core::mem::forget(held);
        Ok(())
    }

    fn reopen(&self) {
        self.unclaim_vcpus();
        self.gate.let_go();
    }
}

/// The error for a VM that does not fit.
fn unfit<H: Host>(td: &Td<H>) -> Error {
    Error::Invalid(Field::Vm, td.life.id().0)
}

/// [`Backend::move_context`](kvm_ops::Backend::move_context).
pub(crate) fn move_context<H: Host>(from: &Arc<Td<H>>, to: &Arc<Td<H>>) -> Result<()> {
    let _claims = moves::claim_both(to, from)?;
    if from.moving.is_staged() {
        // The token must be traded or withdrawn first.
        return Err(Error::Busy);
    }
    may_leave(from)?;
    from.halt()?;
    hand_over(to, from, &mut |_| Ok(())).inspect_err(|_| from.reopen())?;
    Ok(())
}

/// [`Backend::local_send`](kvm_ops::Backend::local_send).
pub(crate) fn local_send<H: Host>(
    source: &Arc<Td<H>>,
    table: &Arc<StagingTable>,
    random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    deliver: &mut dyn FnMut(&MoveToken) -> Result<()>,
) -> Result<()> {
    moves::stage(source, table, random, deliver, || may_leave(source))
}

/// [`Backend::local_receive`](kvm_ops::Backend::local_receive).
pub(crate) fn local_receive<H: Host>(
    to: &Arc<Td<H>>,
    table: &StagingTable,
    token: &MoveToken,
    deliver: &mut dyn FnMut(GuestName) -> Result<()>,
) -> Result<GuestName> {
    moves::receive(to, table, token, |from| hand_over(to, from, deliver))
}

/// Checks that a VM has a TD that may leave it.
fn may_leave<H: Host>(from: &Td<H>) -> Result<()> {
    match from.life.step() {
        // Pages that an export left blocked for writing are its TD's to restore first.
        Step::Runnable if !from.journey.is_settled() => Err(Error::Busy),
        Step::Runnable => Ok(()),
        Step::Poisoned => Err(Error::Poisoned),
        _ => Err(unfit(from)),
    }
}

/// Checks that a VM can take the TD of another one.
fn fits<H: Host>(to: &Td<H>, from: &Td<H>) -> Result<()> {
    let machine = |td: &Td<H>| td.seam().map(|seam| core::ptr::from_ref(seam.key_ids()));
    if machine(to)? != machine(from)? {
        return Err(unfit(from));
    }
    match to.life.step() {
        Step::Created | Step::Initialized => {}
        Step::Poisoned => return Err(Error::Poisoned),
        _ => return Err(unfit(to)),
    }
    // Embedders keep the mask beside the VM. A VM that waits for a guest from another host has a TD
    // without parameters.
    let fresh = to.mask == from.mask
        && !to.journey.awaits()
        && to.lock(&to.vcpus).is_empty()
        && to.read_private().mirror.is_empty();
    if !fresh {
        return Err(unfit(to));
    }
    if to.params.vcpus != from.params.vcpus {
        let vcpus = to.params.vcpus.into();
        return Err(Error::Invalid(Field::VcpuCount, vcpus));
    }
    Ok(())
}

/// Hands the TD of `from`, whose vCPUs are halted, to `to`. The claims of both are held, so only this
/// thread takes locks of two VMs. `deliver` is called before anything changes, and may refuse.
///
/// # Errors
/// Nothing changed.
fn hand_over<H: Host>(
    to: &Arc<Td<H>>,
    from: &Arc<Td<H>>,
    deliver: &mut dyn FnMut(GuestName) -> Result<()>,
) -> Result<GuestName> {
    let _sessions = (from.journey.claim()?, to.journey.claim()?);
    fits(to, from)?;
    let name = GuestName::Page(from.tdr()?);
    deliver(name)?;
    to.on_port(|new| from.on_port(|old| new.take_guest(old)))?;

    // From here on nothing can fail. Whoever writes a field of a vCPU looks at the gate under the lock
    // of its association: it finds the gate closed, or the association moves with the vCPU.
    from.gate.close();
    let vcpus = core::mem::take(&mut *from.lock(&from.vcpus));
    let vcpus: BTreeMap<_, _> = vcpus
        .into_iter()
        .map(|(id, vcpu)| (id, vcpu.given(|| from.relax())))
        .collect();
    {
        let (mut new, mut old) = (to.write_private(), from.write_private());
        swap(&mut new.mirror, &mut old.mirror);
        swap(&mut new.attributes, &mut old.attributes);
        let (mut new, mut old) = (to.lock(&to.control), from.lock(&from.control));
        swap(&mut *new, &mut *old);
        drop((new, old));
        let (tdr, unused) = (from.tdr().ok(), to.tdr().ok());
        to.set_tdr(tdr);
        from.set_tdr(unused);
        to.account.exchange(&from.account);
        // Contexts of streams that the module has for each TD.
        let streams = from.journey.streams.load(Ordering::Relaxed);
        let unused = to.journey.streams.swap(streams, Ordering::Relaxed);
        from.journey.streams.store(unused, Ordering::Relaxed);
    }
    let (mut new, mut old) = (to.lock(&to.td_params), from.lock(&from.td_params));
    swap(&mut *new, &mut *old);
    drop((new, old));
    *to.lock(&to.vcpus) = vcpus;
    moves::mark_moved(&from.life);
    for step in [Step::Initialized, Step::Runnable] {
        // A destination that is initialised already stays so.
        let _ = to.life.advance(step);
    }
    let key = to.lock(&to.control).hkid().map(|hkid| hkid.0);
    to.took_step("TD taken over from another VM", key);
    Ok(name)
}

impl Vcpu {
    /// The vCPU as the next VM of its TD has it.
    fn given(self, relax: impl Fn()) -> Self {
        match self {
            Self::Unfinished(unfinished) => Self::Unfinished(unfinished),
            Self::Ready(record) | Self::Arrived(record) => {
                Self::Arrived(Arc::new(record.give(relax)))
            }
        }
    }
}

impl<H: Host> Td<H> {
    fn unclaim_vcpus(&self) {
        for vcpu in self.ready_vcpus() {
            vcpu.seat.unclaim(|| self.relax());
        }
    }

    /// Ends the staging of the TD, before its teardown. Waits for a receiver that is at it.
    pub(crate) fn leave_moves(&self) {
        let _claimed = self.moving.claim().wait(|| self.relax());
        moves::unstage(self);
    }
}
