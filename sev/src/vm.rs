//! A SEV, SEV-ES or SEV-SNP guest.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use kvm_ops::moves::{self, GuestName, MoveToken, StagingTable};
use kvm_ops::{
    Asid, AsidLease, Backend, DevicePort, Diagnosis, Drained, EncCmd, EncParams, EncRegion, Error,
    Field, FreeReport, Gfn, Host, InitialPage, KeyReleased, Leak, Level, Life, Measurement,
    MemSlot, Missing, PageTotals, Pfn, Privacy, PspPort, Result, SevParams, SharedMask, SpteChange,
    Step, Tech, VcpuId, VmId, VmOps, VmParams, VmPort,
};

use crate::cell::Cell;
use crate::context::{GuestState, GuestStatus, Identity};
use crate::launch::Finish;
use crate::migrate::{self, KeyAccount, Orphan};
use crate::shared::{Faults, Shared};
use crate::{SevVcpu, rules, teardown};

/// A SEV, SEV-ES or SEV-SNP guest.
pub struct SevVm<H: Host> {
    pub(crate) shared: Arc<Shared<H>>,
    /// The context of an owner that went before this mirror, its last user.
    orphan: Option<Orphan<H>>,
    /// Freed or abandoned: its drop has nothing to do.
    over: bool,
}

impl<H: Host> SevVm<H> {
    /// Creates it on its host. Nothing is known to firmware yet.
    ///
    /// # Errors
    /// Parameters out of range, or of another technology; [`Error::Unsupported`] where the host has
    /// no AMD SP, or no ASIDs for this technology; what the host answers.
    ///
    /// ```
    /// use kvm_ops_core::{Host, Tech, Vendor, VmOps, VmParams};
    /// use kvm_ops_sev::SevVm;
    /// use kvm_ops_sim::SimHost;
    ///
    /// let host = SimHost::new(Vendor::Amd);
    /// let mut guest = SevVm::create(&host, host.next_vm_id(), Tech::SevSnp, &VmParams::new(1))?;
    /// assert_eq!(guest.asid(), None);
    /// guest.vm_init()?;
    /// assert!(guest.asid().is_some());
    /// # let released = guest.mmu_release_hkid()?;
    /// # let drained = guest.drain_private(released).map_err(|(error, _)| error)?;
    /// # assert!(guest.vm_free(drained).is_clean());
    /// # Ok::<(), kvm_ops_core::Error>(())
    /// ```
    pub fn create(host: &H, id: VmId, tech: Tech, params: &VmParams) -> Result<Self> {
        params.validate()?;
        let missing = Error::unsupported(Missing::HostTech, tech);
        if !matches!(tech, Tech::Sev | Tech::SevEs | Tech::SevSnp) {
            return Err(missing);
        }
        let sev = match &params.enc {
            EncParams::Default => SevParams::default(),
            EncParams::Sev(sev) => (**sev).clone(),
            _ => return Err(Error::Invalid(Field::Policy, 0)),
        };
        let (Some(psp), Some(_)) = (host.psp(), host.pages()) else {
            return Err(missing);
        };
        if psp.asid_pools().range(tech).is_empty() {
            return Err(missing);
        }
        if sev.migration_agent.is_some() && tech != Tech::SevSnp {
            return kvm_ops::not_offered!("a migration agent without SNP");
        }
        rules::check_features(tech, sev.vmsa_features)?;
        rules::check_ghcb(tech, sev.ghcb_version)?;
        let mask = SharedMask::private_bit(psp.c_bit()).ok_or(missing)?;
        let port = host.create_vm(tech, params)?;
        let life = Life::new(id, tech);
        let shared = Arc::new(Shared::new(host, life, port, mask, params.clone(), sev));
        let faults = Arc::new(Faults(Arc::downgrade(&shared)));
        shared.sev()?.handle_nested_faults(Some(faults))?;
        Ok(Self {
            shared,
            orphan: None,
            over: false,
        })
    }

    /// The VM below, for operations that only its platform offers.
    #[inline]
    pub fn port(&self) -> &H::Vm {
        &self.shared.port
    }

    /// The guest's name in firmware, once its launch was started.
    pub fn identity(&self) -> Option<Identity> {
        self.shared.context().as_ref()?.identity()
    }

    /// The VM's ASID.
    pub fn asid(&self) -> Option<Asid> {
        let context = self.shared.context();
        let leased = context.as_ref()?.lease.as_ref().map(AsidLease::asid);
        leased.or(self.shared.asid().ok())
    }

    /// The state of the guest's launch.
    pub fn guest_state(&self) -> GuestState {
        let context = self.shared.context();
        context.as_ref().map_or(GuestState::Uninit, |c| c.state)
    }

