//! A context and all that goes with it pass from one VM to another of the same machine.
//!
//! Nothing is copied and no command is issued: the guest keeps its handle and its ASID, and its
//! pages their keys. So the cost does not depend on the guest's size; the new VM's nested page
//! tables are filled by faults.
//!
//! Locks, in the order of Linux `sev_vm_move_enc_context_from`: the claims of both VMs, the
//! receiver's first, refused where set; then the receiver's locks before the source's. That cannot
//! deadlock, because only who has both claims takes locks of two VMs.

use alloc::sync::Arc;

use kvm_ops::{Error, Field, Host, PspPort, Result, Step, Tech, VmPort};

use super::account::Charge;
use super::bond::{Home, Tenure};
use super::claim::Claimed;
use crate::context::Context;
use crate::shared::Shared;

/// A VM that cannot play the part that it was given.
pub(super) fn unfit<H: Host>(vm: &Shared<H>) -> Error {
    Error::Invalid(Field::Vm, vm.id.0)
}

/// Claims the receiver, then the source.
pub(super) fn claim_both<'a, H: Host>(
    to: &'a Arc<Shared<H>>,
    from: &'a Arc<Shared<H>>,
) -> Result<(Claimed<'a>, Claimed<'a>)> {
    if Arc::ptr_eq(to, from) {
        return Err(unfit(to));
    }
    Ok((to.claim.claim()?, from.claim.claim()?))
}

/// What holds for moves and mirrors alike: two VMs of one machine and one technology, and a
/// receiver whose launch has not begun.
pub(super) fn check_pair<H: Host>(to: &Shared<H>, from: &Shared<H>) -> Result<()> {
    let machine = |vm: &Shared<H>| {
        vm.host
            .psp()
            .map(|psp| core::ptr::from_ref(psp.asid_pools()))
    };
    if machine(to) != machine(from) || to.tech != from.tech || from.tech == Tech::SevSnp {
        return Err(unfit(from));
    }
    match to.step() {
        Step::Created | Step::Initialized => {}
        Step::Poisoned => return Err(Error::Poisoned),
        _ => return Err(unfit(to)),
    }
    let fresh = to.context().as_ref().is_none_or(|c| c.identity.is_none())
        && to.memory().frames().next().is_none()
        && to.regions().is_empty()
        && matches!(to.bond().tenure, Tenure::Owner);
    if fresh { Ok(()) } else { Err(unfit(to)) }
}

/// No vCPU of the VM runs when it returns, and none will until [`reopen`].
pub(super) fn halt<H: Host>(vm: &Shared<H>) {
    vm.stop();
    vm.set_step(Step::Poisoned);
}

/// Undoes [`halt`].
pub(super) fn reopen<H: Host>(vm: &Shared<H>, step: Step) {
    vm.set_step(step);
    vm.gate.open();
}

/// Register state can move only when it is all encrypted, and only to as many vCPUs.
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

/// Who pays from now on. The receiver's account does, if it has one; it pays already for the key
/// that the receiver leased for itself, and that goes back. For a mirror nobody pays: its owner
/// does.
fn charge<H: Host>(
    to: &Shared<H>,
    from: &Shared<H>,
    own: Option<&mut Context>,
    context: &Context,
) -> Result<Option<Charge>> {
    let is_mirror = matches!(
        &from.bond().tenure,
        Tenure::Released {
            mirror_of: Some(_),
            ..
        }
    );
    let Some(account) = to.account().filter(|_| !is_mirror) else {
        return Ok(None);
    };
    if context.charge.as_ref().is_some_and(|c| c.is_to(&account)) {
        return Ok(None);
    }
    let own = own.and_then(|own| own.charge.take_if(|charge| charge.is_to(&account)));
    match own {
        Some(charge) => Ok(Some(charge)),
        None => account.charge(to.tech).map(Some),
    }
}

