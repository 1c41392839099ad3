//! One VM of the machine, and the capabilities that it may have.

use alloc::boxed::Box;
use alloc::sync::Arc;

use super::HeldPort;
use crate::guest::GuestProgram;
use crate::{
    Asid, DevicePort, Gfn, Gpa, Hpa, Level, MemSlot, Page, Result, SharedMask, TdVcpuState, VcpuId,
    VcpuOps,
};

/// A VM of the machine below: memory slots and vCPUs, without the rules of any technology.
///
/// A port that can hold confidential VMs offers their operations as capabilities:
/// [`td`](Self::td), [`sev`](Self::sev), or [`held`](Self::held) where the system holds them itself. So are
/// [`devices`](Self::devices).
pub trait VmPort: Send + Sync + 'static {
    /// The vCPU of the machine, which answers every vCPU operation as the processor does.
    type Vcpu: VcpuOps + 'static;

    /// Creates a vCPU.
    ///
    /// # Errors
    /// [`Error::Exists`](crate::Error::Exists) if it exists;
    /// [`Error::Invalid`](crate::Error::Invalid) if the number is not below
    /// [`VmParams::vcpus`](crate::VmParams::vcpus); the answer of the system.
    fn create_vcpu(&self, id: VcpuId) -> Result<Self::Vcpu>;

    /// Creates a slot, or changes the flags of the slot of that number, address and memory. The
    /// memory is lent until the slot is deleted or the VM closed, and to this VM only.
    ///
    /// # Errors
    /// [`Error::Exists`](crate::Error::Exists) if the number is taken by another slot; the answer of
    /// the system. The caller checks for overlaps.
    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()>;

    /// Deletes a slot. After the call no vCPU reaches the memory.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound) if the VM has no slot with that number, address
    /// and memory; the answer of the system.
    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()>;

    /// Fetches and clears the dirty bitmap of a slot. Bit 0 of word 0 is its first page.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a bitmap of the wrong length;
    /// [`Error::NotFound`](crate::Error::NotFound) for a slot without a dirty log.
    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()>;

    /// Reserves three pages that VMX needs to run real mode without "unrestricted guest"
    /// (`KVM_SET_TSS_ADDR`).
    ///
    /// # Errors
    /// The answer of the system.
    fn set_tss_addr(&self, gpa: Gpa) -> Result<()>;

    /// Reserves one page for the identity map that VMX needs likewise
    /// (`KVM_SET_IDENTITY_MAP_ADDR`). Only before the first vCPU.
    ///
    /// # Errors
    /// The answer of the system.
    fn set_identity_map_addr(&self, gpa: Gpa) -> Result<()>;

    /// True if the machine below emulates that MSR for guests.
    fn has_emulated_msr(&self, index: u32) -> bool;

    /// Sends an interrupt to a vCPU's local APIC in the platform, from any thread.
    ///
    /// # Errors
    /// The answer of the system.
    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()>;

    /// Takes over what the machine keeps of the guest of `from` beside its firmware, because the guest
    /// goes on in this VM: the frames that it shares ([`SharedMemory::set_shared`]), interrupts that
    /// wait, and, of a guest with encrypted registers, what the machine keeps of its vCPUs (the VMSAs
    /// in their VMCBs; guest programs). The vCPUs of the two VMs have the same numbers, and none of
    /// them runs. Slots stay where they are. All or nothing, and the cost does not depend on the
    /// guest's memory.
    ///
    /// # Errors
    /// [`Error::Busy`](crate::Error::Busy) while an exit of an encrypted vCPU waits for its answer;
    /// the answer of the system. Nothing changed.
    fn take_guest(&self, from: &Self) -> Result<()>
    where
        Self: Sized,
    {
        // A machine that keeps nothing of a guest has nothing to hand over.
        let _ = from;
        Ok(())
    }

    /// Lets this VM use the encryption context of `owner`'s guest, as its mirror. Only for a VM that
    /// [`HeldPort`] holds: other back ends share contexts themselves.
    ///
    /// # Errors
    /// [`Error::NotOffered`](crate::Error::NotOffered) without such VMs; the answer of the system. Nothing
    /// changed.
    fn share_guest(&self, owner: &Self) -> Result<()>
    where
        Self: Sized,
    {
        let _ = owner;
        crate::not_offered!("share_guest")
    }

    /// The operations for a confidential VM that the system below holds itself, if this is one.
    fn held(&self) -> Option<&dyn HeldPort> {
        None
    }

    /// The operations for a TD, if the machine can hold TDs.
    fn td(&self) -> Option<&dyn TdPort> {
        None
    }

    /// The operations for an SEV guest, if the machine can hold SEV guests.
    fn sev(&self) -> Option<&dyn SevPort> {
        None
    }

    /// The operations for devices, if the machine does them without an exit.
    fn devices(&self) -> Option<&dyn DevicePort> {
        None
    }

    /// Gives the VM back, with all its slots. A vCPU handle that is left cannot run any more and never
    /// reaches the memory of the slots.
    ///
    /// # Errors
    /// The answer of the system; the VM is leaked then.
    fn close(self) -> Result<()>;
}