    /// The answer of GUEST_STATUS or SNP_GUEST_STATUS.
    ///
    /// # Errors
    /// [`Error::WrongState`] before the launch was started; what firmware answers.
    pub fn guest_status(&self) -> Result<GuestStatus> {
        match self.identity() {
            Some(Identity::Handle(handle)) => self.shared.legacy_status(handle),
            Some(Identity::Gctx(gctx)) => self.shared.snp_status(gctx),
            None => Err(Error::WrongState(self.shared.step())),
        }
    }

    /// The page that holds a frame's private contents; a host that reads it sees ciphertext.
    pub fn page_of(&self, gfn: Gfn) -> Option<Pfn> {
        self.shared.page_of(gfn)
    }

    /// The pages that the VM took, gave back and lost so far.
    pub fn account(&self) -> PageTotals {
        self.shared.account.totals()
    }

    /// The leaks so far, which `vm_free` reports again.
    pub fn leaks(&self) -> Vec<Leak> {
        self.shared.account.report(&self.shared.life).leaks
    }

    /// The number of pages that the registered regions touch.
    pub fn locked_pages(&self) -> u64 {
        self.shared.regions().pages()
    }

    /// The most pages that regions may touch, as RLIMIT_MEMLOCK limits what Linux pins. No limit at
    /// first.
    pub fn limit_locked_pages(&mut self, pages: u64) {
        self.shared.regions().set_limit(pages);
    }

    /// Gives up what a SEV or SEV-ES guest had in memory that no slot shows and no region pins, because the memory is not the
    /// embedder's any more: other memory may come to its address.
    pub fn forget_memory(&self, memory: EncRegion) {
        self.shared.forget_memory(memory);
    }

    /// Ends the SEV or SEV-ES guest that LAUNCH_START or RECEIVE_START made a moment ago, because the caller cannot be told its
    /// handle (Linux: `sev_unbind_asid`). It can be started again. What firmware does not give up is listed as leaked.
    ///
    /// # Errors
    /// [`Error::WrongState`] if there is no such guest, or its launch went further; those of [`SevPort::bind_asid`](kvm_ops::SevPort::bind_asid),
    /// after which the VM is poisoned.
    pub fn undo_start(&self) -> Result<()> {
        self.shared.undo_start()
    }

    /// Charges the VM's key to an account from now on, and keys that it takes over.
    ///
    /// # Errors
    /// [`Error::Busy`] if the account cannot pay for one more: it stays as it was.
    pub fn charge_to(&mut self, account: &Arc<KeyAccount>) -> Result<()> {
        // A mirror's key is its owner's to pay for.
        let pays = !self.shared.membership().is_mirror();
        let mut context = self.shared.context();
        if let Some(context) = context.as_mut().filter(|_| pays)
            && !context.charge.as_ref().is_some_and(|c| c.is_to(account))
        {
            context.charge = Some(account.charge(self.shared.tech())?);
        }
        self.shared.set_payer(Arc::clone(account));
        Ok(())
    }

    fn finish(&self) -> Finish {
        let launch = &self.shared.launch;
        Finish {
            id_block: launch.id_block.clone(),
            host_data: launch.host_data,
            ..Finish::default()
        }
    }
}

impl<H: Host> VmOps for SevVm<H> {
    fn tech(&self) -> Tech {
        self.shared.tech()
    }

    fn id(&self) -> VmId {
        self.shared.id()
    }

    fn step(&self) -> Step {
        self.shared.step()
    }

    fn explain(&self, error: Error) -> Diagnosis {
        self.shared.explain(error)
    }

    fn shared_mask(&self) -> SharedMask {
        self.shared.mask
    }

    /// Leases an ASID (`KVM_SEV_INIT2`). The launch starts with the first operation that needs it.
    fn vm_init(&mut self) -> Result<()> {
        self.shared.within("vm_init", || {
            self.shared.init(self.shared.launch.vmsa_features)
        })
    }

    /// Ends the launch: VMSAs, LAUNCH_MEASURE and LAUNCH_FINISH, as far as they were not done.
    fn vm_finalize(&mut self) -> Result<()> {
        self.shared
            .within("vm_finalize", || self.shared.finalize(&self.finish()))
    }

    fn add_initial_page(&mut self, page: &InitialPage<'_>) -> Result<()> {
        self.shared
            .within("add_initial_page", || self.shared.add_page(page))
    }

