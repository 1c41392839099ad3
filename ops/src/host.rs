//! Ports: what a back end needs from the machine below it.
//!
//! A [`Host`] is the real machine (`KvmHost`), a software platform (`SimHost`), or an embedder's
//! own. It hands out a [`VmPort`] for each normal VM and, where the machine has them, the SEAMCALL
//! instruction and the AMD SP mailbox. A capability that a host lacks is a `None`, never a panic.

use crate::{
    CpuId, Gpa, MemSlot, PackageId, Result, Tech, VcpuId, VcpuOps, Vendor, VmId, VmParams,
};

/// A machine that can hold VMs. Cheap to clone: a handle.
pub trait Host: Clone + Send + Sync + 'static {
    /// A normal VM of this machine.
    type Vm: VmPort;
    /// How it issues SEAMCALLs; [`NoPort`] where it never can.
    type Seam: SeamPort;
    /// How it talks to the AMD SP; [`NoPort`] where it never can.
    type Psp: PspPort;

    /// A short name for reports: `kvm`, `sim`, ...
    fn name(&self) -> &'static str;

    /// Whose processors it has, and so which technologies it can offer.
    fn vendor(&self) -> Vendor;

    /// A number for the next VM, which no other VM of this host has.
    fn next_vm_id(&self) -> VmId;

    /// Creates an empty VM for a back end of `tech`.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) where the host lacks what `params` or
    /// `tech` ask for; what the system answers otherwise.
    fn create_vm(&self, tech: Tech, params: &VmParams) -> Result<Self::Vm>;

    /// The SEAMCALL port, where this machine has a TDX module.
    fn seam(&self) -> Option<&Self::Seam> {
        None
    }

    /// The AMD SP port, where this machine has one.
    fn psp(&self) -> Option<&Self::Psp> {
        None
    }
}

/// A VM of the machine below: memory slots and vCPUs, without any technology's rules.
pub trait VmPort: Send + Sync + 'static {
    /// Its vCPU, which answers every vCPU operation as the processor does.
    type Vcpu: VcpuOps + 'static;

    /// Creates a vCPU.
    ///
    /// # Errors
    /// [`Error::Exists`](crate::Error::Exists) if it exists,
    /// [`Error::Invalid`](crate::Error::Invalid) if the number is not below
    /// [`VmParams::vcpus`], or what the system answers.
    fn create_vcpu(&self, id: VcpuId) -> Result<Self::Vcpu>;

    /// Creates a slot, or changes the flags of the slot of that number. The memory is lent until
    /// the slot is deleted or the VM closed, and to this VM only.
    ///
    /// # Errors
    /// What the system answers. Overlaps are checked by the caller.
    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()>;

    /// Deletes a slot. When it returns, no vCPU sees the memory any more.
    ///
    /// # Errors
    /// What the system answers.
    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()>;

    /// Fetches and clears the dirty bitmap of a slot, bit 0 of word 0 for its first page.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a bitmap of the wrong length,
    /// [`Error::NotFound`](crate::Error::NotFound) for a slot without a dirty log.
    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()>;

    /// Reserves three pages that VMX needs to run real mode without "unrestricted guest"
    /// (`KVM_SET_TSS_ADDR`).
    ///
    /// # Errors
    /// What the system answers.
    fn set_tss_addr(&self, gpa: Gpa) -> Result<()>;

    /// Reserves one page for the identity map that VMX needs likewise
    /// (`KVM_SET_IDENTITY_MAP_ADDR`). Only before the first vCPU.
    ///
    /// # Errors
    /// What the system answers.
    fn set_identity_map_addr(&self, gpa: Gpa) -> Result<()>;

    /// Whether the machine below emulates that MSR for guests.
    fn has_emulated_msr(&self, index: u32) -> bool;

    /// Sends an interrupt to a vCPU's local APIC in the platform, from any thread.
    ///
    /// # Errors
    /// What the system answers.
    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()>;

    /// Gives the VM back. All its vCPUs are gone, or go on holding it until they are.
    ///
    /// # Errors
    /// Where the system refuses; the VM is leaked then.
    fn close(self) -> Result<()>;
}

/// Registers of a SEAMCALL besides RAX, in and out.
#[allow(missing_docs)] // Each is the register of its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeamRegs {
    pub rcx: u64,
    pub rdx: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

/// The SEAMCALL instruction, on a machine whose TDX module is loaded.
pub trait SeamPort: Send + Sync {
    /// Issues one SEAMCALL on the processor `cpu` and returns RAX, the status word.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) if the caller cannot get onto `cpu`.
    fn seamcall(&self, cpu: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64>;

    /// The package of an online processor, `None` if it is offline or does not exist.
    ///
    /// Keys are configured and caches written back once for each package.
    fn package_of(&self, cpu: CpuId) -> Option<PackageId>;

    /// How many packages are present, online processors or not.
    fn packages(&self) -> u32;
}

/// The mailbox of the AMD secure processor.
pub trait PspPort: Send + Sync {
    /// Issues one command with its buffer and returns the firmware's status, 0 for success.
    ///
    /// # Errors
    /// Where the mailbox itself does not answer.
    fn command(&self, id: u32, buffer: &mut [u8]) -> Result<u32>;
}

/// The port of a machine that has none: a type without values.
#[derive(Clone, Copy, Debug)]
pub enum NoPort {}

impl SeamPort for NoPort {
    fn seamcall(&self, _: CpuId, _: u64, _: &mut SeamRegs) -> Result<u64> {
        match *self {}
    }

    fn package_of(&self, _: CpuId) -> Option<PackageId> {
        match *self {}
    }

    fn packages(&self) -> u32 {
        match *self {}
    }
}

impl PspPort for NoPort {
    fn command(&self, _: u32, _: &mut [u8]) -> Result<u32> {
        match *self {}
    }
}
