//! The part of a VM that its vCPUs and its fault handler share.

use alloc::collections::BTreeMap;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use kvm_ops::moves::MoveState;
use kvm_ops::{
    Asid, Diagnosis, Error, Field, Gfn, Gpa, GuestResponse, Host, Hpa, Life, NestedFaultAnswer,
    NestedFaults, OpName, PAGE_SIZE, PageAccount, Pfn, Privacy, PspPort, Result, SevParams,
    SevPort, SharedMask, Step, Tech, VcpuId, VmId, VmParams, VmPort,
};
use spin::{Mutex, MutexGuard};

use crate::cell::Cell;
use crate::context::{Context, GuestState};
use crate::gate::Gate;
use crate::memory::Memory;
use crate::migrate::{KeyAccount, Membership};
use crate::regions::Regions;
use crate::sp::Sp;
use crate::status::Failure;

/// The state of a VM, which lives as long as its last handle. Locks are taken in this order:
/// context, memory, regions, cells, payer, membership, group. Who holds the lock of an owner's memory may take that of a mirror's.
pub(crate) struct Shared<H: Host> {
    pub(crate) life: Life,
    pub(crate) host: H,
    pub(crate) port: Arc<H::Vm>,
    pub(crate) mask: SharedMask,
    pub(crate) params: VmParams,
    pub(crate) launch: SevParams,
    pub(crate) account: PageAccount,
    pub(crate) gate: Gate,
    /// The ASID that the guest is bound to, 0 for none. Beside the context, because faults ask for
    /// it while a launch holds that.
    bound: AtomicU32,
    /// `None` before `vm_init`, and after the context moved or was destroyed.
    context: Mutex<Option<Context>>,
    memory: Mutex<Memory>,
    regions: Mutex<Regions>,
    membership: Mutex<Membership<H>>,
    payer: Mutex<Option<Arc<KeyAccount>>>,
    /// Claimed while the context moves.
    pub(crate) moving: MoveState,
    cells: Mutex<BTreeMap<VcpuId, Arc<Cell>>>,
}

impl<H: Host> Shared<H> {
    pub(crate) fn new(
        host: &H,
        life: Life,
        port: H::Vm,
        mask: SharedMask,
        params: VmParams,
        launch: SevParams,
    ) -> Self {
        Self {
            life,
            host: host.clone(),
            port: Arc::new(port),
            mask,
            params,
            launch,
            account: PageAccount::new(),
            gate: Gate::default(),
            bound: AtomicU32::new(0),
            context: Mutex::new(None),
            memory: Mutex::new(Memory::default()),
            regions: Mutex::new(Regions::default()),
            membership: Mutex::new(Membership::new()),
            payer: Mutex::new(None),
            moving: MoveState::new(),
            cells: Mutex::new(BTreeMap::new()),
        }
    }

    pub(crate) fn is_snp(&self) -> bool {
        self.tech() == Tech::SevSnp
    }

    /// True if register state is the guest's secret after its launch.
    pub(crate) fn is_es(&self) -> bool {
        self.tech() != Tech::Sev
    }

    pub(crate) fn id(&self) -> VmId {
        self.life.id()
    }

    pub(crate) fn tech(&self) -> Tech {
        self.life.tech()
    }

    /// The step, as the VM's owner sees it: poisoned while the context is away.
    pub(crate) fn step(&self) -> Step {
        self.life.step()
    }

    /// The handle of a SEV or SEV-ES guest.
    ///
    /// # Errors
    /// [`Error::WrongState`] before its launch.
    pub(crate) fn handle(&self) -> Result<u32> {
        let handle = self.context().as_ref().and_then(Context::handle);
        handle.ok_or(Error::WrongState(self.step()))
    }

    /// The guest's state, of a VM with a context.
    pub(crate) fn set_guest_state(&self, state: GuestState) {
        if let Some(context) = self.context().as_mut() {
            context.state = state;
        }
    }

    /// Moves a VM on that took over a guest, as far as the guest is.
    pub(crate) fn advance_to(&self, step: Step) {
        for to in [Step::Initialized, Step::Runnable] {
            if self.life.step() < to && to <= step {
                // The step before it was just checked.
                let _ = self.life.advance(to);
            }
        }
    }

    /// A span that names the VM in the events of its SP commands and RMP instructions.
    pub(crate) fn span(&self, operation: &'static str) -> tracing::span::EnteredSpan {
        let (vm, technology) = (self.id().0, tracing::field::display(self.tech()));
        tracing::debug_span!("sev", operation, vm, technology).entered()
    }

    /// Runs an operation in its span. A failure is an event that names the VM, the operation, the
    /// call of firmware and its status; the VM remembers it.
    pub(crate) fn within<T>(
        &self,
        operation: &'static str,
        body: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let _span = self.span(operation);
        body().inspect_err(|error| self.failed(operation, *error))
    }

    #[cold]
    fn failed(&self, operation: &'static str, error: Error) {
        if error == Error::Poisoned || error.is_transient() {
            return;
        }
        let diagnosis = self.diagnose(error);
        let (vm, technology) = (self.id().0, self.tech());
        match error {
            Error::Firmware(_) | Error::NoKeyId | Error::NoMemory => {
                tracing::warn!(vm, %technology, operation, "{diagnosis}");
            }
            _ => tracing::debug!(vm, %technology, operation, "{diagnosis}"),
        }
        self.life.note(diagnosis);
    }

