//! The fields of TDVPS that running an L2 VM works with: its VMCS, and what the module keeps beside it.

use super::Routing;
use crate::meta::vcpu_store::class;
use crate::vcpu::VcpuContext;
use crate::virt::msr::{MsrAccess, bitmap_bit};

/// A field of a VMCS, by its encoding (Intel SDM volume 3, appendix B).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Vmcs {
    CsSelector = 0x0802,
    InterruptStatus = 0x0810,
    VirtualApicPage = 0x2012,
    GuestPhysicalAddress = 0x2400,
    DebugControl = 0x2802,
    Efer = 0x2806,
    PinBasedControls = 0x4000,
    ExceptionBitmap = 0x4004,
    PageFaultMask = 0x4006,
    PageFaultMatch = 0x4008,
    EntryInterruption = 0x4016,
    EntryError = 0x4018,
    EntryLength = 0x401A,
    ExitReason = 0x4402,
    ExitInterruption = 0x4404,
    ExitError = 0x4406,
    IdtVectoring = 0x4408,
    IdtError = 0x440A,
    ExitLength = 0x440C,
    ExitInstruction = 0x440E,
    CsLimit = 0x4802,
    CsAccessRights = 0x4816,
    SsAccessRights = 0x4818,
    Interruptibility = 0x4824,
    PreemptionTimer = 0x482E,
    Qualification = 0x6400,
    GuestLinearAddress = 0x640A,
    Cr0 = 0x6800,
    Cr4 = 0x6804,
    CsBase = 0x6808,
    Rsp = 0x681C,
    Rip = 0x681E,
    Rflags = 0x6820,
    PendingDebug = 0x6822,
    Ssp = 0x682A,
}

/// A field of TDVPS that has an element for each VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum PerVm {
    Controls = 0x50,
    DebugControls = 0x54,
    TscDeadline = 0x58,
    NativeTscDeadline = 0x5C,
    Cr0Mask = 0x84,
    Cr0Shadow = 0x88,
    Cr4Mask = 0x8C,
    Cr4Shadow = 0x90,
    PostedInterruptDescriptor = 0x98,
    PinBasedControls = 0x9C,
    NotificationVector = 0xAC,
    StateGpa = 0x100,
    StateHpa = 0x104,
    VapicGpa = 0x110,
    VapicHpa = 0x114,
}

/// L2_CTLS: the VM uses the shared EPT.
pub(crate) const CTL_SHARED_EPT: u64 = 1;
/// L2_CTLS: TDG.VP.VMCALL goes to the host.
pub(crate) const CTL_VMCALL: u64 = 1 << 1;
/// L2_DEBUG_CTLS: exit to the host before L1 enters the VM, ...
pub(crate) const DEBUG_EXIT_BEFORE_ENTRY: u64 = 1;
/// ... instead of an exit to L1, ...
pub(crate) const DEBUG_EXIT_TO_L1: u64 = 1 << 1;
/// ... at every exit of the VM.
pub(crate) const DEBUG_EVERY_EXIT: u64 = 1 << 2;
/// "No address", "no deadline".
pub(crate) const NONE: u64 = u64::MAX;

/// L2_EXIT_HOST_ROUTING
const ROUTING: u32 = 0x42;
/// Class of the shadow bitmaps, after that of the MSR bitmaps.
const SHADOW: u8 = 1;

impl VcpuContext {
    /// The VM that runs: 0 is L1.
    pub(crate) fn vm(&self) -> usize {
        usize::from(self.curr_vm)
    }

    pub(crate) fn vmcs(&self, vm: usize, field: Vmcs) -> u64 {
        self.store.vmcs(vm as u8, field as u32)
    }

    pub(crate) fn set_vmcs(&mut self, vm: usize, field: Vmcs, value: u64) {
        self.store.set_vmcs(vm as u8, field as u32, value);
    }

    pub(crate) fn per_vm(&self, field: PerVm, vm: usize) -> u64 {
        self.store.of_vm(field as u32, vm as u8)
    }

    pub(crate) fn set_per_vm(&mut self, field: PerVm, vm: usize, value: u64) {
        self.store.set_of_vm(field as u32, vm as u8, value);
    }

    pub(crate) fn routing(&self) -> Routing {
        match self.store.management(ROUTING) {
            0 => Routing::None,
            1 => Routing::Asynchronous,
            _ => Routing::Vmcall,
        }
    }

    pub(crate) fn set_routing(&mut self, routing: Routing) {
        self.store.set_management(ROUTING, routing as u64);
    }

    /// A word of 32 bits of L1's virtual APIC page; the rest of its element stays.
    pub(crate) fn update_vapic(&mut self, offset: u32, change: impl FnOnce(u32) -> u32) {
        let key = (class::VAPIC, offset / 8);
        let shift = offset % 8 * 8;
        let word = self.store.get(key);
        let new = change((word >> shift) as u32);
        let kept = word & !(0xFFFF_FFFF << shift);
        self.store.set(key, kept | u64::from(new) << shift);
    }

    /// Moves RIP of the VM that runs.
    pub(crate) fn advance_rip(&mut self, by: u64) {
        let rip = self.current_rip().wrapping_add(by);
        match self.vm() {
            0 => self.rip = rip,
            vm => self.set_vmcs(vm, Vmcs::Rip, rip),
        }
    }

    /// Completes an instruction of the VM that runs, as the processor would have: what STI or MOV SS has blocked is
    /// open again, and single-stepping gets its trap.
    pub(crate) fn step_over(&mut self, length: u64) {
        const STI_AND_MOV_SS: u64 = 3;
        const TRAP_FLAG: u64 = 1 << 8;
        const BRANCH_TRACE: u64 = 1 << 1;
        const SINGLE_STEP: u64 = 1 << 14;
        self.advance_rip(length);
        let vm = self.vm();
        let blocked = self.vmcs(vm, Vmcs::Interruptibility);
        self.set_vmcs(vm, Vmcs::Interruptibility, blocked & !STI_AND_MOV_SS);
        let steps = self.vmcs(vm, Vmcs::Rflags) & TRAP_FLAG != 0
            && self.vmcs(vm, Vmcs::DebugControl) & BRANCH_TRACE == 0;
        let pending = self.vmcs(vm, Vmcs::PendingDebug) & !SINGLE_STEP;
        let trap = if steps { SINGLE_STEP } else { 0 };
        self.set_vmcs(vm, Vmcs::PendingDebug, pending | trap);
    }

    /// RIP of the VM that runs.
    pub(crate) fn current_rip(&self) -> u64 {
        self.rip_of(self.vm())
    }

    pub(crate) fn rip_of(&self, vm: usize) -> u64 {
        match vm {
            0 => self.rip,
            vm => self.vmcs(vm, Vmcs::Rip),
        }
    }

    /// L1 wants to see this access of the VM.
    pub(crate) fn msr_exits_to_l1(&self, vm: usize, address: u32, access: MsrAccess) -> bool {
        let Some(before) = vm.checked_sub(1) else {
            return false;
        };
        let class = class::L2_MSR_BITMAPS + SHADOW + class::L2_STEP * before as u8;
        bitmap_bit(address, access).is_none_or(|bit| {
            let word = self.store.get((class, (bit / 64) as u32));
            word >> (bit % 64) & 1 != 0
        })
    }

    /// Discards the addresses that the module last translated for L1.
    pub(crate) fn forget_translations(&mut self, vms: usize) {
        for vm in 1..=vms {
            self.set_per_vm(PerVm::StateHpa, vm, NONE);
            self.set_per_vm(PerVm::VapicHpa, vm, NONE);
        }
    }
}
