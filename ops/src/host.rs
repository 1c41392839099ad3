//! Ports: what a back end needs from the machine below it.
//!
//! A [`Host`] is the real machine (`KvmHost`), a software platform (`SimHost`), or an embedder's
//! own. It hands out a [`VmPort`] for each normal VM and, where the machine has them, the SEAMCALL
//! instruction and the AMD SP mailbox. A capability that a host lacks is a `None`, never a panic.

use alloc::boxed::Box;
use alloc::sync::Arc;

use crate::guest::GuestProgram;
use crate::{
    Asid, AsidPools, CpuId, FieldCache, Gfn, Gpa, Hkid, Hpa, KeyPool, Level, MemSlot, PackageId,
    Pfn, Result, SharedMask, Tech, VcpuId, VcpuOps, Vendor, VmId, VmParams,
};

/// A machine that can hold VMs. Cheap to clone: a handle.
pub trait Host: Clone + Send + Sync + 'static {
    /// A normal VM of this machine.
    type Vm: VmPort;
    /// How it issues SEAMCALLs; [`NoPort`] where it never can.
    type Seam: SeamPort;
    /// How it talks to the AMD SP; [`NoPort`] where it never can.
    type Psp: PspPort;
    /// Where it takes pages for firmware and private memory from; [`NoPort`] where it has no
    /// technology that needs them.
    type Pages: PagePort;

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

    /// The physical memory that confidential VMs are made of, where this machine has such.
    fn pages(&self) -> Option<&Self::Pages> {
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

    /// Gives a guest program to the TD vCPU whose TDVPR page is `tdvpr`: only TDH.VP.ENTER runs it
    /// then. `mask` is the TD's; accesses with the shared bit go to this VM's slots.
    ///
    /// # Errors
    /// Unsupported on a real processor, which runs what is in memory.
    fn load_td_program(
        &self,
        vcpu: VcpuId,
        tdvpr: Hpa,
        mask: SharedMask,
        program: Box<dyn GuestProgram>,
    ) -> Result<()> {
        let _ = (vcpu, tdvpr, mask, program);
        crate::unsupported!("load_td_program")
    }

    /// Takes frames out of what the accesses of a confidential VM reach as shared memory, or puts
    /// them back. All frames are shared at first. An access to one that is not leaves the guest as
    /// a violation of a shared address, even where a slot is. When it returns, no vCPU uses the old
    /// state.
    ///
    /// # Errors
    /// What the system answers. A machine whose shared tables the caller does not govern has
    /// nothing to do.
    fn set_shared(&self, first: Gfn, pages: u64, shared: bool) -> Result<()> {
        let _ = (first, pages, shared);
        Ok(())
    }

    /// Binds the VM to an ASID (the ASID field of its VMCBs): from the next entry on, accesses with
    /// the C-bit go through that ASID's key. `None` takes the binding back.
    ///
    /// # Errors
    /// Unsupported where the machine has no memory encryption of this kind.
    fn bind_asid(&self, asid: Option<Asid>, mask: SharedMask) -> Result<()> {
        let _ = (asid, mask);
        crate::unsupported!("bind_asid")
    }

    /// Maps guest frames to a page of [`PagePort`] memory in the nested page tables of a
    /// confidential AMD guest, or unmaps what maps them. `gfn` and `page` are aligned to `level`.
    /// When it returns, no vCPU uses the old mapping.
    ///
    /// # Errors
    /// Unsupported where the machine has no memory encryption of this kind;
    /// [`Error::Invalid`](crate::Error::Invalid) for a level that it cannot map.
    fn map_encrypted(&self, gfn: Gfn, level: Level, page: Option<Pfn>) -> Result<()> {
        let _ = (gfn, level, page);
        crate::unsupported!("map_encrypted")
    }

    /// Sends the nested page faults of a confidential AMD guest to its back end. Before the first
    /// vCPU runs; `None` takes it back.
    ///
    /// # Errors
    /// Unsupported where the machine has no memory encryption of this kind.
    fn handle_nested_faults(&self, handler: Option<Arc<dyn NestedFaults>>) -> Result<()> {
        let _ = handler;
        crate::unsupported!("handle_nested_faults")
    }

    /// Reads what a slot lends at this guest-physical address, as the host sees it.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound) where the range is not all in slots; unsupported
    /// where the host's memory is not the port's to read.
    fn read_slot(&self, gpa: Gpa, data: &mut [u8]) -> Result<()> {
        let _ = (gpa, data);
        crate::unsupported!("read_slot")
    }

    /// Writes what a slot lends at this guest-physical address, as the host does.
    ///
    /// # Errors
    /// As [`read_slot`](Self::read_slot); [`Error::NotFound`](crate::Error::NotFound) for a
    /// read-only slot too.
    fn write_slot(&self, gpa: Gpa, data: &[u8]) -> Result<()> {
        let _ = (gpa, data);
        crate::unsupported!("write_slot")
    }

    /// Gives the VM back. All its vCPUs are gone, or go on holding it until they are.
    ///
    /// # Errors
    /// Where the system refuses; the VM is leaked then.
    fn close(self) -> Result<()>;
}