    /// MEASURE and MNONCE of LAUNCH_MEASURE for SEV and SEV-ES, which the guest owner checks; the
    /// launch digest for SNP, computed here, because firmware gives it to the guest alone.
    fn measurement(&self) -> Result<Measurement> {
        let context = self.shared.context();
        let measured = context.as_ref().and_then(|context| context.measurement);
        let measured = measured.ok_or(Error::WrongState(self.shared.step()))?;
        Ok(Measurement::new(measured))
    }

    fn mmu_release_hkid(&mut self) -> Result<KeyReleased> {
        let _span = self.shared.span("mmu_release_hkid");
        if let Some(orphan) = migrate::leave(&self.shared)? {
            self.orphan = Some(orphan);
        }
        Ok(self.shared.release_key())
    }

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        let _span = self.shared.span("drain_private");
        self.shared.drain(released)
    }

    fn vm_free(mut self, drained: Drained) -> FreeReport {
        let _span = self.shared.span("vm_free");
        let orphan = self.orphan.take();
        let shared = Arc::clone(&self.shared);
        self.over = true;
        drop(self);
        let mut report = teardown::free(shared, &drained);
        if let Some(orphan) = orphan {
            orphan.destroy(&mut report);
        }
        report
    }

    fn vm_abandon(mut self, error: Error) -> FreeReport {
        let _span = self.shared.span("vm_abandon");
        let orphan = self.orphan.take();
        self.over = true;
        let mut report = teardown::abandon(&self.shared, error);
        if let Some(orphan) = orphan {
            orphan.destroy(&mut report);
        }
        report
    }

    /// One change of a private frame: absent to mapped, mapped to absent, or a 2 MiB page to a
    /// table, which is PSMASH. The pages are the caller's to take and to free, but for one that
    /// firmware keeps: that is leaked, listed, and the VM poisoned.
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        self.shared.within("set_private_spte", || {
            self.shared.step().require_live()?;
            self.shared.change(&mut self.shared.memory(), change)
        })
    }

    /// Nothing is left to do: a change of the nested page tables returns when no vCPU uses the old
    /// mapping.
    fn flush_private_tlb(&self) -> Result<()> {
        Ok(())
    }

    fn set_memory_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        self.shared.within("set_memory_attributes", || {
            self.shared.step().require_live()?;
            self.shared.check_range(first, pages)?;
            self.shared.set_attributes(first, pages, to)
        })
    }

    /// A SEV or SEV-ES guest chooses with each access: a frame is of the kind that it was last used as.
    fn privacy(&self, gfn: Gfn) -> Privacy {
        self.shared.privacy(gfn)
    }

    fn show_to_host(&self, gfn: Gfn) -> bool {
        self.shared.show_to_host(gfn)
    }

    fn pre_fault_memory(&self, first: Gfn, pages: u64) -> Result<u64> {
        self.shared.within("pre_fault_memory", || {
            self.shared.step().require(Step::Runnable)?;
            self.shared.check_range(first, pages)?;
            self.shared.pre_fault(first, pages)
        })
    }

    /// For SNP as large as the RMP's entry, which no mapping may exceed; else without limit.
    fn gmem_max_mapping_level(&self, page: Pfn, privacy: Privacy) -> Level {
        if !self.shared.is_snp() || privacy == Privacy::Shared {
            return Level::Size1G;
        }
        match self.shared.sp().rmp_level(page) {
            Some(level) => level,
            None => Level::Size4K,
        }
    }

    fn mem_enc_op(&mut self, cmd: &mut EncCmd<'_>) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        shared.within("mem_enc_op", || crate::kvm::run(self, cmd))
    }

    fn mem_enc_register_region(&mut self, region: EncRegion) -> Result<()> {
        rules::region_allowed(&self.view())?;
        self.shared.regions().register(region)
    }

    fn mem_enc_unregister_region(&mut self, region: EncRegion) -> Result<()> {
        rules::region_allowed(&self.view())?;
        self.shared.regions().unregister(region)?;
        self.shared.forget_region(region);
        Ok(())
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.shared.within("set_memory_slot", || {
            self.shared.step().require_live()?;
            let last = slot.last()?;
            self.shared.check_frame(Gfn::containing(last))?;
            self.shared.set_slot(slot)
        })
    }

    /// Deletes a slot, and the private pages in its place with it.
    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.shared.within("delete_memory_slot", || {
            self.shared.step().require_live()?;
            self.shared.delete_slot(slot)
        })
    }

    /// What the guest wrote, with the C-bit and without. A journey to another host ([`Outgoing`](crate::migrate::Outgoing))
    /// takes the logs for itself.
    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        self.shared.step().require_live()?;
        let slot = self.shared.memory().slots.known(slot)?;
        self.shared.port.dirty_log(&slot, bitmap)
    }

    fn has_emulated_msr(&self, index: u32) -> bool {
        self.shared.port.has_emulated_msr(index)
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.shared.step().require_live()?;
        self.shared.params.check_interrupt(vcpu, vector)?;
        self.shared.port.deliver_interrupt(vcpu, vector)
    }

    fn devices(&self) -> Option<&dyn DevicePort> {
        self.shared.port.devices()
    }
}

