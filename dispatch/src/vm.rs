//! A VM with the account of its slots: the owner that embedders hold.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::fmt;
use core::mem::{self, ManuallyDrop};

use crate::moves::{GuestName, MoveToken, StagingTable};
use crate::{
    Backend, CreateError, Diagnosis, EncCmd, EncRegion, Error, Field, FreeReport, Gfn, Gpa,
    InitialPage, KeyReleased, Measurement, MemSlot, Privacy, Result, SharedMask, SlotFlags, SlotId,
    Step, Tech, VcpuId, VmId,
};

/// A slot as [`Vm::slots`] lists it.
///
/// It is no [`MemSlot`], because that could be put into another VM, which may outlive the memory.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// The number.
    pub id: SlotId,
    /// The guest-physical address of the first byte.
    pub gpa: Gpa,
    /// Bytes.
    pub bytes: u64,
    /// The host address of the first byte.
    pub host_address: u64,
    /// The ways in which the guest may use it.
    pub flags: SlotFlags,
}

impl SlotInfo {
    const fn of(slot: &MemSlot) -> Self {
        Self {
            id: slot.id,
            gpa: slot.gpa,
            bytes: slot.host.bytes(),
            host_address: slot.host.address(),
            flags: slot.flags,
        }
    }
}

/// A VM of one back end, or of an enum of back ends.
///
/// It keeps the slots, makes the checks that every technology needs (overlaps, numbers), and takes the
/// steps of the teardown in order: [`destroy`](Self::destroy) reports them; dropping takes them too,
/// and logs leaks.
///
/// The back end is reachable as `&B` only. With `&mut B` two VMs could be swapped behind their slots,
/// and the memory of one be freed while the guest of the other writes it.
pub struct Vm<B: Backend> {
    /// Taken out only where the value ends: `destroy`, `into_back_end` and `drop`.
    back_end: ManuallyDrop<B>,
    slots: BTreeMap<SlotId, MemSlot>,
    mask: SharedMask,
}

impl<B: Backend> Vm<B> {
    /// Initialises the VM of a back end and takes it over.
    ///
    /// # Errors
    /// The error of `vm_init`, with the report of the teardown that followed.
    pub fn init(mut back_end: B) -> Result<Self, CreateError> {
        let initialised = back_end.vm_init();
        let mask = back_end.shared_mask();
        let vm = Self {
            back_end: ManuallyDrop::new(back_end),
            slots: BTreeMap::new(),
            mask,
        };
        match initialised {
            Ok(()) => {
                tracing::debug!(vm = vm.id().0, tech = %vm.tech(), "vm_init");
                Ok(vm)
            }
            Err(error) => {
                let diagnosis = vm.explain(error);
                Err(CreateError::torn_down(error, diagnosis, vm.destroy()))
            }
        }
    }

    /// The back end, for operations that this type does not wrap.
    ///
    /// Two VMs cannot be swapped behind their slots:
    ///
    /// ```compile_fail,E0596
    /// # use kvm_ops::{Backend, Vm};
    /// fn swap<B: Backend>(a: &mut Vm<B>, b: &mut Vm<B>) {
    ///     std::mem::swap(&mut *a.back_end(), &mut *b.back_end());
    /// }
    /// ```
    #[inline]
    pub fn back_end(&self) -> &B {
        &self.back_end
    }

    /// Gives up the care for the VM: the caller takes the steps of the teardown. The slots stay set.
    ///
    /// ```
    /// use kvm_ops::sim::SimHost;
    /// use kvm_ops::{Vendor, VmConfig, VmOps, create};
    ///
    /// let vm = create(&SimHost::new(Vendor::Intel), &VmConfig::normal())?;
    /// let mut vm = vm.into_back_end();
    /// let released = vm.mmu_release_hkid()?;
    /// let drained = vm.drain_private(released).map_err(|(error, _)| error)?;
    /// assert!(vm.vm_free(drained).is_clean());
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    pub fn into_back_end(self) -> B {
        let mut this = ManuallyDrop::new(self);
        drop(mem::take(&mut this.slots));
        // SAFETY: `this` is neither dropped nor used after this line.
        unsafe { ManuallyDrop::take(&mut this.back_end) }
    }

