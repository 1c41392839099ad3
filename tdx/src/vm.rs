//! A trust domain as the framework sees it.

use alloc::sync::Arc;
use core::fmt;

use kvm_ops::moves::{self, GuestName, MoveToken, StagingTable};
use kvm_ops::{
    Backend, CpuId, Diagnosis, Drained, EncParams, Error, FreeReport, Gfn, Gpa, Host, InitialPage,
    Irqchip, KeyReleased, Level, Measurement, MemSlot, Missing, Page, Pfn, Privacy, PrivateSpte,
    Result, SharedMask, SpteChange, Step, TdParams, Tech, VcpuId, VmId, VmOps, VmParams, VmPort,
};
use kvm_ops_mmu::{MirrorHooks, Stats};
use tracing::span::EnteredSpan;

use crate::td::{self, Td};
use crate::{TdxVcpu, VcpuStart, proof};

/// A trust domain.
///
/// The value is its owner: the teardown goes through it. Dropped without one, it leaves everything
/// where it is, key and pages, because nothing else would be safe.
pub struct TdxVm<H: Host> {
    td: Arc<Td<H>>,
}

impl<H: Host> fmt::Debug for TdxVm<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TdxVm")
            .field("life", &self.td.life)
            .finish_non_exhaustive()
    }
}

impl<H: Host> TdxVm<H> {
    /// Creates it on its host. The TDX module hears of it in `vm_init` first, as with
    /// `KVM_TDX_INIT_VM`.
    ///
    /// # Errors
    /// Parameters out of range, of another technology, or an irqchip wholly in the platform;
    /// [`Error::Unsupported`] where the host has no TDX module; what the host answers otherwise.
    ///
    /// ```
    /// use kvm_ops_core::{Host, Step, Vendor, VmOps, VmParams};
    /// use kvm_ops_sim::SimHost;
    /// use kvm_ops_tdx::TdxVm;
    ///
    /// let host = SimHost::new(Vendor::Intel);
    /// let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// assert_eq!((td.step(), td.tdr()), (Step::Created, None));
    /// td.vm_init()?;
    /// assert!(td.tdr().is_some());
    /// # let released = td.mmu_release_hkid()?;
    /// # let drained = td.drain_private(released).map_err(|(error, _)| error)?;
    /// # assert!(td.vm_free(drained).is_clean());
    /// # Ok::<(), kvm_ops_core::Error>(())
    /// ```
    pub fn create(host: &H, id: VmId, params: &VmParams) -> Result<Self> {
        params.validate()?;
        let td_params = match &params.enc {
            EncParams::Default => TdParams::default(),
            EncParams::Td(td_params) => (**td_params).clone(),
            _ => return kvm_ops::not_offered!("create with parameters of another technology"),
        };
        if params.irqchip == Irqchip::Full {
            return kvm_ops::not_offered!("an irqchip wholly in the platform");
        }
        if host.seam().is_none() || host.pages().is_none() {
            return Err(Error::unsupported(Missing::HostTech, Tech::Tdx));
        }
        let td = Td::new(host, id, params, td_params)?;
        Ok(Self { td: Arc::new(td) })
    }

    pub(crate) fn td(&self) -> &Td<H> {
        &self.td
    }

    /// Shows every entry of the private tables as the back end knows them: frame, level, entry.
    /// Faults may go on meanwhile.
    pub fn for_each_private(&self, f: impl FnMut(Gfn, Level, PrivateSpte)) {
        self.td.read_private().mirror.for_each(f);
    }

    /// Maps a page of 2 MiB at a frame, ahead of the guest, which accepts it whole (TDG.MEM.PAGE.ACCEPT of level 1). It is split
    /// (TDH.MEM.PAGE.DEMOTE) where the guest accepts a part of it, where a part is converted, and when the TD goes to another
    /// host.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a TD that does not run yet; [`Error::Invalid`] for a frame that is not aligned to 2 MiB, or if
    /// not all frames of the page are private and in a writable slot; [`Error::Exists`] if something is mapped there;
    /// [`Error::Busy`] while the TD goes to another host, or another thread is at the entry; [`Error::NoMemory`]; the
    /// module's.
    pub fn map_large_page(&self, first: Gfn) -> Result<()> {
        let _span = self.span("map_large_page");
        self.td.map_large(first)
    }

    /// Creates a vCPU, as [`create_vcpu`](Backend::create_vcpu) does, that starts otherwise
    /// (`KVM_TDX_INIT_VCPU`).
    ///
    /// # Errors
    /// As `create_vcpu`.
    pub fn create_vcpu_starting(&self, id: VcpuId, start: VcpuStart) -> Result<TdxVcpu<H>> {
        let _span = self.span("create_vcpu");
        Ok(TdxVcpu {
            record: self.td.create_vcpu(id, start)?,
            td: Arc::clone(&self.td),
            cpu: None,
            run: crate::run::Run::default(),
            source: None,
            cpuid: None,
        })
    }

