//! A VM of the kernel.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_SET_IDENTITY_MAP_ADDR,
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CAP_XSAVE2,
    KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN, kvm_create_guest_memfd, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, VmFd};
use kvm_ops::{
    Call, DevicePort, EncRegion, Error, Field, Gpa, HeldPort, Irqchip, MemSlot, Missing, PAGE_SIZE,
    Result, Tech, VcpuId, VmParams, VmPort,
};

use crate::devices::Routes;
use crate::error::{from_errno, host_lacks, sys};
use crate::events::EventParts;
use crate::held::{Held, moves};
use crate::slots::Slots;
use crate::sys::XSAVE_BYTES;
use crate::{KvmHost, KvmVcpu, irq};

/// Pins of the IOAPIC that an embedder of [`Irqchip::Split`] has; KVM reserves that many routes.
pub(crate) const IOAPIC_PINS: u64 = 24;
/// The first APIC id that needs the 32-bit format in interrupt messages: 255 is broadcast.
const WIDE_APIC_ID: u32 = 255;

/// A VM in the kernel.
///
/// The kernel frees a VM when its last descriptor closes, and each vCPU holds one. The memory is
/// released earlier: [`close`](VmPort::close), and dropping this value, deletes every slot and
/// ends all runs. A vCPU that is left answers [`Error::WrongState`] from then on.
pub struct KvmVm {
    inner: Arc<VmInner>,
}

/// The part of a VM that its vCPUs hold too.
pub(crate) struct VmInner {
    pub(crate) host: KvmHost,
    pub(crate) fd: VmFd,
    pub(crate) params: VmParams,
    tech: Tech,
    /// The state of a confidential VM that the kernel holds.
    held: Option<Held>,
    /// A descriptor of the first vCPU, for calls on any vCPU.
    first_vcpu: OnceLock<OwnedFd>,
    /// The optional parts of `struct kvm_vcpu_events` that are switched on.
    pub(crate) event_parts: EventParts,
    xsave_bytes: OnceLock<usize>,
    slots: Slots,
    pub(crate) routes: Routes,
    /// Set when the VM is closed: no vCPU enters the guest afterwards, even if the kernel refused
    /// to delete a slot.
    closed: AtomicBool,
    /// The vCPUs that were created. The kernel keeps each until the VM ends, so none is cleared.
    created: Box<[AtomicBool]>,
}

impl KvmVm {
    pub(crate) fn new(host: KvmHost, fd: VmFd, tech: Tech, params: &VmParams) -> Result<Self> {
        let held = Held::new(&host, tech, params)?;
        let mut params = params.clone();
        if tech == Tech::Tdx && params.irqchip == Irqchip::None {
            // A TD has no vCPUs without local APICs in the kernel. Lines and messages of an IOAPIC have no embedder then.
            params.irqchip = Irqchip::Split;
        }
        let params = &params;
        disable_quirks(&fd)?;
        create_irqchip(&fd, params)?;
        let event_parts = EventParts {
            payload: enable_offered(&host, &fd, KVM_CAP_EXCEPTION_PAYLOAD)?,
            triple_fault: enable_offered(&host, &fd, KVM_CAP_X86_TRIPLE_FAULT_EVENT)?,
        };
        tracing::debug!(vcpus = params.vcpus, irqchip = ?params.irqchip, ?event_parts, "VM created");
        Ok(Self {
            inner: Arc::new(VmInner {
                host,
                fd,
                params: params.clone(),
                tech,
                held,
                first_vcpu: OnceLock::new(),
                slots: Slots::default(),
                routes: Routes::default(),
                event_parts,
                xsave_bytes: OnceLock::new(),
                closed: AtomicBool::new(false),
                created: (0..params.vcpus).map(|_| AtomicBool::new(false)).collect(),
            }),
        })
    }

    /// The VM's file descriptor, for ioctls that this type does not wrap.
    ///
    /// Slots that are set through it are unknown to this type, which does not delete them.
    pub fn fd(&self) -> &VmFd {
        &self.inner.fd
    }

    /// The parameters that the VM was created with.
    pub fn params(&self) -> &VmParams {
        &self.inner.params
    }

    pub(crate) fn inner(&self) -> &Arc<VmInner> {
        &self.inner
    }

