//! The operations of a VM, grouped as Linux `arch/x86/kvm/vmx/main.c` groups them.

use crate::{
    CpuId, Drained, EncCmd, EncRegion, Error, FreeReport, Gfn, Gpa, InitialPage, KeyReleased,
    Level, Measurement, MemSlot, Page, Pfn, Privacy, Result, SharedMask, SpteChange, Step, Tech,
    VcpuId, VmId, dispatchable,
};

/// The operations that every back end implements for a VM.
///
/// Methods with `&mut self` or `self` are steps of the VM's life: the owner calls them, one at a
/// time. Methods with `&self` may be called by several vCPU threads at once. An operation that a
/// technology may lack has a default body that returns [`Error::NotOffered`] with its name.
///
/// The order of a life: [`vm_init`](Self::vm_init); slots, vCPUs and initial pages;
/// [`vm_finalize`](Self::vm_finalize); vCPUs run; then the teardown, whose order the tokens
/// enforce: [`mmu_release_hkid`](Self::mmu_release_hkid), [`drain_private`](Self::drain_private),
/// [`vm_free`](Self::vm_free).
///
/// ```
/// use kvm_ops::{Host, Step, Vendor, VmOps, VmParams, sim::SimHost, vmx::VmxVm};
///
/// let host = SimHost::new(Vendor::Intel);
/// let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
/// vm.vm_init()?;
/// vm.vm_finalize()?;
/// assert_eq!(vm.step(), Step::Runnable);
///
/// let released = vm.mmu_release_hkid()?;
/// let drained = vm.drain_private(released).map_err(|(error, _)| error)?;
/// assert!(vm.vm_free(drained).is_clean());
/// # Ok::<(), kvm_ops::Error>(())
/// ```
#[dispatchable]
pub trait VmOps: Send + Sync {
    // ------------------------------------------------------------------------------- identity

    /// The technology that holds this VM.
    fn tech(&self) -> Tech;

    /// The number of the VM, unique on its host.
    fn id(&self) -> VmId;

    /// The step of its life that the VM is in.
    fn step(&self) -> Step;

    /// The bit of a guest-physical address that tells private from shared. It is constant for a
    /// VM's life, so read it once and keep it.
    fn shared_mask(&self) -> SharedMask {
        SharedMask::NONE
    }

    // ----------------------------------------------------------- life: start of the VM

    /// Sets the VM's parameters (`vm_init`). `Created -> Initialized`.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless the VM is just created; parameters that the technology refuses.
    fn vm_init(&mut self) -> Result<()>;

    /// Adds a page to the VM's measured initial contents (KVM_TDX_INIT_MEM_REGION,
    /// KVM_SEV_LAUNCH_UPDATE_DATA, KVM_SEV_SNP_LAUNCH_UPDATE). Call it after `vm_init` and before
    /// `vm_finalize`. The address lies in a slot.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that the VM cannot have.
    fn add_initial_page(&mut self, page: &InitialPage<'_>) -> Result<()> {
        let _ = page;
        not_offered!("add_initial_page")
    }

    /// Measures the contents of an initial page that was added
    /// [`Unmeasured`](crate::InitialPageKind::Unmeasured), for a launch that adds several pages
    /// before it measures them (TDH.MR.EXTEND of each 256 bytes).
    ///
    /// # Errors
    /// [`Error::NotFound`] if no such page was added.
    fn measure_initial_page(&mut self, gpa: Gpa) -> Result<()> {
        let _ = gpa;
        not_offered!("measure_initial_page")
    }

    /// Closes the VM's initial contents, so that its vCPUs may run (KVM_TDX_FINALIZE_VM,
    /// KVM_SEV_LAUNCH_FINISH, KVM_SEV_SNP_LAUNCH_FINISH). `Initialized -> Runnable`.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless the VM is initialised.
    fn vm_finalize(&mut self) -> Result<()>;

