//! A context with its pages moves from one VM to another of the same machine.
//!
//! Nothing is copied and no command is issued: the guest keeps its handle and its ASID, and its
//! pages their keys. So the cost does not depend on the guest's size; faults fill the new VM's nested
//! page tables.
//!
//! Locks, in the order of Linux `sev_vm_move_enc_context_from`: the claims of both VMs, the
//! receiver's first, refused if set; then the receiver's locks before the source's. That cannot
//! deadlock, because only the holder of both claims takes locks of two VMs.

use alloc::sync::Arc;

use kvm_ops::moves::{Movable, claim_both, mark_moved};
use kvm_ops::{Asid, Error, Field, Host, PspPort, Result, Step, VmPort};

use super::account::Charge;
use super::group::{Group, Membership, Role};
use crate::context::Context;
use crate::shared::Shared;

/// The error for a VM that does not fit.
pub(super) fn unfit<H: Host>(vm: &Shared<H>) -> Error {
    Error::Invalid(Field::Vm, vm.id().0)
}

/// Checks that a VM owns its context, and shares it with no mirror.
pub(crate) fn is_plain_owner<H: Host>(vm: &Shared<H>) -> Result<()> {
    let membership = vm.membership();
    match matches!(membership.role, Role::Owner) && membership.group.is_none() {
        true => Ok(()),
        false => Err(unfit(vm)),
    }
}

/// Checks a pair for a move or a mirror: two VMs of one machine and one technology, and a receiver
/// whose launch has not begun.
fn check_pair<H: Host>(to: &Shared<H>, from: &Shared<H>) -> Result<()> {
    let machine = |vm: &Shared<H>| {
        vm.host
            .psp()
            .map(|psp| core::ptr::from_ref(psp.asid_pools()))
    };
    if machine(to) != machine(from) || to.tech() != from.tech() {
        return Err(unfit(from));
    }
    match to.step() {
        Step::Created | Step::Initialized => {}
        Step::Poisoned => return Err(Error::Poisoned),
        _ => return Err(unfit(to)),
    }
    let membership_is_fresh = {
        let membership = to.membership();
        // Mirrors of the receiver would keep the context that the new one replaces.
        matches!(membership.role, Role::Owner) && membership.group.is_none()
    };
    let fresh = to.context().as_ref().is_none_or(|c| c.guest.is_none())
        && to.memory().has_no_page()
        && to.regions().is_empty()
        && membership_is_fresh;
    if fresh { Ok(()) } else { Err(unfit(to)) }
}

/// Checks that a VM has a context that another may take or share.
fn check_source<H: Host>(from: &Shared<H>) -> Result<()> {
    match &from.membership().role {
        Role::Owner | Role::Mirror => {}
        // The token must be traded or withdrawn first.
        Role::Staged => return Err(Error::Busy),
        Role::Given(_) | Role::Moved => return Err(Error::Poisoned),
    }
    match from.step() {
        Step::Poisoned => Err(Error::Poisoned),
        // The launch of an SNP guest ends where it began: its parameters are the VM's.
        Step::Initialized if !from.is_snp() => Ok(()),
        Step::Runnable => Ok(()),
        _ => Err(unfit(from)),
    }
}

/// Moves the context of `from` to `to`.
pub(crate) fn move_context<H: Host>(from: &Arc<Shared<H>>, to: &Arc<Shared<H>>) -> Result<()> {
    let _claims = claim_both(to, from)?;
    check_source(from)?;
    from.halt()?;
    take_over(to, from, |_| Ok(())).inspect_err(|_| from.reopen())?;
    from.membership().role = Role::Moved;
    Ok(())
}

/// Makes `mirror` a mirror of `owner`.
pub(crate) fn copy_context<H: Host>(owner: &Arc<Shared<H>>, mirror: &Arc<Shared<H>>) -> Result<()> {
    let _claims = claim_both(mirror, owner)?;
    check_source(owner)?;
    check_pair(mirror, owner)?;
    // KVM has no mirrors of SNP guests: each VM's nested page table would need its own RMP entries.
    if owner.membership().is_mirror() || owner.is_snp() {
        return Err(unfit(owner));
    }
    if !mirror.all_cells().is_empty() {
        return Err(unfit(mirror));
    }
    let copy = {
        let context = owner.context();
        let context = context.as_ref().ok_or(unfit(owner))?;
        if let Ok(asid) = owner.asid() {
            mirror.bind(asid)?;
        }
        context.mirrored()
    };
    let own = mirror.context().replace(copy);
    give_back_unused(mirror, own);
    let group = {
        let mut membership = owner.membership();
        Arc::clone(membership.group.get_or_insert_with(|| Group::new(owner)))
    };
    group.join(mirror);
    *mirror.membership() = Membership {
        role: Role::Mirror,
        group: Some(group),
    };
    mirror.advance_to(Step::Runnable);
    Ok(())
}

/// Gives back the key that a receiver leased for itself.
fn give_back_unused<H: Host>(vm: &Shared<H>, own: Option<Context>) {
    if let Some(own) = own
        && let Some(lease) = own.lease
    {
        vm.sp().retire(lease, own.soiled);
    }
}

/// Register state moves only when all of it is encrypted, and only to as many vCPUs.
fn check_vcpus<H: Host>(to: &Shared<H>, from: &Shared<H>) -> Result<()> {
    if !from.is_es() {
        return Ok(());
    }
    let (there, here) = (to.all_cells(), from.all_cells());
    if there.len() != here.len() || !here.iter().all(|cell| cell.is_protected()) {
        return Err(Error::Invalid(Field::VcpuCount, here.len() as u64));
    }
    Ok(())
}

