//! The VMs that share one encryption context: its owner and the owner's mirrors.
//!
//! The owner's VM has the context, the pages and the ASID. If it is torn down before its mirrors,
//! it hands them to the group, and the last mirror to leave destroys them.

use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use kvm_ops::{Error, Gfn, Host, NestedFaultAnswer};
use spin::{Mutex, MutexGuard};

use super::orphan::Orphan;
use crate::SevVm;
use crate::memory::{MirrorId, Touch, View};
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
    /// On its way from the owner to its mirrors.
    Leaving,
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
    ///
    /// Returns the context if the last mirror went meanwhile, or was lost. The owner's locks are taken without the group's.
    pub(super) fn owner_leaves(&self, owner: &Shared<H>) -> Option<Orphan<H>> {
        let (lost, shared) = {
            let mut state = self.lock();
            let shared = !state.mirrors.is_empty();
            state.context = match state.lost.is_none() && shared {
                true => At::Leaving,
                false => At::Gone,
            };
            (state.lost, shared)
        };
        if let Some(error) = lost {
            owner.give_up(error);
            return None;
        }
        if !shared {
            return None;
        }
        let orphan = Orphan::of(owner);
        let mut state = self.lock();
        state.context = At::Gone;
        let mut orphan = orphan?;
        orphan.lost = state.lost;
        if state.mirrors.is_empty() || state.lost.is_some() {
            return Some(orphan);
        }
        state.context = At::Orphan(Box::new(orphan));
        None
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

    fn mirrors(&self) -> Vec<Arc<Shared<H>>> {
        let state = self.lock();
        state.mirrors.iter().filter_map(Weak::upgrade).collect()
    }

    /// Takes a page out of a mirror's tables. One that went runs no more.
    pub(crate) fn unmap(&self, view: &View) -> kvm_ops::Result<()> {
        let mirrors = self.mirrors();
        let mut mirrors = mirrors.iter();
        match mirrors.find(|mirror| MirrorId::of(&***mirror) == view.mirror) {
            Some(mirror) => mirror.sev()?.map_encrypted(view.gfn, view.level, None),
            None => Ok(()),
        }
    }

    /// True if a slot of a mirror's shows that host memory.
    pub(crate) fn shows(&self, host: u64) -> bool {
        let mirrors = self.mirrors();
        mirrors
            .iter()
            .any(|mirror| mirror.memory().gpa_of(host).is_some())
    }

    /// The VM that has the context.
    fn owner(&self) -> Option<Arc<Shared<H>>> {
        match &self.lock().context {
            At::Owner(owner) => owner.upgrade(),
            _ => None,
        }
    }

    /// A mirror's slot is gone: no page is mapped in its place any more.
    pub(crate) fn forget_views(
        &self,
        mirror: &Shared<H>,
        first: Gfn,
        pages: u64,
    ) -> kvm_ops::Result<()> {
        let id = MirrorId::of(mirror);
        if let Some(owner) = self.owner() {
            return owner.forget_views(id, first, pages);
        }
        let mut state = self.lock();
        let At::Orphan(orphan) = &mut state.context else {
            return Ok(());
        };
        for view in orphan.memory.views.of_mirror(id, first, pages) {
            mirror.sev()?.map_encrypted(view.gfn, view.level, None)?;
            orphan.memory.views.forget(&view);
        }
        Ok(())
    }

    /// A mirror runs no more: nothing is to be taken out of its tables.
    pub(super) fn forget_mirror(&self, mirror: &Shared<H>) {
        let id = MirrorId::of(mirror);
        match self.owner() {
            Some(owner) => owner.memory().views.forget_mirror(id),
            None => {
                if let At::Orphan(orphan) = &mut self.lock().context {
                    orphan.memory.views.forget_mirror(id);
                }
            }
        }
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

    /// The group of an owner.
    pub(crate) fn owned_group(&self) -> Option<Arc<Group<H>>> {
        let membership = self.membership();
        membership.group.clone().filter(|_| !membership.is_mirror())
    }

    /// A mirror's guest touched a private frame: it gets the page that the owner has for the memory of the mirror's slot.
    pub(crate) fn mirror_fault(&self, group: &Group<H>, gfn: Gfn) -> NestedFaultAnswer {
        let port = match self.sev() {
            Ok(port) => port,
            Err(error) => return NestedFaultAnswer::Fail(error),
        };
        let slot = || self.memory().slots.find(gfn).copied();
        let touch = Touch {
            mirror: MirrorId::of(self),
            port,
            gfn,
            slot: slot(),
            has_slots: self.memory().slots.iter().next().is_some(),
        };
        let answer = group.map(&touch);
        if slot() == touch.slot {
            return answer;
        }
        // The slot changed meanwhile: what was mapped in its place goes.
        match group.forget_views(self, gfn, 1) {
            Ok(()) => NestedFaultAnswer::Retry,
            Err(error) => NestedFaultAnswer::Fail(error),
        }
    }
}

impl<H: Host> Group<H> {
    /// Maps what a mirror touched. Only one VM's locks are held at a time: the mirror's slot was looked up before.
    fn map(&self, touch: &Touch<'_>) -> NestedFaultAnswer {
        let owner = {
            let mut state = self.lock();
            match &mut state.context {
                At::Owner(owner) => owner.upgrade(),
                At::Leaving => return NestedFaultAnswer::Retry,
                At::Orphan(orphan) => return orphan.map_for_mirror(touch),
                At::Gone => None,
            }
        };
        owner.map_or(NestedFaultAnswer::Leave, |owner| {
            owner.map_for_mirror(touch)
        })
    }
}

impl<H: Host> SevVm<H> {
    /// True if the VM uses the context of another VM.
    pub fn is_mirror(&self) -> bool {
        self.shared.membership().is_mirror()
    }

    /// The VM whose guest this VM's debug commands mean.
    pub(crate) fn debuggee(&self) -> kvm_ops::Result<Arc<Shared<H>>> {
        let group = self.shared.mirrored_group();
        let owner = group.and_then(|group| group.owner());
        match &self.shared.membership().role {
            Role::Given(to) => to.upgrade().ok_or(Error::Poisoned),
            // The pages are the owner's.
            Role::Mirror => Ok(owner.unwrap_or_else(|| Arc::clone(&self.shared))),
            _ => Ok(Arc::clone(&self.shared)),
        }
    }
}

fn is<H: Host>(weak: &Weak<Shared<H>>, shared: &Arc<Shared<H>>) -> bool {
    core::ptr::eq(weak.as_ptr(), Arc::as_ptr(shared))
}
