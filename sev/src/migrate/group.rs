//! The VMs that share one encryption context: its owner and the owner's mirrors.
//!
//! The owner's VM has the context, the pages and the ASID. If it is torn down before its mirrors,
//! it hands them to the group, and the last mirror to leave destroys them.

use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use kvm_ops::{Error, Gfn, Host, Level, NestedFaultAnswer};
use spin::{Mutex, MutexGuard};

use super::orphan::Orphan;
use crate::SevVm;
use crate::rules::Holding;
use crate::shared::Shared;

/// A VM's use of an encryption context.
pub(crate) enum Role<H: Host> {
    /// It owns its context, or has none yet.
    Owner,
    /// It owns its context until somebody brings the token to another VM.
    Staged,
    /// Its context moved to another VM.
    Moved,
    /// Another VM took its context by token. Debug commands go there.
    Given(Weak<Shared<H>>),
    /// It uses the context of its group's owner.
    Mirror,
}

/// A VM's role, and its group if it is an owner with mirrors or a mirror.
pub(crate) struct Membership<H: Host> {
    pub(crate) role: Role<H>,
    pub(crate) group: Option<Arc<Group<H>>>,
}

impl<H: Host> Membership<H> {
    pub(crate) fn new() -> Self {
        Self {
            role: Role::Owner,
            group: None,
        }
    }

    pub(crate) fn is_mirror(&self) -> bool {
        matches!(self.role, Role::Mirror)
    }

    pub(crate) fn holding(&self) -> Holding {
        match self.role {
            Role::Owner | Role::Moved => Holding::Owner,
            Role::Staged | Role::Given(_) => Holding::Staged,
            Role::Mirror => Holding::Mirror,
        }
    }
}

/// An owner and its mirrors.
pub(crate) struct Group<H: Host>(Mutex<State<H>>);

struct State<H: Host> {
    context: At<H>,
    mirrors: Vec<Weak<Shared<H>>>,
    /// A mirror was given up without its teardown and may use the context for ever.
    lost: Option<Error>,
}

/// The place of the group's context.
enum At<H: Host> {
    Owner(Weak<Shared<H>>),
    Orphan(Box<Orphan<H>>),
    Gone,
}

impl<H: Host> Group<H> {
    pub(super) fn new(owner: &Arc<Shared<H>>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            context: At::Owner(Arc::downgrade(owner)),
            mirrors: Vec::new(),
            lost: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State<H>> {
        self.0.lock()
    }

    pub(super) fn join(&self, mirror: &Arc<Shared<H>>) {
        self.lock().mirrors.push(Arc::downgrade(mirror));
    }

    /// The context moved to another VM.
    pub(super) fn moved_to(&self, owner: &Arc<Shared<H>>) {
        self.lock().context = At::Owner(Arc::downgrade(owner));
    }

    /// A mirror's place in the group moved to another VM.
    pub(super) fn mirror_moved(&self, from: &Arc<Shared<H>>, to: &Arc<Shared<H>>) {
        for mirror in &mut self.lock().mirrors {
            if is(mirror, from) {
                *mirror = Arc::downgrade(to);
            }
        }
    }

    /// The owner's VM goes: its context stays here if mirrors use it. A context that a lost mirror
    /// may use is given up instead.
    pub(super) fn owner_leaves(&self, owner: &Shared<H>) {
        let mut state = self.lock();
        state.context = At::Gone;
        if let Some(error) = state.lost {
            owner.give_up(error);
        } else if !state.mirrors.is_empty()
            && let Some(orphan) = Orphan::of(owner)
        {
            state.context = At::Orphan(Box::new(orphan));
        }
    }

    /// A mirror goes. Returns the context if its owner went before and no other mirror uses it.
    pub(super) fn mirror_leaves(&self, mirror: &Arc<Shared<H>>) -> Option<Orphan<H>> {
        let mut state = self.lock();
        state.mirrors.retain(|other| !is(other, mirror));
        if !state.mirrors.is_empty() {
            return None;
        }
        state.take_orphan()
    }

    /// A mirror is given up without its teardown. Nothing under the context can be used again: the
    /// owner lists it as leaked, or the caller does if it gets the orphan.
    pub(super) fn mirror_lost(&self, error: Error) -> Option<Orphan<H>> {
        let mut state = self.lock();
        state.lost = Some(error);
        state.take_orphan()
    }

    /// Takes a page out of every mirror's tables. Called before the page is given back or split.
    fn unmap(&self, gfn: Gfn, level: Level) -> kvm_ops::Result<()> {
        let mirrors: Vec<_> = {
            let state = self.lock();
            state.mirrors.iter().filter_map(Weak::upgrade).collect()
        };
        mirrors
            .iter()
            .try_for_each(|mirror| mirror.sev()?.map_encrypted(gfn, level, None))
    }
}

impl<H: Host> State<H> {
    fn take_orphan(&mut self) -> Option<Orphan<H>> {
        match core::mem::replace(&mut self.context, At::Gone) {
            At::Orphan(orphan) => Some(*orphan),
            other => {
                self.context = other;
                None
            }
        }
    }
}

impl<H: Host> Shared<H> {
    /// The group of a mirror.
    pub(crate) fn mirrored_group(&self) -> Option<Arc<Group<H>>> {
        let membership = self.membership();
        membership.group.clone().filter(|_| membership.is_mirror())
    }