/// The shared memory of a confidential VM: the part of its slots that it accesses without its key.
pub trait SharedMemory: Send + Sync {
    /// Adds frames to the shared memory, or removes them. All frames are shared at first. An access
    /// to a removed frame leaves the guest as a violation of a shared address, even where a slot is.
    /// After the call no vCPU uses the old state.
    ///
    /// # Errors
    /// The answer of the system. A machine whose shared tables the caller does not govern does
    /// nothing.
    fn set_shared(&self, first: Gfn, pages: u64, shared: bool) -> Result<()>;

    /// Reads the memory of slots as the host sees it.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound) if a part of the range is in no slot.
    fn read_slot(&self, gpa: Gpa, data: &mut [u8]) -> Result<()>;

    /// Writes the memory of slots as the host does.
    ///
    /// # Errors
    /// As [`read_slot`](Self::read_slot); [`Error::NotFound`](crate::Error::NotFound) for a
    /// read-only slot too.
    fn write_slot(&self, gpa: Gpa, data: &[u8]) -> Result<()>;
}

/// The operations of the machine for a TD.
pub trait TdPort: SharedMemory {
    /// Tells the machine below of a vCPU of the TD, whose TDVPR page is `tdvpr`, before TDH.VP.INIT. A real
    /// processor finds all that it needs in TDVPR; a software one looks here for the memory of the VM. It may be told
    /// of the same vCPU again.
    ///
    /// # Errors
    /// The answer of the system.
    fn td_vcpu_created(&self, vcpu: VcpuId, tdvpr: Hpa) -> Result<()> {
        let _ = (vcpu, tdvpr);
        Ok(())
    }

    /// Reads an MSR for a vCPU that asks its host (TDG.VP.VMCALL<Instruction.RDMSR>), if it is one of the local APIC
    /// that the machine emulates: IA32_APIC_BASE, IA32_TSC_DEADLINE, and the x2APIC registers. The guest has task
    /// priority, requests and interrupts in service in its virtual APIC page; reading these is refused. `None` leaves
    /// the MSR to the embedder.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a register that cannot be read: the guest gets #GP.
    fn td_read_msr(&self, vcpu: VcpuId, index: u32) -> Result<Option<u64>> {
        let _ = (vcpu, index);
        Ok(None)
    }

    /// Writes such an MSR. False leaves it to the embedder.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a register that cannot be written, or not with that value: the
    /// guest gets #GP.
    fn td_write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Result<bool> {
        let _ = (vcpu, index, value);
        Ok(false)
    }

    /// Lets a vCPU that halted wait for its local APIC, for a short while. `interrupts` says that it takes them. True
    /// if an event waits that ends the halt.
    fn td_wait(&self, vcpu: VcpuId, interrupts: bool) -> bool {
        let _ = (vcpu, interrupts);
        false
    }

    /// Takes the NMI that another vCPU, or a device, sent to this one. The caller leaves it with the module (PEND_NMI).
    fn td_take_nmi(&self, vcpu: VcpuId) -> bool {
        let _ = vcpu;
        false
    }

    /// What the machine keeps of a vCPU whose TD goes on at another host. Ask while the vCPU is outside and its TD stopped. `None` on
    /// a machine that keeps nothing.
    ///
    /// # Errors
    /// The answer of the system.
    fn td_vcpu_state(&self, vcpu: VcpuId) -> Result<Option<TdVcpuState>> {
        let _ = vcpu;
        Ok(None)
    }

    /// Takes over what another machine kept of a vCPU that came from there, before its first run here; firmware has the vCPU's own
    /// state by then. The TD's time goes on from that of the state, or from the machine's if that is later.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a time that cannot be;
    /// [`Error::NotOffered`](crate::Error::NotOffered) on a machine that cannot keep it; the answer of the system.
    fn set_td_vcpu_state(&self, vcpu: VcpuId, tdvpr: Hpa, state: &TdVcpuState) -> Result<()> {
        let _ = (vcpu, tdvpr, state);
        crate::not_offered!("the state of another machine's vCPU")
    }