    /// EAX to EDX that the guest sees for a sub-leaf, or for a leaf without sub-leaves, as far as the
    /// module fixes them (TDH.MNG.RD of CPUID_VALUES). `None` where the module has no value.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a TD that is not initialised or has ended; a busy module.
    pub fn cpuid(&self, leaf: u32, subleaf: Option<u32>) -> Result<Option<[u32; 4]>> {
        self.td.cpuid(leaf, subleaf)
    }

    /// Shows the VM below, for operations that only its platform offers. `None` once it is gone.
    pub fn with_port<T>(&self, show: impl FnOnce(&H::Vm) -> T) -> Option<T> {
        self.td.on_port(|port| Ok(show(port))).ok()
    }

    /// The span of an operation, in which failures of its SEAMCALLs are reported.
    fn span(&self, operation: &'static str) -> EnteredSpan {
        let vm = self.td.life.id().0;
        tracing::debug_span!("tdx", operation, vm).entered()
    }

    /// The amount of private memory.
    pub fn private_stats(&self) -> Stats {
        self.td.read_private().mirror.stats()
    }

    /// The TDR's address, while there is one.
    pub fn tdr(&self) -> Option<kvm_ops::Hpa> {
        self.td.tdr().ok()
    }
}

impl<H: Host> VmOps for TdxVm<H> {
    fn tech(&self) -> Tech {
        Tech::Tdx
    }

    fn id(&self) -> VmId {
        self.td.life.id()
    }

    fn step(&self) -> Step {
        self.td.life.step()
    }

    fn explain(&self, error: Error) -> Diagnosis {
        self.td.explain(error)
    }

    fn shared_mask(&self) -> SharedMask {
        self.td.mask
    }

    /// Leases a KeyID, creates the TD and initialises it; one that comes from another host
    /// ([`TdParams::arrives`]) waits for its parameters and vCPUs, which [`incoming`](Self::incoming)
    /// takes. After an error the VM is as it was, and the call may come again; or poisoned, where the
    /// module kept something.
    fn vm_init(&mut self) -> Result<()> {
        let _span = self.span("vm_init");
        self.td.init()
    }

    fn vm_finalize(&mut self) -> Result<()> {
        let _span = self.span("vm_finalize");
        self.td.finalize()
    }

    fn add_initial_page(&mut self, page: &InitialPage<'_>) -> Result<()> {
        let _span = self.span("add_initial_page");
        self.td.add_initial_page(page)
    }

    fn measurement(&self) -> Result<Measurement> {
        self.td.measurement()
    }

    fn measure_initial_page(&mut self, gpa: Gpa) -> Result<()> {
        self.td.measure_initial_page(gpa)
    }

    fn mmu_release_hkid(&mut self) -> Result<KeyReleased> {
        let _span = self.span("mmu_release_hkid");
        self.td.end_key()?;
        proof::key_released(&self.td).ok_or(Error::Poisoned)
    }

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        let _span = self.span("drain_private");
        let released = self.td.life.check_drain(released)?;
        self.td.drain();
        proof::drained(&self.td, released)
    }

    fn vm_free(self, drained: Drained) -> FreeReport {
        let _span = self.span("vm_free");
        match self.td.life.check_drained(&drained) {
            Ok(()) => self.td.free(),
            Err(error) => self.td.abandon(error),
        }
    }

    fn vm_abandon(self, error: Error) -> FreeReport {
        let _span = self.span("vm_abandon");
        self.td.abandon(error)
    }

    fn reclaim_private_page(&mut self, released: &KeyReleased, page: Page) -> Result<Page> {
        self.td.reclaim_for(released, page)
    }

    /// For a change that gives a page back, [`Error::Firmware`] may come from the write-back of the
    /// page after its removal: the entry is empty then, and the page must never be used again. Every
    /// other error means that nothing changed.
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        self.td.change_entry(change)
    }

    fn flush_private_tlb(&self) -> Result<()> {
        MirrorHooks::flush_private_tlb(&*self.td)
    }

    fn set_memory_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        let _span = self.span("set_memory_attributes");
        self.td.set_attributes(first, pages, to)
    }

    fn privacy(&self, gfn: Gfn) -> Privacy {
        self.td.privacy(gfn)
    }

    /// Contention, missing memory and frames without a slot stop it early: it returns the number of
    /// pages mapped, and the next call returns the reason. A failure that poisons the TD is returned
    /// at once.
    fn pre_fault_memory(&self, first: Gfn, pages: u64) -> Result<u64> {
        self.td.pre_fault(first, pages)
    }

    /// 4 KiB for private memory, as Linux has it: a guest may accept any page of what it touches,
    /// and a larger one that it accepts in part would have to be demoted.
    fn gmem_max_mapping_level(&self, _: Pfn, privacy: Privacy) -> Level {
        match privacy {
            Privacy::Private => Level::Size4K,
            Privacy::Shared => Level::Size1G,
        }
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        let _span = self.span("set_memory_slot");
        self.td.set_slot(slot)
    }

    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        let _span = self.span("delete_memory_slot");
        self.td.delete_slot(slot)
    }

    fn has_emulated_msr(&self, index: u32) -> bool {
        self.td.on_port(|port| Ok(port.has_emulated_msr(index))) == Ok(true)
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.td.require_live()?;
        self.td.params.check_interrupt(vcpu, vector)?;
        self.td
            .on_port(|port| port.deliver_interrupt(vcpu, vector))?;
        self.td.wake(vcpu);
        Ok(())
    }

    fn disable_virtualization_cpu(&self, cpu: CpuId) -> Result<()> {
        self.td.leave_cpu(cpu)
    }
}