    /// The technology of the VM.
    #[inline]
    pub fn tech(&self) -> Tech {
        self.back_end().tech()
    }

    /// The number of the VM.
    #[inline]
    pub fn id(&self) -> VmId {
        self.back_end().id()
    }

    /// All that the VM knows of an error that one of its operations returned, or that a run of its
    /// vCPUs ended with ([`VmOps::explain`](crate::VmOps::explain)). It prints as one line: technology,
    /// VM, vCPU, address and access, firmware call and status by name, and what to do.
    ///
    /// ```
    /// # #[cfg(all(feature = "sim", feature = "tdx"))] {
    /// use kvm_ops::guest::Script;
    /// use kvm_ops::sim::SimHost;
    /// use kvm_ops::{Error, Gpa, HostRange, Kind, MemSlot, SlotId, Tech, VcpuId, VcpuOps, Vendor};
    /// use kvm_ops::{VmConfig, create};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    ///
    /// let mut vm = create(&SimHost::new(Vendor::Intel), &VmConfig::new(Kind::Of(Tech::Tdx)))?;
    /// # let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// # // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// # let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// vm.set_memory_slot(MemSlot::new(SlotId(0), Gpa::new(0), range))?;
    /// let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// vm.finalize()?;
    /// // A page of a TD is the guest's to accept before its first use.
    /// if let Some(programs) = vcpu.programs() {
    ///     programs.load_program(Box::new(Script::new().read(Gpa::new(0x1000), 1)))?;
    /// }
    /// assert_eq!(vcpu.vcpu_run(), Err(Error::Poisoned));
    /// let why = vm.explain(Error::Poisoned);
    /// assert_eq!(why.vcpu, Some(VcpuId(0)));
    /// assert!(why.to_string().contains("private access at 0x1000"), "{why}");
    /// assert!(why.advice.contains("TDG.MEM.PAGE.ACCEPT"));
    /// # vcpu.vcpu_free()?;
    /// # }
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    pub fn explain(&self, error: Error) -> Diagnosis {
        self.back_end().explain(error)
    }

    /// The step of its life that the VM is in.
    #[inline]
    pub fn step(&self) -> Step {
        self.back_end().step()
    }

    /// The bit of a guest-physical address that tells private from shared. A field: no call is
    /// dispatched.
    #[inline]
    pub fn shared_mask(&self) -> SharedMask {
        self.mask
    }