    /// Reports a step of the guest's life, with the ASID that it is about.
    #[cold]
    pub(crate) fn took_step(&self, what: &'static str, asid: Option<Asid>) {
        let (vm, technology, asid) = (self.id().0, self.tech(), asid.map(|asid| asid.0));
        let pages = self.account.totals().held();
        tracing::debug!(vm, %technology, asid, pages, "{what}");
    }

    /// A failure with that error: the error names command and status.
    fn diagnose(&self, error: Error) -> Diagnosis {
        let diagnosis = Diagnosis::of(self.tech(), self.id(), error);
        match Failure::of(&error) {
            Some(failure) => diagnosis.called(failure.call()).advise(failure.advice()),
            None => diagnosis,
        }
    }

    /// All that is known of an error of the VM.
    pub(crate) fn explain(&self, error: Error) -> Diagnosis {
        let known = self.life.explain(error);
        match known.call {
            None if Failure::of(&error).is_some() => self.diagnose(error),
            _ => known,
        }
    }

    /// Leaves only the teardown allowed.
    #[cold]
    pub(crate) fn poison(&self, error: &Error) {
        let diagnosis = self
            .diagnose(*error)
            .advise("the VM is poisoned: destroy it");
        tracing::error!(vm = self.id().0, technology = %self.tech(), "{diagnosis}");
        self.life.poison_by(diagnosis);
    }

    /// Reports the error with which a run of a vCPU ended, and remembers the vCPU with it.
    #[cold]
    pub(crate) fn run_failed(&self, vcpu: VcpuId, error: Error) {
        let diagnosis = self.explain(error).on_vcpu(vcpu);
        let (vm, technology) = (self.id().0, self.tech());
        tracing::error!(vm, %technology, vcpu = vcpu.0, "vcpu_run failed: {diagnosis}");
        self.life.note(diagnosis);
    }

    /// The operations of the port for SEV guests.
    pub(crate) fn sev(&self) -> Result<&dyn SevPort> {
        static SEV: OpName = OpName("SEV guests");
        self.port.sev().ok_or(Error::HostLacks(&SEV))
    }

    /// The ports: [`create`](crate::SevVm::create) refused a host that lacks one.
    pub(crate) fn sp(&self) -> Sp<'_, H> {
        let (Some(psp), Some(pages)) = (self.host.psp(), self.host.pages()) else {
            unreachable!("a host loses no port")
        };
        Sp::new(psp, pages, &self.account)
    }

    /// Locks; other threads' turns pass as the platform has it.
    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        loop {
            match mutex.try_lock() {
                Some(guard) => return guard,
                None => self.wait(),
            }
        }
    }

    pub(crate) fn context(&self) -> MutexGuard<'_, Option<Context>> {
        self.lock(&self.context)
    }

    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.lock(&self.memory)
    }

    pub(crate) fn regions(&self) -> MutexGuard<'_, Regions> {
        self.lock(&self.regions)
    }

    pub(crate) fn membership(&self) -> MutexGuard<'_, Membership<H>> {
        self.lock(&self.membership)
    }

    /// The account that pays for the VM's key.
    pub(crate) fn payer(&self) -> Option<Arc<KeyAccount>> {
        self.lock(&self.payer).clone()
    }

    pub(crate) fn set_payer(&self, account: Arc<KeyAccount>) {
        *self.lock(&self.payer) = Some(account);
    }

    pub(crate) fn cells(&self) -> MutexGuard<'_, BTreeMap<VcpuId, Arc<Cell>>> {
        self.lock(&self.cells)
    }

    /// The vCPUs, in the order of their numbers.
    pub(crate) fn all_cells(&self) -> Vec<Arc<Cell>> {
        self.cells().values().cloned().collect()
    }

    /// Waits for another thread, one turn.
    pub(crate) fn wait(&self) {
        match self.host.psp() {
            Some(psp) => psp.relax(),
            None => core::hint::spin_loop(),
        }
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
    fn answer(
        &self,
        gfn: Gfn,
        body: impl FnOnce(&Shared<H>) -> NestedFaultAnswer,
    ) -> NestedFaultAnswer {
        let Some(shared) = self.0.upgrade() else {
            return NestedFaultAnswer::Leave;
        };
        if shared.step() != Step::Runnable {
            return NestedFaultAnswer::Leave;
        }
        let answer = body(&shared);
        if let NestedFaultAnswer::Fail(error) = &answer {
            let gpa = Gpa::new(gfn.get().saturating_mul(PAGE_SIZE));
            let cause = "the page that the guest touched could not be given to it";
            let diagnosis = shared.diagnose(*error).at(gpa, Privacy::Private);
            shared.life.note(diagnosis.because(cause));
        }
        answer
    }
}

impl<H: Host> NestedFaults for Faults<H> {
    fn private_fault(&self, gfn: Gfn) -> NestedFaultAnswer {
        self.answer(gfn, |shared| shared.private_fault(gfn))
    }

    fn shared_fault(&self, gfn: Gfn) -> NestedFaultAnswer {
        self.answer(gfn, |shared| shared.shared_fault(gfn))
    }

    fn size_mismatch(&self, gfn: Gfn) -> NestedFaultAnswer {
        self.answer(gfn, |shared| shared.split_fault(gfn))
    }

    fn vmsa(&self, vcpu: VcpuId) -> Option<Hpa> {
        let cell = self.0.upgrade()?.cells().get(&vcpu).cloned()?;
        let state = cell.state();
        state.vmsa.as_ref().map(|vmsa| vmsa.page.hpa())
    }

    fn guest_request(&self, message: &[u8; 4096]) -> Result<GuestResponse> {
        let gone = Error::WrongState(Step::Drained);
        self.0.upgrade().ok_or(gone)?.guest_request(message)
    }
}