/// The charge that the context has at the receiver: `None` leaves it as it is. The receiver's
/// account pays, if it has one; it pays already for the key that the receiver leased, and that
/// goes back. For a mirror the owner pays.
fn charge<H: Host>(
    to: &Shared<H>,
    from: &Shared<H>,
    own: Option<&mut Context>,
    context: &Context,
) -> Result<Option<Charge>> {
    let is_mirror = from.membership().is_mirror();
    let Some(account) = to.payer().filter(|_| !is_mirror) else {
        return Ok(None);
    };
    if context.charge.as_ref().is_some_and(|c| c.is_to(&account)) {
        return Ok(None);
    }
    let own = own.and_then(|own| own.charge.take_if(|charge| charge.is_to(&account)));
    match own {
        Some(charge) => Ok(Some(charge)),
        None => account.charge(to.tech()).map(Some),
    }
}

/// Takes the context of `from`, whose vCPUs are halted, into `to`. The claims of both are held.
/// `confirm` is called last before anything changes, and may refuse.
///
/// # Errors
/// Nothing changed.
pub(super) fn take_over<H: Host>(
    to: &Arc<Shared<H>>,
    from: &Arc<Shared<H>>,
    confirm: impl FnOnce(&Context) -> Result<()>,
) -> Result<()> {
    // A source that an earlier attempt lost; its token may still be there.
    if from.life.step_at_home() == Step::Poisoned {
        return Err(Error::Poisoned);
    }
    check_pair(to, from)?;
    check_vcpus(to, from)?;
    let mut own = to.context();
    let mut leaving = from.context();
    let Some(context) = leaving.as_ref() else {
        return Err(unfit(from));
    };
    let paid = charge(to, from, own.as_mut(), context)?;
    if let Err(error) = confirm(context).and_then(|()| hand_over(to, from)) {
        // The receiver's account goes on paying for the receiver's own key.
        if let (Some(own), Some(paid)) = (own.as_mut(), paid) {
            own.charge.get_or_insert(paid);
        }
        return Err(error);
    }

    // From here on nothing can fail.
    give_back_unused(to, own.take());
    *own = leaving.take().map(|context| Context {
        charge: paid.or(context.charge),
        ..context
    });
    drop((own, leaving));
    to.memory().take_pages(&mut from.memory());
    to.regions().take(&mut from.regions());
    for (new, old) in to.all_cells().iter().zip(from.all_cells()) {
        if let Some(vmsa) = old.state().vmsa.take() {
            new.state().vmsa = Some(vmsa);
            new.protect();
        }
    }
    to.account.take_over(&from.account);
    let mut membership = from.membership();
    let (is_mirror, group) = (membership.is_mirror(), membership.group.take());
    drop(membership);
    if let Some(group) = group {
        // Known to the receiver before a mirror asks it for pages.
        to.membership().group = Some(Arc::clone(&group));
        if is_mirror {
            group.mirror_moved(from, to);
            to.membership().role = Role::Mirror;
            group.forget_mirror(from);
        } else {
            group.moved_to(to);
        }
    }
    to.advance_to(from.life.step_at_home());
    mark_moved(&from.life);
    Ok(())
}

/// The ports' part: the ASID, then what else the machine keeps of the guest. Undone if it fails.
fn hand_over<H: Host>(to: &Shared<H>, from: &Shared<H>) -> Result<()> {
    let asid = from.asid().ok();
    if let Some(asid) = asid {
        unbind(from)?;
        to.bind(asid)
            .inspect_err(|error| bind_again(from, asid, error))?;
    }
    to.port.take_guest(&from.port).inspect_err(|error| {
        if let Some(asid) = asid {
            // A receiver that keeps the ASID has no guest that it could run, and loses it with its teardown.
            let _ = unbind(to);
            bind_again(from, asid, error);
        }
    })
}

/// Takes the ASID out of the VMCBs.
fn unbind<H: Host>(vm: &Shared<H>) -> Result<()> {
    vm.sev()?.bind_asid(None, vm.mask)?;
    vm.set_bound(None);
    Ok(())
}

/// Gives the source its ASID back after that failure. Without it the guest cannot run any more: it is lost, and can be torn down.
fn bind_again<H: Host>(from: &Shared<H>, asid: Asid, error: &Error) {
    if from.bind(asid).is_err() {
        from.poison(error);
    }
}

/// The properties of a guest besides memory and registers. All of them move with its context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextFacts {
    /// The policy of its launch.
    pub policy: u64,
    /// SEV_FEATURES of its VMSAs.
    pub vmsa_features: u64,
    /// The version of the GHCB protocol.
    pub ghcb_version: u16,
    /// The state of its launch.
    pub state: crate::GuestState,
}

impl<H: Host> crate::SevVm<H> {
    /// The machine that holds it.
    pub fn host(&self) -> &H {
        &self.shared.host
    }

    /// Makes every vCPU leave the guest once.
    pub fn kick_all(&self) {
        for cell in self.shared.all_cells() {
            cell.kick.kick();
        }
    }

    /// The properties of the VM's guest; `None` without a context.
    pub fn context_facts(&self) -> Option<ContextFacts> {
        let context = self.shared.context();
        let context = context.as_ref()?;
        Some(ContextFacts {
            policy: context.policy,
            vmsa_features: context.vmsa_features,
            ghcb_version: context.ghcb_version,
            state: context.state,
        })
    }
}