    /// True if the vCPU was created, even if its handle is gone.
    pub(crate) fn has_vcpu(&self, id: VcpuId) -> bool {
        let created = self.inner.created.get(id.0 as usize);
        created.is_some_and(|created| created.load(Ordering::Acquire))
    }

    /// The state of a confidential VM.
    pub(crate) fn held_state(&self) -> Result<&Held> {
        let missing = Error::unsupported(Missing::HostTech, self.inner.tech);
        self.inner.held.as_ref().ok_or(missing)
    }

    pub(crate) fn slots(&self) -> &Slots {
        &self.inner.slots
    }

    /// The first vCPU, as soon as there is one.
    pub(crate) fn first_vcpu(&self) -> Option<&OwnedFd> {
        self.inner.first_vcpu.get()
    }

    /// Keeps a descriptor of the first vCPU of a confidential VM.
    fn note_vcpu(&self, vcpu: &KvmVcpu) -> Result<()> {
        if self.first_vcpu().is_some() {
            return Ok(());
        }
        // SAFETY: the vCPU's descriptor is open as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.fd().as_raw_fd()) };
        let fd = fd
            .try_clone_to_owned()
            .map_err(|error| from_errno(Call::CreateVcpu, error.raw_os_error().unwrap_or(0)))?;
        // If another vCPU was faster, that one serves as well.
        let _ = self.inner.first_vcpu.set(fd);
        Ok(())
    }

    /// Sets a slot whose memory is encrypted in place, and declares its memory.
    fn set_pinned_slot(&self, slot: &MemSlot) -> Result<()> {
        let is_new = self.slots().get(slot.id).is_none();
        self.slots().set(self.fd(), slot)?;
        if !is_new {
            return Ok(());
        }
        let registered = self.register_region(region_of(slot));
        registered.map_err(|failure| {
            // A slot that may be moved in memory is not fit for the guest. `close` deletes what is left.
            let _ = self.slots().delete(self.fd(), slot);
            failure.error
        })
    }

    fn delete_pinned_slot(&self, slot: &MemSlot) -> Result<()> {
        self.slots().delete(self.fd(), slot)?;
        if let Err(failure) = self.unregister_region(region_of(slot)) {
            // The memory stays pinned until the VM ends.
            tracing::warn!(slot = slot.id.0, error = %failure.error, "memory not unpinned");
        }
        Ok(())
    }

    /// The host of the VM.
    pub fn host(&self) -> &KvmHost {
        &self.inner.host
    }

    /// Creates memory that only guests can reach through slots with a
    /// [`PrivateBacking`](kvm_ops::PrivateBacking) (`KVM_CREATE_GUEST_MEMFD`). The file lives as
    /// long as its descriptor or a slot that uses it; it works with this VM only.
    ///
    /// `flags` is 0, or `GUEST_MEMFD_FLAG_*` of the kernel's header.
    ///
    /// # Errors
    /// [`Error::HostLacks`]; [`Error::Invalid`] for a size that is 0 or not whole pages; the answer
    /// of the kernel.
    pub fn create_guest_memfd(&self, bytes: u64, flags: u64) -> Result<OwnedFd> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Invalid(Field::Size, bytes));
        }
        if !self.fd().check_extension(Cap::GuestMemfd) {
            return host_lacks!("KVM_CAP_GUEST_MEMFD");
        }
        let request = kvm_create_guest_memfd {
            size: bytes,
            flags,
            reserved: [0; 6],
        };
        let fd = self
            .fd()
            .create_guest_memfd(request)
            .map_err(sys(Call::CreateGuestMemfd))?;
        // SAFETY: the kernel has just made the descriptor, so nothing else owns it.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // The kernel does so for VMs and vCPUs but not for this; a child process must not get it.
        // SAFETY: sets a flag of a descriptor that is open.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            let errno = std::io::Error::last_os_error().raw_os_error();
            return Err(from_errno(Call::CreateGuestMemfd, errno.unwrap_or(0)));
        }
        Ok(file)
    }
}

