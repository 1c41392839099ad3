//! The operations of a VM, grouped as Linux `arch/x86/kvm/vmx/main.c` groups them.

use crate::{
    CpuId, DevicePort, Diagnosis, Drained, EncCmd, EncRegion, Error, FreeReport, Gfn, Gpa,
    InitialPage, KeyReleased, Level, Measurement, MemSlot, Page, Pfn, Privacy, Result, SharedMask,
    SpteChange, Step, Tech, VcpuId, VmId, dispatchable,
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
    ///
    /// ```
    /// use kvm_ops::{Tech, Vendor, VmConfig, VmOps, create, sim::SimHost};
    ///
    /// let vm = create(&SimHost::new(Vendor::Amd), &VmConfig::normal())?;
    /// assert_eq!(vm.back_end().tech(), Tech::Svm);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn tech(&self) -> Tech;

    /// The number of the VM, unique on its host.
    ///
    /// ```
    /// use kvm_ops::{Vendor, VmConfig, VmOps, create, sim::SimHost};
    ///
    /// let host = SimHost::new(Vendor::Intel);
    /// let [a, b] = [create(&host, &VmConfig::normal())?, create(&host, &VmConfig::normal())?];
    /// assert_ne!(a.back_end().id(), b.back_end().id());
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn id(&self) -> VmId;

    /// The step of its life that the VM is in.
    ///
    /// ```
    /// use kvm_ops::{Step, Vendor, VmConfig, VmOps, create, sim::SimHost};
    ///
    /// let mut vm = create(&SimHost::new(Vendor::Intel), &VmConfig::normal())?;
    /// assert_eq!(vm.back_end().step(), Step::Initialized);
    /// vm.finalize()?;
    /// assert_eq!(vm.back_end().step(), Step::Runnable);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn step(&self) -> Step;

    /// All that the VM knows of an error that one of its operations returned, or that a run of its
    /// vCPUs ended with: vCPU, address and access, firmware call and status by name, and what to do.
    /// [`Error::Poisoned`] is explained by the failure that poisoned the VM.
    ///
    /// ```
    /// use kvm_ops::{Error, Vendor, VmConfig, VmOps, create, sim::SimHost};
    ///
    /// let vm = create(&SimHost::new(Vendor::Intel), &VmConfig::normal())?;
    /// let explained = vm.back_end().explain(Error::NoMemory);
    /// assert_eq!(
    ///     explained.to_string(),
    ///     format!("vmx VM {}: out of memory; give the host more memory, or the VM less", vm.id())
    /// );
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn explain(&self, error: Error) -> Diagnosis {
        Diagnosis::of(self.tech(), self.id(), error)
    }

    /// The bit of a guest-physical address that tells private from shared. It is constant for a
    /// VM's life, so read it once and keep it.
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// use kvm_ops::{Gfn, Gpa, Privacy};
    ///
    /// let mask = td.shared_mask();
    /// assert_eq!(mask.join(Gfn::new(2), Privacy::Shared), Some(Gpa::new(1 << 47 | 0x2000)));
    /// assert_eq!(mask.split(Gpa::new(0x2000)), (Gfn::new(2), Privacy::Private));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn shared_mask(&self) -> SharedMask {
        SharedMask::NONE
    }

    // ----------------------------------------------------------- life: start of the VM

    /// Sets the VM's parameters (`vm_init`). `Created -> Initialized`.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless the VM is just created; parameters that the technology refuses.
    ///
    /// ```
    /// use kvm_ops::{Error, Step, VmOps};
    /// # use kvm_ops::{Host, Vendor, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    ///
    /// let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// assert_eq!(td.step(), Step::Created);
    /// td.vm_init()?;
    /// assert_eq!(td.vm_init(), Err(Error::WrongState(Step::Initialized)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn vm_init(&mut self) -> Result<()>;

    /// Adds a page to the VM's measured initial contents (KVM_TDX_INIT_MEM_REGION,
    /// KVM_SEV_LAUNCH_UPDATE_DATA, KVM_SEV_SNP_LAUNCH_UPDATE). Call it after `vm_init` and before
    /// `vm_finalize`. The address lies in a slot.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that the VM cannot have.
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// # use kvm_ops::{Gpa, HostRange, MemSlot, SlotId};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    /// # let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// # // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// # let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// # let slot = MemSlot::new(SlotId(0), Gpa::new(0x1000), range);
    /// use kvm_ops::{Error, Field, InitialPage, InitialPageKind};
    ///
    /// td.set_memory_slot(&slot)?; // two pages at 0x1000
    /// let kind = InitialPageKind::Measured;
    /// let page = |gpa| InitialPage { gpa: Gpa::new(gpa), contents: &[0xf4; 4096], kind };
    /// td.add_initial_page(&page(0x1000))?;
    /// assert_eq!(td.add_initial_page(&page(0x1000)), Err(Error::Exists(Field::Gpa, 0x1000)));
    /// assert_eq!(td.add_initial_page(&page(0x9000)), Err(Error::NotFound(Field::Gpa, 0x9000)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// # use kvm_ops::{Gpa, HostRange, MemSlot, SlotId};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    /// # let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// # // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// # let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// # let slot = MemSlot::new(SlotId(0), Gpa::new(0x1000), range);
    /// # td.set_memory_slot(&slot)?;
    /// use kvm_ops::{Error, Field, InitialPage, InitialPageKind};
    ///
    /// let (gpa, kind) = (Gpa::new(0x1000), InitialPageKind::Unmeasured);
    /// assert_eq!(td.measure_initial_page(gpa), Err(Error::NotFound(Field::Gpa, 0x1000)));
    /// td.add_initial_page(&InitialPage { gpa, contents: &[0xf4; 4096], kind })?;
    /// td.measure_initial_page(gpa)?;
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn measure_initial_page(&mut self, gpa: Gpa) -> Result<()> {
        let _ = gpa;
        not_offered!("measure_initial_page")
    }

    /// Closes the VM's initial contents, so that its vCPUs may run (KVM_TDX_FINALIZE_VM,
    /// KVM_SEV_LAUNCH_FINISH, KVM_SEV_SNP_LAUNCH_FINISH). `Initialized -> Runnable`.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless the VM is initialised.
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// use kvm_ops::{Error, Field, Step};
    ///
    /// // A TD needs a vCPU first.
    /// assert_eq!(td.vm_finalize(), Err(Error::Invalid(Field::VcpuCount, 0)));
    /// let vcpu = td.create_vcpu(VcpuId(0))?;
    /// td.vm_finalize()?;
    /// assert_eq!(td.step(), Step::Runnable);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn vm_finalize(&mut self) -> Result<()>;

    /// The launch measurement as firmware holds it: MRTD of a TD, the launch digest of an SEV guest.
    /// Call it after [`vm_finalize`](Self::vm_finalize).
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a normal VM; [`Error::WrongState`] before the VM is final.
    ///
    /// ```
    /// use kvm_ops::{Error, Kind, Step, Tech, Vendor, VcpuId, VmConfig, VmOps, create, sim::SimHost};
    ///
    /// let mut td = create(&SimHost::new(Vendor::Intel), &VmConfig::new(Kind::Of(Tech::Tdx)))?;
    /// let _vcpu = td.create_vcpu(VcpuId(0))?;
    /// assert_eq!(td.back_end().measurement(), Err(Error::WrongState(Step::Initialized)));
    /// td.finalize()?;
    /// let mrtd = td.back_end().measurement()?;
    /// assert_ne!(mrtd.bytes(), &[0; 48]);
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
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// use kvm_ops::{SeamPort, Step};
    ///
    /// let keys = host.seam().expect("a TDX module").key_ids();
    /// assert_eq!(keys.in_use(), 1);
    /// let released = td.mmu_release_hkid()?;
    /// assert_eq!((td.step(), keys.in_use()), (Step::KeyReleased, 0));
    /// # let drained = td.drain_private(released).map_err(|(error, _)| error)?;
    /// # assert!(td.vm_free(drained).is_clean());
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn mmu_release_hkid(&mut self) -> Result<KeyReleased>;

    /// Takes the second step: gives every private page and every private page table back. The report
    /// of `vm_free` counts each as freed or leaked. A repeated call returns the token again.
    ///
    /// # Errors
    /// [`Error::Invalid`] with [`Field::Token`](crate::Field::Token) for a token of another VM. The
    /// token comes back with every error.
    ///
    /// ```
    /// use kvm_ops::{Error, Field, Step};
    /// # use kvm_ops::{Host, Vendor, VmOps, VmParams, sim::SimHost, vmx::VmxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// # let mut other = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    ///
    /// let _ours = vm.mmu_release_hkid()?;
    /// let not_ours = other.mmu_release_hkid()?;
    /// let (error, not_ours) = vm.drain_private(not_ours).unwrap_err();
    /// assert_eq!(error, Error::Invalid(Field::Token, other.id().0));
    /// let drained = other.drain_private(not_ours).map_err(|(error, _)| error)?;
    /// assert_eq!((drained.vm(), other.step()), (other.id(), Step::Drained));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)>;

    /// Takes the last step (`vm_destroy`): gives the VM itself back. The report lists everything that
    /// could not be given back. With the token of another VM the whole VM is leaked, and the report
    /// says so.
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// let released = td.mmu_release_hkid()?;
    /// let drained = td.drain_private(released).map_err(|(error, _)| error)?;
    /// let report = td.vm_free(drained);
    /// assert!(report.is_clean() && report.pages_freed > 0);
    /// assert_eq!(report.keys_freed, 1);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn vm_free(self, drained: Drained) -> FreeReport
    where
        Self: Sized;

    /// Ends the teardown of a VM whose key could not be released
    /// ([`mmu_release_hkid`](Self::mmu_release_hkid) failed with `error`). Firmware keeps the VM, so
    /// nothing is freed, and the report lists all that is leaked.
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// use kvm_ops::{Error, Leaked};
    ///
    /// let error = Error::Firmware(0x8000_0824_0000_0000); // FLUSHVP_NOT_DONE
    /// let report = td.vm_abandon(error);
    /// assert!(report.keys_freed == 0 && report.pages_leaked() > 0);
    /// assert!(report.leaks.iter().any(|leak| matches!(leak.what, Leaked::Key(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// # use kvm_ops::{Error, Field, Gfn, Level, PagePort, PrivateSpte, SpteChange};
    /// # let pages = host.pages().expect("a TDX module");
    /// # let page = pages.alloc(Level::Size4K)?;
    /// # let (old, new) = (PrivateSpte::Absent, PrivateSpte::Table(page.pfn()));
    /// # // SAFETY: the page is ours, and the TD's from here on.
    /// # let change = unsafe { SpteChange::new(Gfn::new(0), Level::Size512G, old, new) };
    /// td.set_private_spte(&change)?; // gives `page` to the TD, as a table
    /// let released = td.mmu_release_hkid()?;
    /// let page = td.reclaim_private_page(&released, page)?;
    /// assert!(pages.free(page).is_ok());
    /// # let drained = td.drain_private(released).map_err(|(error, _)| error)?;
    /// # assert!(td.vm_free(drained).is_clean());
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    /// use kvm_ops::{Error, Field, Gpa, HostRange, MemSlot, SlotId, VmOps};
    /// # use kvm_ops::{Host, Vendor, VmParams, sim::SimHost, vmx::VmxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// # #[repr(align(4096))] struct Ram([u8; 4096]);
    /// let ram = Box::leak(Box::new(Ram([0; 4096])));
    /// // SAFETY: the page is never freed, and no reference to it is used from here on.
    /// let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 4096)? };
    /// let [slot, moved] = [0x1000, 0x2000].map(|gpa| MemSlot::new(SlotId(0), Gpa::new(gpa), range));
    /// vm.set_memory_slot(&slot)?;
    /// assert_eq!(vm.set_memory_slot(&moved), Err(Error::Exists(Field::Slot, 0)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()>;

    /// Deletes a slot. After the call no vCPU reaches its memory.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the VM has no such slot, compared with its address and its memory; the
    /// answer of the host.
    ///
    /// ```
    /// # use kvm_ops::{Host, Vendor, VmOps, VmParams, sim::SimHost, vmx::VmxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// # use kvm_ops::{Gpa, HostRange, MemSlot, SlotId};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    /// # let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// # // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// # let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// # let slot = MemSlot::new(SlotId(0), Gpa::new(0x1000), range);
    /// use kvm_ops::{Error, Field};
    ///
    /// vm.set_memory_slot(&slot)?;
    /// vm.delete_memory_slot(&slot)?;
    /// assert_eq!(vm.delete_memory_slot(&slot), Err(Error::NotFound(Field::Slot, 0)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()>;

    /// Fetches and clears the dirty bitmap of a slot (KVM_GET_DIRTY_LOG;
    /// `update_cpu_dirty_logging`). Bit 0 of word 0 is the slot's first page.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a TD, whose memory the host cannot follow; [`Error::Invalid`] for a
    /// bitmap of the wrong length; [`Error::NotFound`] for a slot without a dirty log.
    ///
    /// ```
    /// # use kvm_ops::{Host, Vendor, VmOps, VmParams, sim::SimHost, vmx::VmxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// # use kvm_ops::{Gpa, HostRange, MemSlot, SlotId};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    /// # let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// # // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// # let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// # let mut slot = MemSlot::new(SlotId(0), Gpa::new(0x1000), range);
    /// # use kvm_ops::{Backend, Exit, VcpuId, VcpuOps, guest::Script};
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = Script::new().write(Gpa::new(0x2000), b"dirty");
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// # vm.vm_finalize()?;
    /// slot.flags.log_dirty = true;
    /// vm.set_memory_slot(&slot)?; // two pages at 0x1000
    /// assert_eq!(vcpu.vcpu_run()?, Exit::Shutdown); // wrote at 0x2000
    /// let mut bitmap = [0; 1];
    /// vm.dirty_log(&slot, &mut bitmap)?;
    /// assert_eq!(bitmap, [0b10]);
    /// vm.dirty_log(&slot, &mut bitmap)?;
    /// assert_eq!(bitmap, [0]);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// # use kvm_ops::{Error, Field, Gfn, Level, PagePort, PrivateSpte, SpteChange};
    /// # let pages = host.pages().expect("a TDX module");
    /// # let page = pages.alloc(Level::Size4K)?;
    /// let (table, at) = (PrivateSpte::Table(page.into_raw()), Gfn::new(0));
    /// // SAFETY: the page is ours, and the TD's from here on.
    /// let add = unsafe { SpteChange::new(at, Level::Size512G, PrivateSpte::Absent, table) };
    /// td.set_private_spte(&add)?; // TDH.MEM.SEPT.ADD
    /// // SAFETY: as above.
    /// let drop_it = unsafe { SpteChange::new(at, Level::Size512G, table, PrivateSpte::Absent) };
    /// assert_eq!(td.set_private_spte(&drop_it), Err(Error::Invalid(Field::Gfn, 0))); // not blocked
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_private_spte(&self, change: &SpteChange) -> Result<()> {
        let _ = change;
        not_offered!("set_private_spte")
    }

    /// Makes every vCPU forget the translations of blocked entries (TDH.MEM.TRACK and a kick;
    /// `flush_remote_tlbs`). One call serves a whole range of blocked entries.
    ///
    /// # Errors
    /// The answer of firmware; blocked pages may not be removed then.
    ///
    /// ```
    /// use kvm_ops::{Error, VmOps};
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmParams, sim::SimHost, tdx::TdxVm, vmx::VmxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// # let _vcpu = td.create_vcpu(VcpuId(0))?;
    /// # td.vm_finalize()?;
    /// # let vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// td.flush_private_tlb()?;
    /// assert!(matches!(vm.flush_private_tlb(), Err(Error::NotOffered(_)))); // no private memory
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn flush_private_tlb(&self) -> Result<()> {
        not_offered!("flush_private_tlb")
    }

    /// Makes a range of guest frames private or shared (KVM_SET_MEMORY_ATTRIBUTES), and unmaps what
    /// maps it the other way. The contents of unmapped pages are lost. Returns the number of pages
    /// converted. If it is less than `pages`, handle pending work and call again for the rest.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is empty, wraps or leaves the guest's address space;
    /// [`Error::NotFound`] where no slot has the first frame. Nothing changed then.
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// # use kvm_ops::{Gpa, HostRange, MemSlot, SlotId};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    /// # let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// # // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// # let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// # let slot = MemSlot::new(SlotId(0), Gpa::new(0x1000), range);
    /// use kvm_ops::{Error, Field, Gfn, Privacy};
    ///
    /// td.set_memory_slot(&slot)?; // frames 1 and 2
    /// assert_eq!(td.set_memory_attributes(Gfn::new(1), 1, Privacy::Shared)?, 1);
    /// assert_eq!(td.set_memory_attributes(Gfn::new(1), 8, Privacy::Private)?, 2);
    /// let outside = td.set_memory_attributes(Gfn::new(3), 6, Privacy::Shared);
    /// assert_eq!(outside, Err(Error::NotFound(Field::Gfn, 3)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_memory_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        let _ = (first, pages, to);
        not_offered!("set_memory_attributes")
    }

    /// The kind of memory that a guest frame is now. The host and its devices reach shared frames
    /// only. It may change with the next conversion.
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// # use kvm_ops::{Gpa, HostRange, MemSlot, SlotId};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    /// # let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// # // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// # let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// # let slot = MemSlot::new(SlotId(0), Gpa::new(0x1000), range);
    /// use kvm_ops::{Gfn, Privacy};
    ///
    /// td.set_memory_slot(&slot)?; // frames 1 and 2
    /// assert_eq!(td.privacy(Gfn::new(1)), Privacy::Private);
    /// td.set_memory_attributes(Gfn::new(1), 1, Privacy::Shared)?;
    /// assert_eq!(td.privacy(Gfn::new(1)), Privacy::Shared);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn privacy(&self, gfn: Gfn) -> Privacy {
        let _ = gfn;
        Privacy::Shared
    }

    /// Lets the host use the slot's memory of a frame, as a device does. Returns true if that is what the
    /// guest reaches there without its key: for a shared frame, and for every frame of an SEV or SEV-ES
    /// guest, whose processor keeps nothing from the host. Contents that are encrypted with the guest's key
    /// lie in the slot then as they are.
    fn show_to_host(&self, gfn: Gfn) -> bool {
        self.privacy(gfn) == Privacy::Shared
    }

    /// Maps private memory before the guest touches it (KVM_PRE_FAULT_MEMORY). Returns the number of
    /// pages mapped.
    ///
    /// # Errors
    /// [`Error::NotFound`] where the first frame is not private memory of a slot.
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// # use kvm_ops::{Gpa, HostRange, MemSlot, SlotId};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    /// # let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// # // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// # let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// # let slot = MemSlot::new(SlotId(0), Gpa::new(0x1000), range);
    /// # let _vcpu = td.create_vcpu(VcpuId(0))?;
    /// # td.vm_finalize()?;
    /// use kvm_ops::{Error, Field, Gfn};
    ///
    /// td.set_memory_slot(&slot)?; // frames 1 and 2
    /// assert_eq!(td.pre_fault_memory(Gfn::new(1), 8)?, 2);
    /// let outside = td.pre_fault_memory(Gfn::new(3), 6);
    /// assert_eq!(outside, Err(Error::NotFound(Field::Gfn, 3)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn pre_fault_memory(&self, first: Gfn, pages: u64) -> Result<u64> {
        let _ = (first, pages);
        not_offered!("pre_fault_memory")
    }

    /// The largest page that may map this memory (`gmem_max_mapping_level`).
    ///
    /// ```
    /// use kvm_ops::{Level, Pfn, Privacy};
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    ///
    /// let page = Pfn::new(0x200);
    /// assert_eq!(td.gmem_max_mapping_level(page, Privacy::Private), Level::Size4K);
    /// assert_eq!(td.gmem_max_mapping_level(page, Privacy::Shared), Level::Size1G);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    ///
    /// ```
    /// use kvm_ops::{EncCmd, VmOps};
    /// # use kvm_ops::{Host, Tech, Vendor, VmParams, sev::SevVm, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = SevVm::create(&host, host.next_vm_id(), Tech::Sev, &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// # vm.vm_finalize()?;
    ///
    /// let mut data = [0; 12]; // struct kvm_sev_guest_status: handle, policy, state
    /// let mut cmd = EncCmd { id: 16, flags: 0, data: &mut data, firmware_status: 0 };
    /// vm.mem_enc_op(&mut cmd)?; // KVM_SEV_GUEST_STATUS
    /// assert_eq!(cmd.firmware_status, 0);
    /// assert_eq!(data[8..], [3, 0, 0, 0]); // running
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn mem_enc_op(&mut self, cmd: &mut EncCmd<'_>) -> Result<()> {
        let _ = cmd;
        not_offered!("mem_enc_op")
    }

    /// Declares memory that will hold encrypted data (KVM_MEMORY_ENCRYPT_REG_REGION).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is empty, wraps or lies outside of the host's memory.
    ///
    /// ```
    /// use kvm_ops::{EncRegion, Error, Field};
    /// # use kvm_ops::{Host, Tech, Vendor, VmOps, VmParams, sev::SevVm, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = SevVm::create(&host, host.next_vm_id(), Tech::Sev, &VmParams::new(1))?;
    /// # vm.vm_init()?;
    ///
    /// vm.mem_enc_register_region(EncRegion { address: 0x7f00_0000_1000, bytes: 0x2000 })?;
    /// assert_eq!(vm.locked_pages(), 2);
    /// let empty = vm.mem_enc_register_region(EncRegion { address: 0x7f00_0000_1000, bytes: 0 });
    /// assert_eq!(empty, Err(Error::Invalid(Field::Size, 0)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn mem_enc_register_region(&mut self, region: EncRegion) -> Result<()> {
        let _ = region;
        not_offered!("mem_enc_register_region")
    }

    /// Takes a declaration back (KVM_MEMORY_ENCRYPT_UNREG_REGION).
    ///
    /// # Errors
    /// [`Error::Invalid`], as in Linux, for a range that was not declared exactly so.
    ///
    /// ```
    /// use kvm_ops::{EncRegion, Error, Field};
    /// # use kvm_ops::{Host, Tech, Vendor, VmOps, VmParams, sev::SevVm, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = SevVm::create(&host, host.next_vm_id(), Tech::Sev, &VmParams::new(1))?;
    /// # vm.vm_init()?;
    ///
    /// let region = EncRegion { address: 0x7f00_0000_1000, bytes: 0x2000 };
    /// vm.mem_enc_register_region(region)?;
    /// let half = EncRegion { bytes: 0x1000, ..region };
    /// let refused = Err(Error::Invalid(Field::HostAddress, region.address));
    /// assert_eq!(vm.mem_enc_unregister_region(half), refused);
    /// vm.mem_enc_unregister_region(region)?;
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    ///
    /// ```
    /// use kvm_ops::{Error, Exit, Field, Irqchip, VmConfig, VmOps, create};
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, guest::Script, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    ///
    /// let mut vm = create(&host, &VmConfig::normal().irqchip(Irqchip::Full))?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = Script::new().halt();
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// # vm.finalize()?;
    /// vm.back_end().deliver_interrupt(VcpuId(0), 0x20)?;
    /// assert_eq!(vcpu.vcpu_run()?, Exit::Shutdown); // HLT, woken by the interrupt
    /// let reserved = vm.back_end().deliver_interrupt(VcpuId(0), 15);
    /// assert_eq!(reserved, Err(Error::Invalid(Field::Vector, 15)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        let _ = (vcpu, vector);
        not_offered!("deliver_interrupt")
    }

    /// The operations for devices: interrupt lines and messages, and events for guests' writes. `None`
    /// where the machine below does none of it without an exit.
    ///
    /// ```
    /// # use kvm_ops::{Host, Vendor, VmOps, VmParams, sim::SimHost, vmx::VmxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// use kvm_ops::{Msi, VcpuId};
    ///
    /// match vm.devices() {
    ///     Some(machine) => drop(machine.signal_msi(Msi::to(VcpuId(0), 0x30))?), // on /dev/kvm
    ///     None => {} // the software platform: `kvm-ops-machine` does it
    /// }
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn devices(&self) -> Option<&dyn DevicePort> {
        None
    }

    /// Reserves the three pages that VMX needs to run real mode without "unrestricted guest"
    /// (`set_tss_addr`; KVM_SET_TSS_ADDR).
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that is not page-aligned; the answer of the host.
    ///
    /// ```
    /// # use kvm_ops::{Host, Vendor, VmOps, VmParams, sim::SimHost, vmx::VmxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// use kvm_ops::{Error, Field, Gpa};
    ///
    /// vm.set_tss_addr(Gpa::new(0xfffb_d000))?;
    /// let odd = vm.set_tss_addr(Gpa::new(0xfffb_d004));
    /// assert_eq!(odd, Err(Error::Invalid(Field::Gpa, 0xfffb_d004)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_tss_addr(&self, gpa: Gpa) -> Result<()> {
        let _ = gpa;
        not_offered!("set_tss_addr")
    }

    /// Reserves the page of the identity map that VMX needs likewise (`set_identity_map_addr`).
    ///
    /// # Errors
    /// As [`set_tss_addr`](Self::set_tss_addr).
    ///
    /// ```
    /// # use kvm_ops::{Host, Vendor, VmOps, VmParams, sim::SimHost, vmx::VmxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// use kvm_ops::{Error, Field, Gpa};
    ///
    /// vm.set_identity_map_addr(Gpa::new(0xfffb_c000))?;
    /// let odd = vm.set_identity_map_addr(Gpa::new(0xfffb_c004));
    /// assert_eq!(odd, Err(Error::Invalid(Field::Gpa, 0xfffb_c004)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_identity_map_addr(&self, gpa: Gpa) -> Result<()> {
        let _ = gpa;
        not_offered!("set_identity_map_addr")
    }

    /// True if guests may use the MSR although the processor lacks it (`has_emulated_msr`).
    ///
    /// ```
    /// # use kvm_ops::{Host, Vendor, VmOps, VmParams, sim::SimHost, vmx::VmxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # vm.vm_init()?;
    /// const IA32_PAT: u32 = 0x277;
    /// const IA32_SMBASE: u32 = 0x9e;
    /// assert!(vm.has_emulated_msr(IA32_PAT));
    /// assert!(!vm.has_emulated_msr(IA32_SMBASE)); // the software platform has no SMM
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn has_emulated_msr(&self, index: u32) -> bool {
        let _ = index;
        false
    }

    /// Takes the VM's state off a processor that goes offline (`disable_virtualization_cpu`;
    /// TDH.VP.FLUSH of each vCPU on it).
    ///
    /// # Errors
    /// [`Error::Busy`] while the processor is needed.
    ///
    /// ```
    /// # use kvm_ops::{Backend, Host, Vendor, VcpuId, VmOps, VmParams, sim::SimHost, tdx::TdxVm};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut td = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    /// # td.vm_init()?;
    /// use kvm_ops::{CpuId, Error, Field};
    ///
    /// let _vcpu = td.create_vcpu(VcpuId(0))?;
    /// td.disable_virtualization_cpu(CpuId(0))?; // TDH.VP.FLUSH, if the vCPU was there
    /// let unknown = td.disable_virtualization_cpu(CpuId(999));
    /// assert_eq!(unknown, Err(Error::Invalid(Field::Cpu, 999)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn disable_virtualization_cpu(&self, cpu: CpuId) -> Result<()> {
        let _ = cpu;
        Ok(())
    }
}