    /// A mirror's guest touched a private frame: it gets the mapping that its owner has there, of
    /// the same size, so that the owner's unmap fits it.
    pub(crate) fn mirror_fault(&self, group: &Group<H>, gfn: Gfn) -> NestedFaultAnswer {
        let sev = match self.sev() {
            Ok(sev) => sev,
            Err(error) => return NestedFaultAnswer::Fail(error),
        };
        let owner = {
            let state = group.lock();
            match &state.context {
                At::Owner(owner) => owner.upgrade(),
                At::Orphan(orphan) => {
                    let mapped = orphan.memory.map_into(sev, gfn);
                    return mapped.unwrap_or(NestedFaultAnswer::Leave);
                }
                At::Gone => None,
            }
        };
        let Some(owner) = owner else {
            return NestedFaultAnswer::Leave;
        };
        // The lock is held while the page is mapped, so that it is not taken out between.
        let mapped = owner.memory().map_into(sev, gfn);
        let moving = || owner.moving.claim().claim().is_err() || !group.is_at(&owner);
        match mapped {
            Some(answer) => answer,
            // The pages are on their way to another VM or to the group.
            None if moving() => NestedFaultAnswer::Retry,
            None => NestedFaultAnswer::Leave,
        }
    }

    /// Takes a page out of the mirrors' tables.
    pub(crate) fn unmap_in_mirrors(&self, gfn: Gfn, level: Level) -> kvm_ops::Result<()> {
        let group = self.membership().group.clone();
        group.map_or(Ok(()), |group| group.unmap(gfn, level))
    }
}

impl<H: Host> Group<H> {
    fn is_at(&self, owner: &Arc<Shared<H>>) -> bool {
        matches!(&self.lock().context, At::Owner(at) if is(at, owner))
    }
}

impl<H: Host> SevVm<H> {
    /// True if the VM uses the context of another VM.
    pub fn is_mirror(&self) -> bool {
        self.shared.membership().is_mirror()
    }

    /// The VM whose guest this VM's debug commands mean.
    pub(crate) fn debuggee(&self) -> kvm_ops::Result<Arc<Shared<H>>> {
        match &self.shared.membership().role {
            Role::Given(to) => to.upgrade().ok_or(Error::Poisoned),
            _ => Ok(Arc::clone(&self.shared)),
        }
    }
}

fn is<H: Host>(weak: &Weak<Shared<H>>, shared: &Arc<Shared<H>>) -> bool {
    core::ptr::eq(weak.as_ptr(), Arc::as_ptr(shared))
}