    /// The slots, by number.
    ///
    /// ```
    /// use kvm_ops::sim::SimHost;
    /// use kvm_ops::{Gpa, HostRange, MemSlot, SlotId, Vendor, VmConfig, create};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    /// # let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// # // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// # let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// let mut vm = create(&SimHost::new(Vendor::Intel), &VmConfig::normal())?;
    /// vm.set_memory_slot(MemSlot::new(SlotId(0), Gpa::new(0x4000), range))?;
    /// assert!(vm.slots().map(|slot| (slot.gpa, slot.bytes)).eq([(Gpa::new(0x4000), 8192)]));
    /// vm.delete_memory_slot(SlotId(0))?;
    /// assert_eq!(vm.slots().count(), 0);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    pub fn slots(&self) -> impl Iterator<Item = SlotInfo> + '_ {
        self.slots.values().map(SlotInfo::of)
    }

    /// Creates a slot, or changes the flags of the slot that has its number, address and memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] with [`Field::OverlappedSlot`] names a slot that it would overlap;
    /// [`Error::Exists`] if the number is taken by another slot; [`Error::Invalid`] for a slot that
    /// wraps, is not page-aligned or reaches into the shared bit; the answer of the host.
    ///
    /// ```
    /// use kvm_ops::sim::SimHost;
    /// use kvm_ops::{Error, Field, Gpa, HostRange, MemSlot, SlotId, Vendor, VmConfig, create};
    /// # #[repr(align(4096))] struct Ram([u8; 8192]);
    /// let mut vm = create(&SimHost::new(Vendor::Intel), &VmConfig::normal())?;
    /// let ram = Box::leak(Box::new(Ram([0; 8192])));
    /// // SAFETY: the memory is never freed, and no reference to it is used from here on.
    /// let range = unsafe { HostRange::new(ram.0.as_ptr() as u64, 8192)? };
    /// vm.set_memory_slot(MemSlot::new(SlotId(0), Gpa::new(0), range))?;
    /// let overlap = vm.set_memory_slot(MemSlot::new(SlotId(1), Gpa::new(0x1000), range));
    /// assert_eq!(overlap, Err(Error::Invalid(Field::OverlappedSlot, 0)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    pub fn set_memory_slot(&mut self, slot: MemSlot) -> Result<()> {
        let last = slot.last()?;
        if (slot.gpa.get() | last.get()) & self.mask.bits() != 0 {
            return Err(Error::Invalid(Field::Gpa, last.get()));
        }
        if self
            .slots
            .get(&slot.id)
            .is_some_and(|old| !old.is_same_place(&slot))
        {
            return Err(Error::Exists(Field::Slot, slot.id.0.into()));
        }
        if let Some(other) = self
            .slots
            .values()
            .find(|o| o.id != slot.id && o.overlaps(&slot))
        {
            return Err(Error::Invalid(Field::OverlappedSlot, other.id.0.into()));
        }
        self.back_end().set_memory_slot(&slot)?;
        self.slots.insert(slot.id, slot);
        Ok(())
    }

    /// Deletes a slot. After the call no vCPU reaches its memory.
    ///
    /// # Errors
    /// [`Error::NotFound`]; the answer of the host, and the slot stays then.
    pub fn delete_memory_slot(&mut self, id: SlotId) -> Result<()> {
        let slot = *self.slot(id)?;
        self.back_end().delete_memory_slot(&slot)?;
        self.slots.remove(&id);
        Ok(())
    }

    /// Fetches and clears the dirty bitmap of a slot: [`MemSlot::dirty_words`] words, bit 0 of
    /// word 0 for its first page.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a slot that does not exist or has no dirty log; [`Error::Invalid`] for
    /// a bitmap of the wrong length; [`Error::NotOffered`] for a TD.
    pub fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<()> {
        self.back_end().dirty_log(self.slot(id)?, bitmap)
    }

    fn slot(&self, id: SlotId) -> Result<&MemSlot> {
        self.slots
            .get(&id)
            .ok_or(Error::NotFound(Field::Slot, id.0.into()))
    }

    /// Creates a vCPU.
    ///
    /// # Errors
    /// [`Error::Exists`] or [`Error::Invalid`] for the number; the answer of the host.
    ///
    /// ```
    /// use kvm_ops::sim::SimHost;
    /// use kvm_ops::{Error, Field, VcpuId, VcpuOps, Vendor, VmConfig, create};
    ///
    /// let vm = create(&SimHost::new(Vendor::Intel), &VmConfig::normal().vcpus(2))?;
    /// let vcpu = vm.create_vcpu(VcpuId(1))?;
    /// assert_eq!(vcpu.id(), VcpuId(1));
    /// let again = vm.create_vcpu(VcpuId(1)).map(drop);
    /// assert_eq!(again, Err(Error::Exists(Field::Vcpu, 1)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    pub fn create_vcpu(&self, id: VcpuId) -> Result<B::Vcpu> {
        self.back_end().create_vcpu(id)
    }

    /// Adds a page to the VM's measured initial contents.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a normal VM, whose memory the host writes itself.
    pub fn add_initial_page(&mut self, page: &InitialPage<'_>) -> Result<()> {
        self.back_end.add_initial_page(page)
    }

    /// Measures a page that was added unmeasured.
    ///
    /// # Errors
    /// [`Error::NotOffered`] where firmware measures a page as it is added, always or never;
    /// [`Error::NotFound`] if no such page was added.
    pub fn measure_initial_page(&mut self, gpa: Gpa) -> Result<()> {
        self.back_end.measure_initial_page(gpa)
    }

    /// Closes the VM's initial contents, so that vCPUs may run.
    ///
    /// # Errors
    /// [`Error::WrongState`] the second time; the answer of firmware.
    ///
    /// ```
    /// use kvm_ops::sim::SimHost;
    /// use kvm_ops::{Error, Exit, Step, VcpuId, VcpuOps, Vendor, VmConfig, create};
    ///
    /// let mut vm = create(&SimHost::new(Vendor::Amd), &VmConfig::normal())?;
    /// let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// assert_eq!(vcpu.vcpu_run(), Err(Error::WrongState(Step::Initialized)));
    /// vm.finalize()?;
    /// // It goes on until it wants an instruction, and the VM has no memory.
    /// assert_eq!(vcpu.vcpu_run(), Ok(Exit::InternalError { suberror: 1 }));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    pub fn finalize(&mut self) -> Result<()> {
        self.back_end.vm_finalize()?;
        tracing::debug!(vm = self.id().0, tech = %self.tech(), "vm_finalize");
        Ok(())
    }

    /// The launch measurement as firmware holds it: MRTD, or the launch digest.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a normal VM; [`Error::WrongState`] before the VM is final.
    pub fn measurement(&self) -> Result<Measurement> {
        self.back_end().measurement()
    }

    /// Runs a command of the technology on the VM (KVM_MEMORY_ENCRYPT_OP).
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a normal VM; the errors of the command.
    pub fn mem_enc_op(&mut self, cmd: &mut EncCmd<'_>) -> Result<()> {
        self.back_end.mem_enc_op(cmd)
    }

    /// Declares memory that will hold encrypted data (KVM_MEMORY_ENCRYPT_REG_REGION).
    ///
    /// # Errors
    /// [`Error::NotOffered`] where the technology needs no declaration; [`Error::Invalid`] for a range
    /// that it refuses.
    pub fn register_region(&mut self, region: EncRegion) -> Result<()> {
        self.back_end.mem_enc_register_region(region)
    }

    /// Takes a declaration back (KVM_MEMORY_ENCRYPT_UNREG_REGION).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that was not declared exactly so.
    pub fn unregister_region(&mut self, region: EncRegion) -> Result<()> {
        self.back_end.mem_enc_unregister_region(region)
    }

    /// Makes a range of frames private or shared. Pages that are unmapped lose their contents. Returns
    /// the number of pages converted. If it is less than `pages`, call again for the rest.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a normal VM; [`Error::Invalid`] for a range that is empty, wraps or
    /// leaves the guest's address space; [`Error::NotFound`] if no slot covers the first frame.
    pub fn set_memory_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        self.back_end().set_memory_attributes(first, pages, to)
    }

    /// Maps private memory before the guest touches it. Returns the number of pages mapped.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a normal VM; [`Error::NotFound`] where no private memory is.
    pub fn pre_fault_memory(&self, first: Gfn, pages: u64) -> Result<u64> {
        self.back_end().pre_fault_memory(first, pages)
    }

    /// Moves the encryption context of this VM to `destination`, with the guest's pages and, where it
    /// is encrypted, its register state (KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM). Nothing is copied, so the
    /// cost does not depend on the guest's size.
    ///
    /// The destination is a VM of the same technology and machine whose launch has not begun. If it has
    /// no slots, it gets the source's; otherwise it keeps its own, which must map the same memory. The
    /// guest goes on at the destination. The source can only be torn down. Memory in the source's slots
    /// is in use until both VMs are gone. Registers that the host can see (plain SEV) are the
    /// embedder's to carry over. The vCPUs of a TD come with it: the destination has none before, and
    /// [`create_vcpu`](Self::create_vcpu) gives the handle of each afterwards. An SEV-ES or SNP guest
    /// goes on in vCPUs that the destination has.
    ///
    /// # Errors
    /// [`Error::Invalid`] with [`Field::Vm`] names the VM that is not fit: of another technology or
    /// machine, not confidential, a TD or SNP guest that is not finalised, or a destination that is
    /// launched or has regions; [`Field::VcpuCount`] if the destination of an SEV-ES or SNP guest has
    /// another number of vCPUs, or that of a TD is for another number; [`Error::Busy`] while another
    /// move involves one of the two, or an exit of an encrypted vCPU waits for its answer;
    /// [`Error::Poisoned`] for a source that is dead. After an error both are as they were.
    ///
    /// ```
    /// # #[cfg(all(feature = "sim", feature = "tdx"))] {
    /// use kvm_ops::sim::SimHost;
    /// use kvm_ops::{Kind, Step, Tech, VcpuId, Vendor, VmConfig, create};
    ///
    /// let host = SimHost::new(Vendor::Intel);
    /// let new = || create(&host, &VmConfig::new(Kind::Of(Tech::Tdx)));
    /// let (mut from, mut to) = (new()?, new()?);
    /// let old = from.create_vcpu(VcpuId(0))?;
    /// from.finalize()?;
    /// from.move_to(&mut to)?;
    /// let vcpu = to.create_vcpu(VcpuId(0))?;
    /// assert_eq!((from.step(), to.step()), (Step::Poisoned, Step::Runnable));
    /// # drop((old, vcpu));
    /// # }
    /// # Ok::<(), kvm_ops::CreateError>(())
    /// ```
    pub fn move_to(&mut self, destination: &mut Self) -> Result<()> {
        self.check_pair(destination)?;
        let carry = destination.slots.is_empty();
        if carry {
            self.lend_slots(destination)?;
        }
        let moved = B::move_context(&mut self.back_end, &mut destination.back_end);
        if moved.is_err() && carry {
            destination.give_up_slots();
        }
        moved?;
        tracing::debug!(from = self.id().0, to = destination.id().0, "context moved");
        Ok(())
    }

    /// Stages the guest: whoever brings the token to another VM of this machine gets it
    /// ([`local_receive`](Self::local_receive)), once. `random` fills the token from the host's random
    /// numbers; `deliver` hands it on. Until then the guest is this VM's, and does not run.
    ///
    /// # Errors
    /// Those of [`Backend::local_send`]; nothing was staged.
    pub fn local_send(
        &mut self,
        table: &Arc<StagingTable>,
        random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
        deliver: &mut dyn FnMut(&MoveToken) -> Result<()>,
    ) -> Result<()> {
        self.back_end.local_send(table, random, deliver)
    }

    /// Takes the token of a staged guest back; the guest runs on here.
    ///
    /// # Errors
    /// Those of [`Backend::local_cancel`].
    pub fn local_cancel(&mut self) -> Result<()> {
        self.back_end.local_cancel()
    }

    /// Trades a token for its guest, which goes on here as after [`move_to`](Self::move_to). The slots
    /// stay those of this VM. `deliver` gets the guest's name in firmware.
    ///
    /// # Errors
    /// Those of [`Backend::local_receive`]; nothing has happened.
    pub fn local_receive(
        &mut self,
        table: &StagingTable,
        token: &MoveToken,
        deliver: &mut dyn FnMut(GuestName) -> Result<()>,
    ) -> Result<GuestName> {
        self.back_end.local_receive(table, token, deliver)
    }

    /// Makes `mirror` a mirror of this VM: both use the encryption context of this VM
    /// (KVM_CAP_VM_COPY_ENC_CONTEXT_FROM), which lives as long as either of them.
    ///
    /// # Errors
    /// As [`move_to`](Self::move_to); [`Error::Invalid`] also if this VM is itself a mirror, or the
    /// mirror has vCPUs.
    pub fn copy_to(&mut self, mirror: &mut Self) -> Result<()> {
        self.check_pair(mirror)?;
        B::copy_context(&mut self.back_end, &mut mirror.back_end)?;
        tracing::debug!(
            owner = self.id().0,
            mirror = mirror.id().0,
            "context copied"
        );
        Ok(())
    }

    fn check_pair(&self, other: &Self) -> Result<()> {
        if !self.tech().is_confidential() {
            return Err(Error::Invalid(Field::Vm, self.id().0));
        }
        if other.tech() != self.tech() {
            return Err(Error::Invalid(Field::Vm, other.id().0));
        }
        Ok(())
    }

    /// Sets this VM's slots in the other one too, all or none.
    fn lend_slots(&self, to: &mut Self) -> Result<()> {
        for slot in self.slots.values() {
            if let Err(error) = to.back_end().set_memory_slot(slot) {
                to.give_up_slots();
                return Err(error);
            }
            to.slots.insert(slot.id, *slot);
        }
        Ok(())
    }

    fn give_up_slots(&mut self) {
        let back_end = &self.back_end;
        // A slot that the host keeps stays listed, as any other.
        self.slots
            .retain(|_, slot| back_end.delete_memory_slot(slot).is_err());
    }

    /// Tears the VM down: key, private pages, then the VM itself.
    ///
    /// The report lists all that could not be freed. If the key could not be released that is
    /// everything, because firmware owns it.
    ///
    /// ```
    /// use kvm_ops::sim::SimHost;
    /// use kvm_ops::{Kind, Tech, Vendor, VmConfig, create};
    ///
    /// let host = SimHost::new(Vendor::Intel);
    /// let td = create(&host, &VmConfig::new(Kind::Of(Tech::Tdx)))?;
    /// let report = td.destroy();
    /// assert!(report.is_clean(), "{:?}", report.leaks);
    /// assert_eq!((report.keys_freed, host.live_vms()), (1, 0));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    pub fn destroy(self) -> FreeReport {
        tear_down(self.into_back_end())
    }
}

