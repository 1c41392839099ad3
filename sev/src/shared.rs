//! What a VM, its vCPUs and its fault handler share.

use alloc::collections::BTreeMap;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_ops::{
    Asid, Error, Field, Gfn, Host, NestedFaultAnswer, NestedFaults, Pfn, Privacy, PspPort, Result,
    SevParams, SharedMask, Step, Tech, VcpuId, VmId,
};
use kvm_ops_mmu::{ReaderLock, WriteGuard};

use crate::books::Books;
use crate::cell::Cell;
use crate::context::Context;
use crate::gate::Gate;
use crate::memory::Memory;
use crate::migrate::{Bond, Claim, Claimed, KeyAccount};
use crate::regions::Regions;
use crate::sp::Sp;

/// The state of a VM that outlives none of its handles. Locks are taken in this order: context,
/// memory, regions, cells, books, bond.
pub(crate) struct Shared<H: Host> {
    pub(crate) id: VmId,
    pub(crate) tech: Tech,
    pub(crate) host: H,
    pub(crate) port: Arc<H::Vm>,
    pub(crate) mask: SharedMask,
    pub(crate) vcpus: u32,
    pub(crate) params: SevParams,
    pub(crate) books: Books,
    pub(crate) gate: Gate,
    step: AtomicU8,
    /// The ASID that the guest is bound to, 0 for none. Beside the context, because faults ask for
    /// it while a launch holds that.
    bound: AtomicU32,
    /// `None` before `vm_init`, and after the context was given away or released.
    context: ReaderLock<Option<Context>>,
    memory: ReaderLock<Memory>,
    regions: ReaderLock<Regions>,
    bond: ReaderLock<Bond<H>>,
    account: ReaderLock<Option<Arc<KeyAccount>>>,
    /// Held while the context moves.
    pub(crate) claim: Claim,
    cells: ReaderLock<BTreeMap<VcpuId, Arc<Cell>>>,
}

impl<H: Host> Shared<H> {
    pub(crate) fn new(
        host: &H,
        id: VmId,
        tech: Tech,
        port: H::Vm,
        mask: SharedMask,
        vcpus: u32,
        params: SevParams,
    ) -> Self {
        Self {
            id,
            tech,
            host: host.clone(),
            port: Arc::new(port),
            mask,
            vcpus,
            params,
            books: Books::new(),
            gate: Gate::default(),
            step: AtomicU8::new(Step::Created as u8),
            bound: AtomicU32::new(0),
            context: ReaderLock::new(1, None),
            memory: ReaderLock::new(1, Memory::default()),
            regions: ReaderLock::new(1, Regions::default()),
            bond: ReaderLock::new(1, Bond::new()),
            account: ReaderLock::new(1, None),
            claim: Claim::new(),
            cells: ReaderLock::new(1, BTreeMap::new()),
        }
    }

    pub(crate) fn is_snp(&self) -> bool {
        self.tech == Tech::SevSnp
    }

    /// Whether register state is the guest's secret.
    pub(crate) fn is_es(&self) -> bool {
        self.tech != Tech::Sev
    }

    pub(crate) fn step(&self) -> Step {
        let at = self.step.load(Ordering::Acquire);
        let step = Step::ALL.into_iter().find(|step| *step as u8 == at);
        step.unwrap_or(Step::Poisoned)
    }

    pub(crate) fn set_step(&self, step: Step) {
        self.step.store(step as u8, Ordering::Release);
    }

    /// From now on only the teardown is allowed. A teardown that has begun goes on.
    pub(crate) fn poison(&self) {
        if !matches!(self.step(), Step::KeyReleased | Step::Drained) {
            self.set_step(Step::Poisoned);
        }
    }