/// Takes the context of `from`, whose vCPUs are halted, into `to`. The claims of both are held.
/// `told` is asked last; what it refuses, nothing has happened.
///
/// # Errors
/// Nothing changed.
pub(super) fn take_over<H: Host>(
    to: &Arc<Shared<H>>,
    from: &Arc<Shared<H>>,
    step: Step,
    told: impl FnOnce(&Context) -> Result<()>,
) -> Result<()> {
    check_pair(to, from)?;
    check_vcpus(to, from)?;
    let mut own = to.context();
    let mut leaving = from.context();
    let Some(context) = leaving.as_ref() else {
        return Err(unfit(from));
    };
    let paid = charge(to, from, own.as_mut(), context)?;
    let undone = |error, paid: Option<Charge>, own: &mut Option<Context>| {
        // What it paid for its own key it pays for still.
        if let (Some(own), Some(paid)) = (own, paid) {
            own.charge.get_or_insert(paid);
        }
        Err(error)
    };
    if let Err(error) = told(context) {
        return undone(error, paid, &mut own);
    }
    if let Err(error) = rebind(to, from) {
        return undone(error, paid, &mut own);
    }

    // From here on nothing can fail.
    if let Some(own) = own.take() {
        if let Some(asid) = own.asid {
            to.retire(asid, own.soiled);
        }
    }
    let context = leaving.take().map(|mut context| {
        if paid.is_some() {
            context.charge = paid;
        }
        context
    });
    *own = context;
    drop((own, leaving));
    to.memory().take_pages(&mut from.memory());
    to.regions().take(&mut from.regions());
    for (new, old) in to.all_cells().iter().zip(from.all_cells()) {
        if let Some(vmsa) = old.state().vmsa.take() {
            new.state().vmsa = Some(vmsa);
            new.protect();
        }
    }
    to.books.take(&from.books);
    let home = from.bond().home.take();
    if let Some(home) = &home {
        home.moved_to(to);
    }
    to.bond().home = home;
    to.set_step(step);
    Ok(())
}

/// The ASID goes from the one's VMCBs to the other's.
fn rebind<H: Host>(to: &Shared<H>, from: &Shared<H>) -> Result<()> {
    let Ok(asid) = from.asid() else {
        return Ok(());
    };
    from.port.bind_asid(None, from.mask)?;
    if let Err(error) = to.port.bind_asid(Some(asid), to.mask) {
        if from.port.bind_asid(Some(asid), from.mask).is_err() {
            from.set_bound(None);
        }
        return Err(error);
    }
    from.set_bound(None);
    to.set_bound(Some(asid));
    Ok(())
}

/// Makes `to` a mirror of `from`: its context is `from`'s, as long as either lives.
pub(super) fn mirror<H: Host>(to: &Arc<Shared<H>>, from: &Arc<Shared<H>>) -> Result<()> {
    check_pair(to, from)?;
    if !to.all_cells().is_empty() {
        return Err(unfit(to));
    }
    let mut own = to.context();
    let owner = from.context();
    let Some(context) = owner.as_ref() else {
        return Err(unfit(from));
    };
    let mirrored = context.mirrored();
    if let Ok(asid) = from.asid() {
        to.port.bind_asid(Some(asid), to.mask)?;
        to.set_bound(Some(asid));
    }
    if let Some(own) = own.replace(mirrored) {
        if let Some(asid) = own.asid {
            to.retire(asid, own.soiled);
        }
    }
    drop((own, owner));
    let home = {
        let mut bond = from.bond();
        Arc::clone(bond.home.get_or_insert_with(|| Home::new(from)))
    };
    home.join(to);
    to.bond().tenure = Tenure::Mirror(home);
    to.set_step(Step::Runnable);
    Ok(())
}

/// What a guest is, besides its memory and registers; all of it goes where its context goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextFacts {
    /// The policy that it was launched with.
    pub policy: u64,
    /// SEV_FEATURES of its VMSAs.
    pub vmsa_features: u64,
    /// The GHCB protocol that it was told.
    pub ghcb_version: u16,
    /// How far its launch came.
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

    /// What the VM's context says of its guest; `None` without one.
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