fn tear_down<B: Backend>(mut back_end: B) -> FreeReport {
    let (vm, tech) = (back_end.id().0, back_end.tech());
    let drained = release_key(&mut back_end)
        .and_then(|key| back_end.drain_private(key).map_err(|(error, _key)| error));
    let report = match drained {
        Ok(drained) => back_end.vm_free(drained),
        Err(error) => {
            tracing::error!(vm, %tech, %error, "the VM's key could not be released");
            back_end.vm_abandon(error)
        }
    };
    tracing::debug!(vm, %tech, leaks = report.leaks.len(), "torn down");
    report
}

/// The number of times that a busy key is asked for. Each try waits for what is in its way, as the back
/// end does, so this is no short time.
const RELEASE_TRIES: u32 = 16;

/// Releases the key, patiently, because giving up leaks the whole VM.
fn release_key<B: Backend>(back_end: &mut B) -> Result<KeyReleased> {
    let mut tries = 1;
    loop {
        match back_end.mmu_release_hkid() {
            Err(error) if error.is_transient() && tries < RELEASE_TRIES => tries += 1,
            done => return done,
        }
    }
}

impl<B: Backend> Drop for Vm<B> {
    fn drop(&mut self) {
        // SAFETY: the value ends with this call; `destroy` and `into_back_end` never let it come here.
        let back_end = unsafe { ManuallyDrop::take(&mut self.back_end) };
        let report = tear_down(back_end);
        for leak in &report.leaks {
            tracing::error!(vm = report.vm.0, %leak, "leaked by drop");
        }
    }
}

impl<B: Backend> fmt::Debug for Vm<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("id", &self.id())
            .field("tech", &self.tech())
            .field("step", &self.step())
            .field("slots", &self.slots)
            .finish()
    }
}
