//! Whose context a VM uses.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use kvm_ops::{Error, Gfn, Host, Level, NestedFaultAnswer, Step, VmPort};
use kvm_ops_mmu::{ReaderLock, WriteGuard};

use super::staging::MoveToken;
use super::{Staged, StagingTable};
use crate::SevVm;
use crate::rules::Holding;
use crate::shared::Shared;

/// How a VM stands to its encryption context.
pub(crate) enum Tenure<H: Host> {
    /// It is its own, or it has none yet.
    Owner,
    /// Its own, and good for whoever has the token. The step is the one it goes back to.
    Staged {
        table: Arc<StagingTable<Staged<H>>>,
        token: MoveToken,
        step: Step,
    },
    /// Its own or a mirror's part, on the way to another VM ([`EncContext`](kvm_ops::EncContext)).
    Released {
        step: Step,
        mirror_of: Option<Arc<Home<H>>>,
    },
    /// Moved away: the VM is dead.
    Moved,
    /// Another VM took it by token. Debug commands go there.
    Given(Weak<Shared<H>>),
    /// It is another VM's.
    Mirror(Arc<Home<H>>),
}

impl<H: Host> Tenure<H> {
    pub(crate) fn holding(&self) -> Holding {
        match self {
            Self::Owner | Self::Released { .. } | Self::Moved => Holding::Owner,
            Self::Staged { .. } | Self::Given(_) => Holding::Staged,
            Self::Mirror(_) => Holding::Mirror,
        }
    }
}

/// What ties a VM to a context and to those that share it.
pub(crate) struct Bond<H: Host> {
    pub(crate) tenure: Tenure<H>,
    /// Made with the first mirror; it goes where the context goes.
    pub(crate) home: Option<Arc<Home<H>>>,
}

impl<H: Host> Bond<H> {
    pub(crate) fn new() -> Self {
        Self {
            tenure: Tenure::Owner,
            home: None,
        }
    }
}

/// Where the context of a VM and its mirrors lives. The last of them to go takes it down: until
/// then the pages and the ASID are in use.
pub(crate) struct Home<H: Host>(ReaderLock<Household<H>>);

struct Household<H: Host> {
    at: At<H>,
    mirrors: Vec<Weak<Shared<H>>>,
}

enum At<H: Host> {
    /// With this VM.
    Owner(Weak<Shared<H>>),
    /// Its VM is gone; this is what is left of it.
    Estate(Arc<Shared<H>>),
    /// Taken down.
    Gone,
}

impl<H: Host> Home<H> {
    pub(super) fn new(owner: &Arc<Shared<H>>) -> Arc<Self> {
        Arc::new(Self(ReaderLock::new(
            1,
            Household {
                at: At::Owner(Arc::downgrade(owner)),
                mirrors: Vec::new(),
            },
        )))
    }

    fn lock(&self) -> WriteGuard<'_, Household<H>> {
        self.0.write(core::hint::spin_loop)
    }

    /// Whose context it is, while it is anyone's.
    pub(crate) fn owner(&self) -> Option<Arc<Shared<H>>> {
        match &self.lock().at {
            At::Owner(owner) => owner.upgrade(),
            At::Estate(estate) => Some(Arc::clone(estate)),
            At::Gone => None,
        }
    }

    pub(super) fn join(&self, mirror: &Arc<Shared<H>>) {
        self.lock().mirrors.push(Arc::downgrade(mirror));
    }

    /// The context moved to another VM.
    pub(super) fn moved_to(&self, owner: &Arc<Shared<H>>) {
        self.lock().at = At::Owner(Arc::downgrade(owner));
    }

    /// A mirror's part moved to another VM.
    pub(super) fn mirror_moved(&self, from: &Arc<Shared<H>>, to: &Arc<Shared<H>>) {
        for mirror in &mut self.lock().mirrors {
            if is(mirror, from) {
                *mirror = Arc::downgrade(to);
            }
        }
    }

    /// The owner's VM goes. Whether the context stays for the mirrors.
    pub(crate) fn owner_leaves(&self, owner: &Arc<Shared<H>>) -> bool {
        let mut household = self.lock();
        if household.mirrors.is_empty() {
            household.at = At::Gone;
            return false;
        }
        household.at = At::Estate(Arc::clone(owner));
        true
    }

    /// A mirror goes. Answers what is left of the owner, if this was the last to use it.
    pub(crate) fn mirror_leaves(&self, mirror: &Arc<Shared<H>>) -> Option<Arc<Shared<H>>> {
        let mut household = self.lock();
        household.mirrors.retain(|other| !is(other, mirror));
        if !household.mirrors.is_empty() {
            return None;
        }
        match core::mem::replace(&mut household.at, At::Gone) {
            At::Estate(estate) => Some(estate),
            other => {
                household.at = other;
                None
            }
        }
    }

    /// Takes a page out of every mirror's tables. Called before the page is given back.
    pub(crate) fn unmap(&self, gfn: Gfn, level: Level) -> kvm_ops::Result<()> {
        for mirror in self.mirrors() {
            mirror.port.map_encrypted(gfn, level, None)?;
        }
        Ok(())
    }

    fn mirrors(&self) -> Vec<Arc<Shared<H>>> {
        let household = self.lock();
        household.mirrors.iter().filter_map(Weak::upgrade).collect()
    }
}

impl<H: Host> Shared<H> {
    /// Where the context of a mirror lives.
    pub(crate) fn mirror_of(&self) -> Option<Arc<Home<H>>> {
        match &self.bond().tenure {
            Tenure::Mirror(home) => Some(Arc::clone(home)),
            _ => None,
        }
    }

    /// A mirror's guest touched a private frame: it sees its owner's page, if there is one.
    pub(crate) fn mirror_fault(&self, home: &Home<H>, gfn: Gfn) -> NestedFaultAnswer {
        let Some(owner) = home.owner() else {
            return NestedFaultAnswer::Leave;
        };
        // Held while the page is mapped, so that it is not taken out between.
        let memory = owner.memory();
        match memory.page(gfn) {
            Some(page) => {
                let mapped = self.port.map_encrypted(gfn, Level::Size4K, Some(page));
                mapped.map_or_else(NestedFaultAnswer::Fail, |()| NestedFaultAnswer::Retry)
            }
            // The pages are between two owners.
            None if owner.claim.claim().is_err() => NestedFaultAnswer::Retry,
            None => NestedFaultAnswer::Leave,
        }
    }

    /// Takes a page that is to be given back out of the mirrors' tables.
    pub(crate) fn unmap_in_mirrors(&self, gfn: Gfn, level: Level) -> kvm_ops::Result<()> {
        let home = self.bond().home.clone();
        home.map_or(Ok(()), |home| home.unmap(gfn, level))
    }
}

impl<H: Host> SevVm<H> {
    /// Whether the VM's context is another VM's.
    pub fn is_mirror(&self) -> bool {
        self.shared.mirror_of().is_some()
    }

    /// Whose guest the debug commands of this VM mean: the one that has the context.
    pub(crate) fn debuggee(&self) -> kvm_ops::Result<Arc<Shared<H>>> {
        match &self.shared.bond().tenure {
            Tenure::Given(to) => to.upgrade().ok_or(Error::Poisoned),
            _ => Ok(Arc::clone(&self.shared)),
        }
    }
}

fn is<H: Host>(weak: &Weak<Shared<H>>, shared: &Arc<Shared<H>>) -> bool {
    core::ptr::eq(weak.as_ptr(), Arc::as_ptr(shared))
}