/// What a nested page fault of a confidential AMD guest comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedFaultAnswer {
    /// The access can be done again.
    Retry,
    /// It leaves as [`Exit::MemoryFault`](crate::Exit::MemoryFault).
    Leave,
    /// The run of the vCPU fails with this; the access is done again in the next one.
    Fail(crate::Error),
}

/// The back end's side of nested page faults. Called on the thread that runs the vCPU, with no lock
/// of the port held.
pub trait NestedFaults: Send + Sync {
    /// The guest touched a frame with the C-bit that is not mapped, or that the RMP keeps from it.
    fn private_fault(&self, gfn: Gfn) -> NestedFaultAnswer;

    /// The RMP holds a 2 MiB page where the guest or its mapping means 4 KiB (#NPF with SIZEM).
    fn size_mismatch(&self, gfn: Gfn) -> NestedFaultAnswer;
}

/// Registers of a SEAMCALL besides RAX, in and out.
#[allow(missing_docs)] // Each is the register of its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeamRegs {
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsi: u64,
    pub rdi: u64,
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
///
/// The port knows about processors, because the module does: keys are configured and caches
/// written back once for each package, and a vCPU is flushed on the processor that it last ran on.
pub trait SeamPort: Send + Sync {
    /// Issues one SEAMCALL on the processor `cpu` and returns RAX, the status word. From another
    /// processor the call travels there (`smp_call_function_single`).
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) if the caller cannot get onto `cpu`; nothing was
    /// called then.
    fn seamcall(&self, cpu: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64>;

    /// The package of an online processor, `None` if it is offline or does not exist.
    fn package_of(&self, cpu: CpuId) -> Option<PackageId>;

    /// How many processors there are, online or not; their numbers are below this.
    fn cpus(&self) -> u32;

    /// How many packages are present, online processors or not.
    fn packages(&self) -> u32;

    /// The processor that the caller runs on, or is to issue its SEAMCALLs on. Online.
    fn this_cpu(&self) -> CpuId;

    /// Makes the processor leave the TD that it is in, if any (an IPI). Does not wait.
    fn kick(&self, cpu: CpuId);

    /// Called in every turn of a loop that waits for another processor.
    fn relax(&self) {
        core::hint::spin_loop();
    }

    /// Called in every turn of a loop that waits for an event from outside, as a halted vCPU does.
    /// May sleep for a moment.
    fn idle(&self) {
        self.relax();
    }

    /// What the module's read-only fields hold, for all TDs of the machine: each is read by
    /// TDH.SYS.RD once. A module that is replaced comes with a new port.
    fn fields(&self) -> &FieldCache;

    /// The private KeyIDs of the machine: one pool for all TDs, however many handles the port has.
    fn key_ids(&self) -> &KeyPool;

    /// The address of `page` with a KeyID in its upper bits, as TDH.PHYMEM.PAGE.WBINVD takes it to
    /// tell whose cache lines are meant. Where the KeyID stands the machine knows
    /// (IA32_MKTME_KEYID_PARTITIONING, MAXPHYADDR). `None` is the module's own KeyID, the global
    /// one that TDH.SYS.CONFIG was given.
    fn with_key_id(&self, page: Hpa, key: Option<Hkid>) -> Hpa;
}

/// The mailbox of the AMD secure processor, and the instructions that go with it.
pub trait PspPort: Send + Sync {
    /// Issues one command with its buffer and returns the firmware's status, 0 for success.
    ///
    /// # Errors
    /// Where the mailbox itself does not answer.
    fn command(&self, id: u32, buffer: &mut [u8]) -> Result<u32>;

