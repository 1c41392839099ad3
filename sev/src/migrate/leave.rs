//! A VM leaves the context that it shares, or has staged, before its teardown.

use alloc::sync::Arc;

use kvm_ops::moves::unstage;
use kvm_ops::{Error, FreeReport, Host, PspPort, Result, Step};

use super::group::Role;
use super::orphan::Orphan;
use crate::shared::Shared;

/// Stops the VM's vCPUs and takes it out of its group. Waits for a move that is under way.
///
/// Returns the context of an owner that went before, if this was its last mirror. An owner that
/// still has mirrors hands its context to them and has none afterwards.
///
/// # Errors
/// The port keeps the ASID bound. Nothing changed but that the vCPUs are stopped; it may be tried
/// again.
pub(crate) fn leave<H: Host>(vm: &Arc<Shared<H>>) -> Result<Option<Orphan<H>>> {
    let _claimed = vm.moving.claim().wait(|| vm.wait());
    unstage(&**vm);
    vm.stop();
    vm.unbind()?;
    let (group, is_mirror) = {
        let mut membership = vm.membership();
        let is_mirror = membership.is_mirror();
        if is_mirror {
            membership.role = Role::Moved;
        }
        (membership.group.clone(), is_mirror)
    };
    let Some(group) = group else {
        return Ok(None);
    };
    if !is_mirror {
        let left = group.owner_leaves(vm);
        vm.membership().group = None;
        return Ok(left);
    }
    vm.membership().group = None;
    group.forget_mirror(vm);
    // It names the owner's guest: forgotten, not decommissioned.
    drop(vm.context().take());
    // The mirror's VMSAs are its own pages: no cache line with the key may be left when they go.
    vm.sp().psp.wbinvd_all();
    Ok(group.mirror_leaves(vm))
}

/// The VM is given up without its teardown, so its vCPUs may use what it shares for ever. Adds an
/// orphan that it was the last to use to the report.
pub(crate) fn lose<H: Host>(vm: &Arc<Shared<H>>, error: Error, report: &mut FreeReport) {
    let membership = vm.membership();
    let group = membership.group.clone().filter(|_| membership.is_mirror());
    drop(membership);
    if let Some(orphan) = group.and_then(|group| group.mirror_lost(error)) {
        orphan.lose(error, report);
    }
}

/// The VM is dropped. If that comes before its teardown, it leaves its group, so that what it
/// shared can be freed; its own pages and key are lost.
pub(crate) fn drop_out<H: Host>(vm: &Arc<Shared<H>>, orphan: Option<Orphan<H>>) {
    let mut report = FreeReport::new(vm.id(), vm.tech());
    let torn_down = matches!(vm.step(), Step::KeyReleased | Step::Drained);
    let left = if torn_down { Ok(None) } else { leave(vm) };
    if let Err(error) = left {
        lose(vm, error, &mut report);
    }
    for orphan in orphan.into_iter().chain(left.ok().flatten()) {
        orphan.destroy(&mut report);
    }
    for leak in &report.leaks {
        tracing::error!(vm = report.vm.0, technology = %report.tech, %leak, "leaked by drop");
    }
}