impl<H: Host> Backend for SevVm<H> {
    type Vcpu = SevVcpu<H>;

    /// A vCPU of a SEV-ES or SNP guest exists before its launch is measured: its register state is
    /// part of that.
    fn create_vcpu(&self, id: VcpuId) -> Result<SevVcpu<H>> {
        let shared = &self.shared;
        shared.step().require_live()?;
        shared.params.check_vcpu(id)?;
        let context = shared.context();
        let state = context.as_ref().map_or(GuestState::Uninit, |c| c.state);
        if shared.is_es() && state > GuestState::LaunchUpdate && state != GuestState::ReceiveUpdate
        {
            return Err(Error::WrongState(shared.step()));
        }
        let port = shared.port.create_vcpu(id)?;
        let cell = Arc::new(Cell::new(&port));
        shared.cells().insert(id, Arc::clone(&cell));
        let (vm, technology) = (shared.id().0, shared.tech());
        tracing::debug!(vm, %technology, vcpu = id.0, "vCPU created");
        Ok(SevVcpu::new(Arc::clone(shared), cell, port))
    }

    /// Moves the guest between two VMs of one host. No page is copied and no command issued. The
    /// destination is created or initialised, its launch not begun; the source can only be torn down
    /// afterwards. KVM moves no SNP guests; here they move as SEV-ES guests do.
    ///
    /// # Errors
    /// Both VMs are as before. [`Error::Invalid`] with [`Field::Vm`] names a VM that does not fit;
    /// [`Error::Busy`] while another move involves one of the two, or if the destination's account
    /// cannot pay for the key; [`Error::Poisoned`] for a source whose context is gone.
    fn move_context(from: &mut Self, to: &mut Self) -> Result<()> {
        migrate::move_context(&from.shared, &to.shared)
    }

    /// The source takes debug commands (17, 18) while it is staged, and afterwards as long as its new VM
    /// lives; an SNP guest has none.
    ///
    /// # Errors
    /// ENOTTY for a VM without a context; [`Error::WrongState`] before LAUNCH_START, and for an SNP
    /// guest that is not finalised; [`Error::Exists`] for a VM that is staged already; EINVAL for a
    /// mirror; [`Error::Again`] if `random` gives no random numbers; the errors of `random` and
    /// `deliver`.
    fn local_send(
        &mut self,
        table: &Arc<StagingTable>,
        random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
        deliver: &mut dyn FnMut(&MoveToken) -> Result<()>,
    ) -> Result<()> {
        migrate::local_send(&self.shared, table, random, deliver)
    }

    fn local_cancel(&mut self) -> Result<()> {
        moves::cancel(&*self.shared)
    }

    fn local_receive(
        &mut self,
        table: &StagingTable,
        token: &MoveToken,
        deliver: &mut dyn FnMut(GuestName) -> Result<()>,
    ) -> Result<GuestName> {
        migrate::local_receive(&self.shared, table, token, deliver)
    }

    /// Makes `mirror` a mirror of `owner`: it uses the owner's key and sees the owner's pages. The
    /// context lives until both are torn down.
    ///
    /// A VM cannot be its own mirror:
    ///
    /// ```compile_fail,E0499
    /// # use kvm_ops_core::{Backend, Host};
    /// fn mirror_itself<H: Host>(mut vm: kvm_ops_sev::SevVm<H>) {
    ///     let _ = Backend::copy_context(&mut vm, &mut vm);
    /// }
    /// ```
    ///
    /// # Errors
    /// As [`move_context`](Self::move_context), and [`Error::Invalid`] for an owner that is a mirror.
    fn copy_context(owner: &mut Self, mirror: &mut Self) -> Result<()> {
        migrate::copy_context(&owner.shared, &mirror.shared)
    }
}

/// A VM that is dropped without its teardown leaks what it owns, but takes nothing of others with
/// it: it leaves its group, and an owner without mirrors can be torn down.
impl<H: Host> Drop for SevVm<H> {
    fn drop(&mut self) {
        if !self.over {
            migrate::drop_out(&self.shared, self.orphan.take());
        }
    }
}

impl<H: Host> fmt::Debug for SevVm<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SevVm")
            .field("id", &self.shared.id())
            .field("tech", &self.shared.tech())
            .field("step", &self.shared.step())
            .field("account", &self.account())
            .finish_non_exhaustive()
    }
}