    /// The launch measurement as firmware holds it: MRTD of a TD, the launch digest of an SEV guest.
    /// Call it after [`vm_finalize`](Self::vm_finalize).
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a normal VM; [`Error::WrongState`] before the VM is final.
    ///
    /// ```
    /// use kvm_ops::{Kind, Tech, Vendor, VcpuId, VmConfig, create, sim::SimHost};
    ///
    /// let host = SimHost::new(Vendor::Intel);
    /// let mut td = create(&host, &VmConfig::new(Kind::Of(Tech::Tdx)))?;
    /// let _vcpu = td.create_vcpu(VcpuId(0))?;
    /// td.finalize()?;
    /// println!("MRTD {}", td.measurement()?);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn measurement(&self) -> Result<Measurement> {
        not_offered!("measurement")
    }

    // --------------------------------------------------------------- life: teardown

    /// Takes the first step of the teardown: no vCPU runs any more, and the VM's memory key goes
    /// back to its pool (`vm_pre_destroy`, `tdx_mmu_release_hkid`). A repeated call returns the
    /// token again.
    ///
    /// # Errors
    /// [`Error::Busy`] if a vCPU does not leave the guest; an error of firmware means that it keeps
    /// the key. Then nothing of the VM can be reclaimed, and the VM is
    /// [`Poisoned`](Step::Poisoned).
    fn mmu_release_hkid(&mut self) -> Result<KeyReleased>;

    /// Takes the second step: gives every private page and every private page table back. The report
    /// of `vm_free` counts each as freed or leaked. A repeated call returns the token again.
    ///
    /// # Errors
    /// [`Error::Invalid`] with [`Field::Token`](crate::Field::Token) for a token of another VM. The
    /// token comes back with every error.
    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)>;

    /// Takes the last step (`vm_destroy`): gives the VM itself back. The report lists everything that
    /// could not be given back. With the token of another VM the whole VM is leaked, and the report
    /// says so.
    fn vm_free(self, drained: Drained) -> FreeReport
    where
        Self: Sized;

    /// Ends the teardown of a VM whose key could not be released
    /// ([`mmu_release_hkid`](Self::mmu_release_hkid) failed with `error`). Firmware keeps the VM, so
    /// nothing is freed, and the report lists all that is leaked.
    fn vm_abandon(self, error: Error) -> FreeReport
    where
        Self: Sized,
    {
        let report = FreeReport::abandoned(self.id(), self.tech(), error);
        // Dropping the value might free what firmware still uses.
        core::mem::forget(self);
        report
    }

    /// Gives one private page back after the key is released (TDH.PHYMEM.PAGE.RECLAIM), for an
    /// embedder with tables of its own. The page returns to the caller.
    ///
    /// # Errors
    /// The answer of firmware. The page is counted as leaked then.
    fn reclaim_private_page(&mut self, released: &KeyReleased, page: Page) -> Result<Page> {
        let _ = (released, page);
        not_offered!("reclaim_private_page")
    }

    // ------------------------------------------------------------------- memory slots

    /// Creates a slot, or changes the flags of an existing one (KVM_SET_USER_MEMORY_REGION). The
    /// caller has checked that it overlaps no other slot.
    ///
    /// # Errors
    /// [`Error::Exists`] if the number is taken by another slot; the answer of the host.
    ///
    /// ```
    /// use kvm_ops::{Gpa, HostRange, MemSlot, SlotId, VmOps};
    /// # use kvm_ops::{sim::SimHost, vmx::VmxVm, Host, Vendor, VmParams};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// # #[repr(align(4096))] struct Ram([u8; 4096]);
    /// let ram = Box::leak(Box::new(Ram([0; 4096])));
    /// // SAFETY: the page is never freed, and no reference to it is used from here on.
    /// let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 4096)? };
    /// let slot = MemSlot::new(SlotId(0), Gpa::new(0x1000), range);
    /// vm.set_memory_slot(&slot)?;
    /// vm.delete_memory_slot(&slot)?;
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()>;

    /// Deletes a slot. After the call no vCPU reaches its memory.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the VM has no such slot, compared with its address and its memory; the
    /// answer of the host.
    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()>;

    /// Fetches and clears the dirty bitmap of a slot (KVM_GET_DIRTY_LOG;
    /// `update_cpu_dirty_logging`). Bit 0 of word 0 is the slot's first page.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a TD, whose memory the host cannot follow; [`Error::Invalid`] for a
    /// bitmap of the wrong length; [`Error::NotFound`] for a slot without a dirty log.
    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        let _ = (slot, bitmap);
        not_offered!("dirty_log")
    }

    // ----------------------------------------------------- private memory and the Secure-EPT

    /// Carries one change of a private table entry over to the Secure-EPT or the RMP
    /// (`set_external_spte`, `remove_external_spte`). The mirror keeps the entry frozen meanwhile.
    ///
    /// # Errors
    /// [`Error::Busy`]: nothing changed, and the entry gets its old value back. The back end
    /// documents its other errors.
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        let _ = change;
        not_offered!("set_private_spte")
    }

    /// Makes every vCPU forget the translations of blocked entries (TDH.MEM.TRACK and a kick;
    /// `flush_remote_tlbs`). One call serves a whole range of blocked entries.
    ///
    /// # Errors
    /// The answer of firmware; blocked pages may not be removed then.
    fn flush_private_tlb(&self) -> Result<()> {
        not_offered!("flush_private_tlb")
    }

    /// Makes a range of guest frames private or shared (KVM_SET_MEMORY_ATTRIBUTES), and unmaps what
    /// maps it the other way. The contents of unmapped pages are lost. Returns the number of pages
    /// converted. If it is less than `pages`, handle pending work and call again for the rest.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is empty, wraps, leaves the guest's address space or lies
    /// outside of all slots. Nothing changed then.
    fn set_memory_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        let _ = (first, pages, to);
        not_offered!("set_memory_attributes")
    }

    /// Maps private memory before the guest touches it (KVM_PRE_FAULT_MEMORY). Returns the number of
    /// pages mapped.
    ///
    /// # Errors
    /// [`Error::NotFound`] where the first frame is not private memory of a slot.
    fn pre_fault_memory(&self, first: Gfn, pages: u64) -> Result<u64> {
        let _ = (first, pages);
        not_offered!("pre_fault_memory")
    }

    /// The largest page that may map this memory (`gmem_max_mapping_level`).
    fn gmem_max_mapping_level(&self, page: Pfn, privacy: Privacy) -> Level {
        let _ = (page, privacy);
        Level::Size1G
    }

    // ------------------------------------------------------------------- encryption

    /// Runs a command of the technology on the VM (`mem_enc_ioctl`; KVM_MEMORY_ENCRYPT_OP).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a command that the technology does not have; the errors of the command.
    /// `cmd.firmware_status` holds the status of firmware, also on an error.
    fn mem_enc_op(&mut self, cmd: &mut EncCmd<'_>) -> Result<()> {
        let _ = cmd;
        not_offered!("mem_enc_op")
    }

    /// Declares memory that will hold encrypted data (KVM_MEMORY_ENCRYPT_REG_REGION).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is empty, wraps or lies outside of the host's memory.
    fn mem_enc_register_region(&mut self, region: EncRegion) -> Result<()> {
        let _ = region;
        not_offered!("mem_enc_register_region")
    }

    /// Takes a declaration back (KVM_MEMORY_ENCRYPT_UNREG_REGION).
    ///
    /// # Errors
    /// [`Error::Invalid`], as in Linux, for a range that was not declared exactly so.
    fn mem_enc_unregister_region(&mut self, region: EncRegion) -> Result<()> {
        let _ = region;
        not_offered!("mem_enc_unregister_region")
    }

    // -------------------------------------------------------------- interrupts and platform

    /// Sends an interrupt to a vCPU's local APIC, from any thread (`deliver_interrupt`).
    ///
    /// # Errors
    /// [`Error::NotOffered`] without an irqchip in the platform; [`Error::Invalid`] for a vCPU that
    /// does not exist or a vector below 16.
    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        let _ = (vcpu, vector);
        not_offered!("deliver_interrupt")
    }

    /// Reserves the three pages that VMX needs to run real mode without "unrestricted guest"
    /// (`set_tss_addr`; KVM_SET_TSS_ADDR).
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that is not page-aligned; the answer of the host.
    fn set_tss_addr(&self, gpa: Gpa) -> Result<()> {
        let _ = gpa;
        not_offered!("set_tss_addr")
    }

    /// Reserves the page of the identity map that VMX needs likewise (`set_identity_map_addr`).
    ///
    /// # Errors
    /// As [`set_tss_addr`](Self::set_tss_addr).
    fn set_identity_map_addr(&self, gpa: Gpa) -> Result<()> {
        let _ = gpa;
        not_offered!("set_identity_map_addr")
    }

    /// True if guests may use the MSR although the processor lacks it (`has_emulated_msr`).
    fn has_emulated_msr(&self, index: u32) -> bool {
        let _ = index;
        false
    }

    /// Takes the VM's state off a processor that goes offline (`disable_virtualization_cpu`;
    /// TDH.VP.FLUSH of each vCPU on it).
    ///
    /// # Errors
    /// [`Error::Busy`] while the processor is needed.
    fn disable_virtualization_cpu(&self, cpu: CpuId) -> Result<()> {
        let _ = cpu;
        Ok(())
    }
}