/// KVM rewrites the "wrong" one of VMCALL and VMMCALL in guest memory. Guest code that the host
/// changes cannot be measured. Without the quirk the wrong one is a #UD; guests choose by CPUID.
fn disable_quirks(fd: &VmFd) -> Result<()> {
    let offered = fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    let quirk = KVM_X86_QUIRK_FIX_HYPERCALL_INSN;
    if offered <= 0 || offered as u32 & quirk == 0 {
        return Ok(());
    }
    enable(fd, KVM_CAP_DISABLE_QUIRKS2, quirk.into())
}

/// Switches a capability on if the host offers it. Returns whether it did.
fn enable_offered(host: &KvmHost, fd: &VmFd, cap: u32) -> Result<bool> {
    if host.check(cap) == 0 {
        return Ok(false);
    }
    enable(fd, cap, 1).map(|()| true)
}

fn create_irqchip(fd: &VmFd, params: &VmParams) -> Result<()> {
    match params.irqchip {
        Irqchip::None => return Ok(()),
        Irqchip::Full => {
            if !fd.check_extension(Cap::Irqchip) {
                return host_lacks!("KVM_CAP_IRQCHIP");
            }
            if !fd.check_extension(Cap::Pit2) {
                return host_lacks!("KVM_CAP_PIT2");
            }
            fd.create_irq_chip().map_err(sys(Call::CreateIrqchip))?;
            // With the speaker's port 0x61 in the kernel too: firmware times itself by its bit 5.
            let pit = kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            };
            fd.create_pit2(pit).map_err(sys(Call::CreatePit))?;
        }
        Irqchip::Split => {
            if !fd.check_extension(Cap::SplitIrqchip) {
                return host_lacks!("KVM_CAP_SPLIT_IRQCHIP");
            }
            enable(fd, KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS)?;
        }
    }
    if params.vcpus > WIDE_APIC_ID {
        if fd.check_extension_raw(KVM_CAP_X2APIC_API.into()) <= 0 {
            return host_lacks!("KVM_CAP_X2APIC_API, for more than 255 vCPUs");
        }
        let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(fd, KVM_CAP_X2APIC_API, flags.into())?;
    }
    Ok(())
}

fn region_of(slot: &MemSlot) -> EncRegion {
    EncRegion {
        address: slot.host.address(),
        bytes: slot.bytes(),
    }
}

pub(crate) fn enable(fd: &VmFd, cap: u32, arg: u64) -> Result<()> {
    let request = kvm_enable_cap {
        cap,
        args: [arg, 0, 0, 0],
        ..Default::default()
    };
    fd.enable_cap(&request).map_err(sys(Call::EnableCap))
}

impl VmPort for KvmVm {
    type Vcpu = KvmVcpu;

    /// The vCPU starts in the state after power-on, with the CPUID that the host supports.
    fn create_vcpu(&self, id: VcpuId) -> Result<KvmVcpu> {
        let Some(created) = self.inner.created.get(id.0 as usize) else {
            return Err(Error::Invalid(Field::Vcpu, id.0.into()));
        };
        let vcpu = KvmVcpu::new(self.inner.clone(), id)?;
        created.store(true, Ordering::Release);
        if let Some(held) = &self.inner.held {
            held.vcpu_created(&vcpu)?;
            self.note_vcpu(&vcpu)?;
        }
        Ok(vcpu)
    }

