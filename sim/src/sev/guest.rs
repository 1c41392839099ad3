//! The processor's state of a SEV guest: its ASID and its nested page table.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kvm_ops::{
    Asid, Error, Field, Gfn, Level, NestedFaultAnswer, NestedFaults, Page, Result, SharedMask,
};
use soft_amd_sp::{GuestPage, PageSize};

/// The SEV side of a VM; that of a normal VM stays empty.
#[derive(Default)]
pub(crate) struct Guest {
    /// Held shared by an access while it copies, so that a mapping is out of use when its removal
    /// returns.
    state: RwLock<State>,
    handler: Mutex<Option<Arc<dyn NestedFaults>>>,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// The ASID field of the VMCBs.
    asid: Option<Asid>,
    mask: Option<SharedMask>,
    /// The encrypted part of the nested page table: first frame to page and size.
    mappings: BTreeMap<u64, (u64, PageSize)>,
}

impl State {
    /// The page that a frame is mapped to, as the RMP check takes it. `None` without an ASID.
    pub(crate) fn page(&self, gfn: Gfn, offset: u64) -> Option<GuestPage> {
        let (first, (page, mapping)) = self.mappings.range(..=gfn.get()).next_back()?;
        let inside = gfn.get() - first;
        if inside >= mapping.bytes() >> 12 {
            return None;
        }
        Some(GuestPage {
            asid: self.asid?.0,
            vmpl: 0,
            gpa: (gfn.get() << 12) + offset,
            spa: ((page + inside) << 12) + offset,
            mapping: *mapping,
        })
    }
}

impl Guest {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mask of the guest's addresses; none before it is bound.
    pub(crate) fn mask(&self) -> SharedMask {
        self.read().mask.unwrap_or(SharedMask::NONE)
    }

    pub(crate) fn bind(&self, asid: Option<Asid>, mask: SharedMask) {
        let mut state = self.write();
        state.asid = asid;
        state.mask = Some(mask);
    }

    pub(crate) fn map(&self, gfn: Gfn, level: Level, page: Option<&Page>) -> Result<()> {
        let size = match level {
            Level::Size4K => PageSize::Size4K,
            Level::Size2M => PageSize::Size2M,
            _ => return Err(Error::Invalid(Field::Level, level as u64)),
        };
        if !gfn.is_aligned(level) {
            return Err(Error::Invalid(Field::Gfn, gfn.get()));
        }
        let mut state = self.write();
        match page {
            None => {
                state.mappings.remove(&gfn.get());
            }
            Some(page) if page.level() == level => {
                state.mappings.insert(gfn.get(), (page.pfn().get(), size));
            }
            Some(page) => return Err(Error::Invalid(Field::Level, page.level() as u64)),
        }
        Ok(())
    }

    /// The VM is closed: nothing is bound or mapped any more, and no fault reaches the back end.
    pub(crate) fn close(&self) {
        *self.write() = State::default();
        *self.handler() = None;
    }

    pub(crate) fn handle_faults(&self, handler: Option<Arc<dyn NestedFaults>>) {
        *self.handler() = handler;
    }

    fn handler(&self) -> std::sync::MutexGuard<'_, Option<Arc<dyn NestedFaults>>> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the back end, with no lock held.
    pub(crate) fn ask(
        &self,
        question: impl FnOnce(&dyn NestedFaults) -> NestedFaultAnswer,
    ) -> NestedFaultAnswer {
        let handler = self.handler().clone();
        match handler {
            Some(handler) => question(&*handler),
            None => NestedFaultAnswer::Leave,
        }
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.read().fmt(f)
    }
}