    /// WBINVD on every processor.
    fn wbinvd_all(&self);

    /// RMPUPDATE of the page at `page`: `entry` is the 16-byte source operand of the instruction
    /// (APM vol. 3). Returns EAX, 0 for success.
    ///
    /// # Errors
    /// Unsupported without SNP.
    fn rmpupdate(&self, page: Hpa, entry: &[u8; 16]) -> Result<u32> {
        let _ = (page, entry);
        crate::unsupported!("rmpupdate")
    }

    /// PSMASH of the 2 MiB page at `page`. Returns EAX, 0 for success.
    ///
    /// # Errors
    /// Unsupported without SNP.
    fn psmash(&self, page: Hpa) -> Result<u32> {
        let _ = page;
        crate::unsupported!("psmash")
    }

    /// RMPREAD of the page at `page`: the entry in the layout that [`rmpupdate`](Self::rmpupdate)
    /// takes.
    ///
    /// # Errors
    /// Unsupported without SNP; [`Error::Invalid`](crate::Error::Invalid) for an address that has
    /// no entry.
    fn rmpread(&self, page: Hpa) -> Result<[u8; 16]> {
        let _ = page;
        crate::unsupported!("rmpread")
    }

    /// Called in every turn of a loop that waits for another processor.
    fn relax(&self) {
        core::hint::spin_loop();
    }

    /// The ASIDs of the machine: one value for all guests, however many handles the port has.
    fn asid_pools(&self) -> &AsidPools;

    /// The bit of a guest-physical address that is the C-bit (CPUID 8000_001F EBX\[5:0\]).
    fn c_bit(&self) -> u32;

    /// How many ASIDs there are, and the first that is for plain SEV (CPUID 8000_001F ECX, EDX).
    /// ASIDs are 1 to the first; those below the second are for SEV-ES and SNP.
    fn asids(&self) -> (u32, u32);
}

/// Physical memory that the host may give to firmware and to guests.
///
/// A page that is never given back is one that firmware still owns.
pub trait PagePort: Send + Sync {
    /// Takes a naturally aligned page of 4 KiB or 2 MiB out of the host's use.
    ///
    /// # Errors
    /// [`Error::NoMemory`](crate::Error::NoMemory), or
    /// [`Error::Invalid`](crate::Error::Invalid) for another level.
    fn alloc(&self, level: Level) -> Result<Pfn>;

    /// Gives a page back. Firmware and guests hold no part of it any more.
    fn free(&self, page: Pfn, level: Level);

    /// Writes as the host does, with no KeyID and no C-bit.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for an address beyond memory;
    /// [`Error::Busy`](crate::Error::Busy) where the processor refuses the host the page (an RMP
    /// fault).
    fn write(&self, at: Hpa, data: &[u8]) -> Result<()>;

    /// Reads as the host does: private memory comes as ciphertext or poison.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()>;
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

    fn cpus(&self) -> u32 {
        match *self {}
    }

    fn packages(&self) -> u32 {
        match *self {}
    }

    fn this_cpu(&self) -> CpuId {
        match *self {}
    }

    fn kick(&self, _: CpuId) {
        match *self {}
    }

    fn fields(&self) -> &FieldCache {
        match *self {}
    }

    fn key_ids(&self) -> &KeyPool {
        match *self {}
    }

    fn with_key_id(&self, _: Hpa, _: Option<Hkid>) -> Hpa {
        match *self {}
    }
}

impl PspPort for NoPort {
    fn command(&self, _: u32, _: &mut [u8]) -> Result<u32> {
        match *self {}
    }

    fn wbinvd_all(&self) {
        match *self {}
    }

    fn asid_pools(&self) -> &AsidPools {
        match *self {}
    }

    fn c_bit(&self) -> u32 {
        match *self {}
    }

    fn asids(&self) -> (u32, u32) {
        match *self {}
    }
}

impl PagePort for NoPort {
    fn alloc(&self, _: Level) -> Result<Pfn> {
        match *self {}
    }

    fn free(&self, _: Pfn, _: Level) {
        match *self {}
    }

    fn write(&self, _: Hpa, _: &[u8]) -> Result<()> {
        match *self {}
    }

    fn read(&self, _: Hpa, _: &mut [u8]) -> Result<()> {
        match *self {}
    }
}