    /// The number of instructions that the TD vCPU whose TDVPR page is `tdvpr` executed. `None` on a processor that does
    /// not count them, and for a guest program. Ask while the vCPU is outside.
    fn td_instructions(&self, tdvpr: Hpa) -> Option<u64> {
        let _ = tdvpr;
        None
    }

    /// Nanoseconds of the TD's time since its VM was created, where the machine counts it.
    fn td_clock(&self) -> Option<u64> {
        None
    }

    /// Gives a guest program to the TD vCPU whose TDVPR page is `tdvpr`. From then on only
    /// TDH.VP.ENTER runs it. `mask` is the TD's; accesses with the shared bit go to this VM's slots.
    ///
    /// # Errors
    /// [`Error::NotOffered`](crate::Error::NotOffered) on a real processor, which runs the code in
    /// memory.
    fn load_td_program(
        &self,
        vcpu: VcpuId,
        tdvpr: Hpa,
        mask: SharedMask,
        program: Box<dyn GuestProgram>,
    ) -> Result<()>;
}

/// The operations of the machine for an SEV, SEV-ES or SNP guest.
pub trait SevPort: SharedMemory {
    /// Binds the VM to an ASID (the ASID field of its VMCBs). From the next entry on, accesses with
    /// the C-bit use the key of that ASID. `None` removes the binding.
    ///
    /// # Errors
    /// The answer of the system.
    fn bind_asid(&self, asid: Option<Asid>, mask: SharedMask) -> Result<()>;

    /// Maps guest frames to a page in the nested page tables, or unmaps what maps them. `gfn` is
    /// aligned to `level`, and `page` has that level. After the call no vCPU uses the old mapping. The
    /// owner of the page unmaps it before giving it back.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a level that the machine cannot map.
    fn map_encrypted(&self, gfn: Gfn, level: Level, page: Option<&Page>) -> Result<()>;

    /// Sends the nested page faults of the guest to its back end. Call it before the first vCPU runs.
    /// `None` removes the handler.
    ///
    /// # Errors
    /// The answer of the system.
    fn handle_nested_faults(&self, handler: Option<Arc<dyn NestedFaults>>) -> Result<()>;
}

/// The way to load guest programs into a vCPU of a host that runs programs.
pub trait Programs {
    /// Gives a guest program to the vCPU. It starts with the next `vcpu_run`.
    ///
    /// # Errors
    /// [`Error::WrongState`](crate::Error::WrongState) in a step that allows no program.
    fn load_program(&mut self, program: Box<dyn GuestProgram>) -> Result<()>;
}

/// The answer to a nested page fault of a confidential AMD guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedFaultAnswer {
    /// The access can be done again.
    Retry,
    /// The access leaves the guest as [`Exit::MemoryFault`](crate::Exit::MemoryFault).
    Leave,
    /// The run of the vCPU fails with this error. The next run does the access again.
    Fail(crate::Error),
}

/// The response of the firmware to an SNP guest's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestResponse {
    /// The sealed answer.
    Message(Box<[u8; 4096]>),
    /// The status with which the firmware refused the message.
    Refused(u32),
}

/// The back end's side of a confidential AMD guest's exits, nested page faults above all. The machine
/// calls it on the thread that runs the vCPU, and holds no lock of the port meanwhile.
pub trait NestedFaults: Send + Sync {
    /// Handles an access with the C-bit to a frame that is not mapped, or that the RMP keeps from the
    /// guest.
    fn private_fault(&self, gfn: Gfn) -> NestedFaultAnswer;

    /// Handles an access without the C-bit to a frame that is mapped to a page, or is not among the shared
    /// memory ([`SharedMemory::set_shared`]).
    fn shared_fault(&self, gfn: Gfn) -> NestedFaultAnswer;

    /// Handles an access where the RMP holds a 2 MiB page and the guest or its mapping means 4 KiB
    /// (#NPF with SIZEM).
    fn size_mismatch(&self, gfn: Gfn) -> NestedFaultAnswer;

    /// The page with a vCPU's encrypted register state (VMSA_PA of its VMCB). `None` before it is
    /// encrypted, and for guests without any.
    fn vmsa(&self, vcpu: VcpuId) -> Option<Hpa> {
        let _ = vcpu;
        None
    }

    /// Carries a page with a message of an SNP guest to the firmware (SNP_GUEST_REQUEST).
    ///
    /// # Errors
    /// [`Error::NotOffered`](crate::Error::NotOffered) for other guests; what keeps the message from
    /// getting there.
    fn guest_request(&self, message: &[u8; 4096]) -> Result<GuestResponse> {
        let _ = message;
        crate::not_offered!("guest_request")
    }
}