    /// # Errors
    /// [`Error::Invalid`] with [`Field::OverlappedSlot`] names the slot in the way;
    /// [`Error::Exists`] where the number is taken by a slot of another place or memory;
    /// [`Error::HostLacks`] for read-only or private memory that the host does not offer.
    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        tracing::debug!(slot = slot.id.0, gpa = %slot.gpa, bytes = slot.bytes(), "slot set");
        match &self.inner.held {
            Some(held) if held.has_private_memory() => held.files.set(self, slot, held.begins()),
            Some(held) if held.pins() => self.set_pinned_slot(slot),
            _ => self.slots().set(self.fd(), slot),
        }
    }

    /// # Errors
    /// [`Error::NotFound`] unless this very slot was set: number, place and memory.
    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        tracing::debug!(slot = slot.id.0, gpa = %slot.gpa, "slot deleted");
        match &self.inner.held {
            Some(held) if held.has_private_memory() => held.files.delete(self, slot),
            Some(held) if held.pins() => self.delete_pinned_slot(slot),
            _ => self.slots().delete(self.fd(), slot),
        }
    }

    /// # Errors
    /// As in the trait, and [`Error::NotFound`] for a slot that was not set here.
    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        match &self.inner.held {
            Some(held) => {
                let backed = held.files.backed(slot);
                self.slots().dirty_log(self.fd(), &backed, bitmap)
            }
            None => self.slots().dirty_log(self.fd(), slot, bitmap),
        }
    }

    /// `KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM`. The slots of this VM lie in memory of slots of `from`.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for another guest than one of SEV, SEV-ES or SNP; [`Error::Invalid`] names a slot with other
    /// memory; [`Error::Busy`] while another move, or a command, involves one of the two; the answer of the kernel.
    fn take_guest(&self, from: &Self) -> Result<()> {
        moves::take(self, from)
    }

    /// `KVM_CAP_VM_COPY_ENC_CONTEXT_FROM`. The memory of both stays pinned by `owner`.
    ///
    /// # Errors
    /// As [`take_guest`](Self::take_guest), but for the slots; [`Error::WrongState`] for an owner whose launch has not
    /// begun.
    fn share_guest(&self, owner: &Self) -> Result<()> {
        moves::share(self, owner)
    }

    fn held(&self) -> Option<&dyn HeldPort> {
        self.inner.held.as_ref().map(|_| self as &dyn HeldPort)
    }

    /// The kernel accepts the address even if it does not need the pages ("unrestricted guest", AMD),
    /// so a failure always matters.
    fn set_tss_addr(&self, gpa: Gpa) -> Result<()> {
        if !self.fd().check_extension(Cap::SetTssAddr) {
            return host_lacks!("KVM_CAP_SET_TSS_ADDR");
        }
        let address =
            usize::try_from(gpa.get()).map_err(|_| Error::Invalid(Field::Gpa, gpa.get()))?;
        self.fd()
            .set_tss_address(address)
            .map_err(sys(Call::SetTssAddr))
    }

    /// As for the TSS, a failure always matters.
    fn set_identity_map_addr(&self, gpa: Gpa) -> Result<()> {
        if self.inner.host.check(KVM_CAP_SET_IDENTITY_MAP_ADDR) == 0 {
            return host_lacks!("KVM_CAP_SET_IDENTITY_MAP_ADDR");
        }
        self.fd()
            .set_identity_map_address(gpa.get())
            .map_err(sys(Call::SetIdentityMapAddr))
    }

    /// True if `KVM_GET_MSR_INDEX_LIST` names it. The list holds MSRs that KVM emulates and MSRs of the
    /// processor that it keeps, without a distinction.
    fn has_emulated_msr(&self, index: u32) -> bool {
        self.inner.host.msrs().binary_search(&index).is_ok()
    }

    /// An interrupt message to the vCPU's APIC id, edge-triggered and fixed. An APIC that the
    /// guest has not enabled drops it, as hardware does.
    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        irq::deliver(self, vcpu, vector)
    }

    fn devices(&self) -> Option<&dyn DevicePort> {
        Some(self)
    }

    /// # Errors
    /// The kernel's answer if it keeps a slot. The memory of that slot must then stay mapped as
    /// long as a vCPU is left: one that was inside the guest may still use it.
    fn close(self) -> Result<()> {
        tracing::debug!("VM closed");
        self.inner.close()
        // Linux reports no error from closing the descriptor itself.
    }
}

impl VmInner {
    /// The length of an XSAVE area of a vCPU. It is fixed when the first vCPU of the process
    /// exists, so this may only be asked with one.
    pub(crate) fn xsave_bytes(&self) -> usize {
        *self.xsave_bytes.get_or_init(|| {
            let answer = self.fd.check_extension_raw(KVM_CAP_XSAVE2.into());
            usize::try_from(answer).unwrap_or(0).max(XSAVE_BYTES)
        })
    }

    /// True once the VM is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        self.slots.delete_all(&self.fd)
    }
}

impl Drop for KvmVm {
    fn drop(&mut self) {
        // The kernel's VM may live on, by a descriptor of it that `fd` gave away. `delete_all` logs
        // the slots that the kernel keeps; after `close` it has nothing to do.
        let _ = self.inner.close();
    }
}

impl fmt::Debug for KvmVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVm")
            .field("fd", &self.inner.fd)
            .field("params", &self.inner.params)
            .finish_non_exhaustive()
    }
}