impl<H: Host> Backend for TdxVm<H> {
    type Vcpu = TdxVcpu<H>;

    fn create_vcpu(&self, id: VcpuId) -> Result<Self::Vcpu> {
        self.create_vcpu_starting(id, VcpuStart::new(id))
    }

    /// Moves the TD between two VMs of one host: no SEAMCALL is made. The source is finalised; the
    /// destination is created or initialised, for as many vCPUs and with the same place of the shared
    /// bit, and has neither vCPUs nor pages. The vCPUs come with the TD:
    /// [`create_vcpu`](Self::create_vcpu) of the destination gives one handle for each.
    ///
    /// The source can only be torn down afterwards. A destination that was initialised had a key and a
    /// TD, which the source's teardown gives back.
    ///
    /// # Errors
    /// Both VMs are as before. [`Error::Invalid`] with [`Field::Vm`](kvm_ops::Field::Vm) names a VM
    /// that does not fit, with [`Field::VcpuCount`](kvm_ops::Field::VcpuCount) the destination's
    /// number; [`Error::Busy`] while another move involves one of the two, or an exit of a vCPU waits
    /// for its answer; [`Error::Poisoned`] for a source whose TD is gone, and for either VM after a failure
    /// that ended it; the port's error.
    ///
    /// ```
    /// use kvm_ops_core::{Backend, Host, Step, VcpuId, Vendor, VmOps, VmParams};
    /// use kvm_ops_sim::SimHost;
    /// use kvm_ops_tdx::TdxVm;
    ///
    /// let host = SimHost::new(Vendor::Intel);
    /// let new = || TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1));
    /// let (mut from, mut to) = (new()?, new()?);
    /// from.vm_init()?;
    /// let old = from.create_vcpu(VcpuId(0))?;
    /// from.vm_finalize()?;
    /// let tdr = from.tdr();
    /// TdxVm::move_context(&mut from, &mut to)?;
    /// assert_eq!((from.step(), to.step()), (Step::Poisoned, Step::Runnable));
    /// assert_eq!((from.tdr(), to.tdr()), (None, tdr));
    /// let vcpu = to.create_vcpu(VcpuId(0))?;
    /// # drop((old, vcpu));
    /// # for mut vm in [from, to] {
    /// #     let released = vm.mmu_release_hkid()?;
    /// #     let drained = vm.drain_private(released).map_err(|(error, _)| error)?;
    /// #     assert!(vm.vm_free(drained).is_clean());
    /// # }
    /// # Ok::<(), kvm_ops_core::Error>(())
    /// ```
    fn move_context(from: &mut Self, to: &mut Self) -> Result<()> {
        td::move_context(&from.td, &to.td)
    }

    fn local_send(
        &mut self,
        table: &Arc<StagingTable>,
        random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
        deliver: &mut dyn FnMut(&MoveToken) -> Result<()>,
    ) -> Result<()> {
        td::local_send(&self.td, table, random, deliver)
    }

    fn local_cancel(&mut self) -> Result<()> {
        moves::cancel(&*self.td)
    }

    fn local_receive(
        &mut self,
        table: &StagingTable,
        token: &MoveToken,
        deliver: &mut dyn FnMut(GuestName) -> Result<()>,
    ) -> Result<GuestName> {
        td::local_receive(&self.td, table, token, deliver)
    }
}