    /// The ports: [`create`](crate::SevVm::create) refused a host that lacks one.
    pub(crate) fn sp(&self) -> Sp<'_, H> {
        let (Some(psp), Some(pages)) = (self.host.psp(), self.host.pages()) else {
            unreachable!("a host loses no port")
        };
        Sp::new(psp, pages, &self.books)
    }

    fn relax(&self) -> impl Fn() + '_ {
        let psp = self.host.psp();
        move || match psp {
            Some(psp) => psp.relax(),
            None => core::hint::spin_loop(),
        }
    }

    pub(crate) fn context(&self) -> WriteGuard<'_, Option<Context>> {
        self.context.write(self.relax())
    }

    pub(crate) fn memory(&self) -> WriteGuard<'_, Memory> {
        self.memory.write(self.relax())
    }

    pub(crate) fn regions(&self) -> WriteGuard<'_, Regions> {
        self.regions.write(self.relax())
    }

    /// Whose context the VM uses. The innermost lock: none is taken while it is held.
    pub(crate) fn bond(&self) -> WriteGuard<'_, Bond<H>> {
        self.bond.write(self.relax())
    }

    /// Who pays for the VM's key.
    pub(crate) fn account(&self) -> Option<Arc<KeyAccount>> {
        self.account.write(self.relax()).clone()
    }

    pub(crate) fn set_account(&self, account: Arc<KeyAccount>) {
        *self.account.write(self.relax()) = Some(account);
    }

    /// Claims the VM; waits while its context moves.
    pub(crate) fn claim_waiting(&self) -> Claimed<'_> {
        loop {
            match self.claim.claim() {
                Ok(claimed) => return claimed,
                Err(_) => self.wait(),
            }
        }
    }

    pub(crate) fn cells(&self) -> WriteGuard<'_, BTreeMap<VcpuId, Arc<Cell>>> {
        self.cells.write(self.relax())
    }

    /// The vCPUs, in the order of their numbers.
    pub(crate) fn all_cells(&self) -> Vec<Arc<Cell>> {
        self.cells().values().cloned().collect()
    }

    /// Waits for another thread, one turn.
    pub(crate) fn wait(&self) {
        self.relax()();
    }

    /// The ASID that the guest is bound to.
    pub(crate) fn asid(&self) -> Result<Asid> {
        match self.bound.load(Ordering::Acquire) {
            0 => Err(Error::WrongState(self.step())),
            asid => Ok(Asid(asid)),
        }
    }

    pub(crate) fn set_bound(&self, asid: Option<Asid>) {
        self.bound.store(asid.map_or(0, |a| a.0), Ordering::Release);
    }

    /// Checks that a frame lies below the C-bit.
    pub(crate) fn check_frame(&self, gfn: Gfn) -> Result<()> {
        match self.mask.join(gfn, Privacy::Private) {
            Some(_) => Ok(()),
            None => Err(Error::Invalid(Field::Gfn, gfn.get())),
        }
    }

    /// Checks a range of frames: not empty, no wrap, below the C-bit.
    pub(crate) fn check_range(&self, first: Gfn, pages: u64) -> Result<()> {
        let last = pages.checked_sub(1).and_then(|n| first.checked_add(n));
        match last {
            Some(last) => self.check_frame(last),
            None => Err(Error::Invalid(Field::Size, pages)),
        }
    }

    /// The page that holds a frame's private contents.
    pub(crate) fn page_of(&self, gfn: Gfn) -> Option<Pfn> {
        self.memory().page(gfn)
    }
}

/// The way from the port back to the VM. Weak: the VM owns the port.
pub(crate) struct Faults<H: Host>(pub(crate) Weak<Shared<H>>);

impl<H: Host> Faults<H> {
    fn answer(&self, body: impl FnOnce(&Shared<H>) -> NestedFaultAnswer) -> NestedFaultAnswer {
        match self.0.upgrade() {
            Some(shared) if shared.step() == Step::Runnable => body(&shared),
            _ => NestedFaultAnswer::Leave,
        }
    }
}

impl<H: Host> NestedFaults for Faults<H> {
    fn private_fault(&self, gfn: Gfn) -> NestedFaultAnswer {
        self.answer(|shared| shared.private_fault(gfn))
    }

    fn size_mismatch(&self, gfn: Gfn) -> NestedFaultAnswer {
        self.answer(|shared| shared.split_fault(gfn))
    }
}
