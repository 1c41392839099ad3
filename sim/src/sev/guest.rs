//! The processor's state of a SEV guest: its ASID and its nested page table.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kvm_ops::{
    Asid, Error, Field, Gfn, Level, NestedFaultAnswer, NestedFaults, Page, Result, SharedMask,
    VcpuId,
};
use soft_amd_sp::{GuestPage, PageSize};

/// The SEV side of a VM; that of a normal VM stays empty.
#[derive(Default)]
pub(crate) struct Guest {
    /// Held shared by an access while it copies, so that a mapping is out of use when its removal
    /// returns.
    state: RwLock<State>,
    handler: Mutex<Option<Arc<dyn NestedFaults>>>,
    /// For vCPUs that execute machine code.
    vcpus: Mutex<BTreeMap<VcpuId, VcpuState>>,
    /// Where application processors start (AP jump table), of a SEV-ES guest.
    jump_table: AtomicU64,
    /// The embedder has certificates for requests of an SNP guest.
    certificates: AtomicBool,
    /// Without the C-bit the guest reaches slots also where it has private pages.
    shows_slots: AtomicBool,
}

/// What the host keeps of a vCPU with encrypted register state.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct VcpuState {
    /// The GHCB MSR.
    pub(crate) ghcb: u64,
    /// The GHCB page that was registered.
    pub(crate) registered: Option<u64>,
    /// The address of a save area that the guest made.
    pub(crate) vmsa: Option<u64>,
    /// What another vCPU wants it to do next.
    pub(crate) next: Option<Creation>,
    /// An exit waits for the embedder's answer.
    pub(crate) owes: bool,
}

/// SNP AP Creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Creation {
    /// Runs from this save area, now or after INIT.
    Run { vmsa: u64, now: bool },
    /// Does not run any more.
    Destroy,
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
    /// The mask of the guest's addresses; none before it is bound.
    pub(crate) fn mask(&self) -> SharedMask {
        self.mask.unwrap_or(SharedMask::NONE)
    }

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
    /// The ASID that the guest is bound to.
    pub(crate) fn asid(&self) -> Option<Asid> {
        self.read().asid
    }

    fn vcpus(&self) -> MutexGuard<'_, BTreeMap<VcpuId, VcpuState>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn vcpu(&self, id: VcpuId) -> VcpuState {
        self.vcpus().get(&id).copied().unwrap_or_default()
    }

    pub(crate) fn change_vcpu(&self, id: VcpuId, change: impl FnOnce(&mut VcpuState)) {
        change(self.vcpus().entry(id).or_default());
    }

    /// True if an exit of a vCPU waits for the embedder's answer.
    pub(crate) fn owes(&self) -> bool {
        self.vcpus().values().any(|vcpu| vcpu.owes)
    }

    /// What the host keeps of the vCPUs goes with the guest.
    pub(crate) fn take_vcpus(&self, from: &Self) {
        let vcpus = std::mem::take(&mut *from.vcpus());
        *self.vcpus() = vcpus;
        let table = from.jump_table.swap(0, Ordering::Relaxed);
        self.jump_table.store(table, Ordering::Relaxed);
    }

    pub(crate) fn asks_for_certificates(&self) -> bool {
        self.certificates.load(Ordering::Relaxed)
    }

    pub(crate) fn ask_for_certificates(&self, on: bool) {
        self.certificates.store(on, Ordering::Relaxed);
    }

    pub(crate) fn shows_slots(&self) -> bool {
        self.shows_slots.load(Ordering::Relaxed)
    }

    pub(crate) fn show_slots(&self) {
        self.shows_slots.store(true, Ordering::Relaxed);
    }

    pub(crate) fn jump_table(&self) -> &AtomicU64 {
        &self.jump_table
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// In a turn at the guest's memory nothing is waited for that another thread holds.
    pub(crate) fn try_read(&self) -> Option<RwLockReadGuard<'_, State>> {
        self.state.try_read().ok()
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mask of the guest's addresses; none before it is bound.
    pub(crate) fn mask(&self) -> SharedMask {
        self.read().mask()
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
        self.vcpus().clear();
        *self.handler() = None;
    }

    pub(crate) fn handle_faults(&self, handler: Option<Arc<dyn NestedFaults>>) {
        *self.handler() = handler;
    }

    /// The back end, to be asked with no lock held.
    pub(crate) fn back_end(&self) -> Option<Arc<dyn NestedFaults>> {
        self.handler().clone()
    }

    fn handler(&self) -> MutexGuard<'_, Option<Arc<dyn NestedFaults>>> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the back end, with no lock held.
    pub(crate) fn ask(
        &self,
        question: impl FnOnce(&dyn NestedFaults) -> NestedFaultAnswer,
    ) -> NestedFaultAnswer {
        match self.back_end() {
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
