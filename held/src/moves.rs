//! Moves and mirrors of a guest within the host: the checks that name what does not fit, in front of the system's own.

use kvm_ops::moves::mark_moved;
use kvm_ops::{Error, Field, HeldPort, Host, Result, Step, Tech, VmOps, VmPort};

use crate::HeldVm;

fn unfit<H: Host>(vm: &HeldVm<H>) -> Error {
    Error::Invalid(Field::Vm, vm.id().0)
}

/// Checks that a guest can go from the one to the other: it has come as far as `steps`, and the other awaits one.
fn check_pair<H: Host>(from: &HeldVm<H>, to: &HeldVm<H>, steps: &[Step]) -> Result<()> {
    match from.step() {
        Step::Poisoned => return Err(Error::Poisoned),
        step if steps.contains(&step) => {}
        _ => return Err(unfit(from)),
    }
    let awaits = to.port().held().is_some_and(HeldPort::awaits_guest);
    match to.step() {
        Step::Initialized if awaits && to.tech() == from.tech() => Ok(()),
        Step::Poisoned => Err(Error::Poisoned),
        _ => Err(unfit(to)),
    }
}

/// Moves the guest of `from` to `to`.
pub(crate) fn move_context<H: Host>(from: &mut HeldVm<H>, to: &mut HeldVm<H>) -> Result<()> {
    if !from.port().held().is_some_and(HeldPort::can_move) {
        return kvm_ops::not_offered!("a move of such a guest");
    }
    // The system does not hand the firmware's device over, without which a launch cannot go on.
    check_pair(from, to, &[Step::Runnable])?;
    let closed = from.gate().close();
    // The system would complete an access in a vCPU that is dead then.
    if closed.waits() {
        return Err(Error::Busy);
    }
    // Encrypted registers go from vCPU to vCPU, in the order in which they were created.
    let ids = from.gate().ids();
    if from.tech() == Tech::SevEs && to.gate().ids() != ids {
        return Err(Error::Invalid(Field::VcpuCount, ids.len() as u64));
    }
    to.port().take_guest(from.port())?;
    to.follow_move(from)?;
    mark_moved(from.life());
    Ok(())
}

/// Makes `mirror` a mirror of `owner`.
pub(crate) fn copy_context<H: Host>(owner: &HeldVm<H>, mirror: &mut HeldVm<H>) -> Result<()> {
    check_pair(owner, mirror, &[Step::Initialized, Step::Runnable])?;
    if !mirror.gate().ids().is_empty() {
        return Err(unfit(mirror));
    }
    mirror.port().share_guest(owner.port())?;
    mirror.follow_launch()
}
