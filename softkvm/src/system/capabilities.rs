//! `KVM_CHECK_EXTENSION`. A capability that is not named is 0, and its calls are refused.

use kvm_ops_uapi::cap;
use kvm_ops_uapi::irq::x2apic_flags;
use kvm_ops_uapi::memory::{ATTRIBUTE_PRIVATE, USER_SLOTS, dirty_log_flags, gmem_flags};
use kvm_ops_uapi::run::{COALESCED_MMIO_PAGE, sync_regs};
use kvm_ops_uapi::state::{XSAVE_SIZE, guest_debug};
use kvm_ops_uapi::vm::{HC_MAP_GPA_RANGE, MAX_IRQ_ROUTES, MAX_VCPUS, VCPU_ID_RATIO};

use super::MAX_MCE_BANKS;
use crate::Kernel;
use crate::vm::{KNOWN_QUIRKS, Vm};

/// Nanoseconds of a tick of local APICs' timers, unless a VM was told others: the crystal of CPUID leaf 15H.
const APIC_BUS_CYCLE_NS: u64 = 40;

/// The most vCPUs that are recommended.
const NR_VCPUS: i64 = 8;

pub(crate) fn of_system(kernel: &Kernel, number: u64) -> i64 {
    match u32::try_from(number) {
        Ok(cap::MEMORY_ATTRIBUTES) => ATTRIBUTE_PRIVATE as i64,
        Ok(cap::GUEST_MEMFD_FLAGS) => (gmem_flags::MMAP | gmem_flags::INIT_SHARED) as i64,
        Ok(cap::READONLY_MEM) => 1,
        Ok(cap::SYNC_REGS) => sync_regs::ALL as i64,
        Ok(cap::MULTI_ADDRESS_SPACE) => 2,
        Ok(cap::X86_APIC_BUS_CYCLES_NS) => 1,
        Ok(number) => common(kernel, number),
        Err(_) => 0,
    }
}

pub(crate) fn of_vm(vm: &Vm, number: u64) -> i64 {
    match u32::try_from(number) {
        Ok(cap::MEMORY_ATTRIBUTES) => vm.supported_attributes() as i64,
        Ok(cap::GUEST_MEMFD_FLAGS) => vm.gmem_flags() as i64,
        Ok(cap::READONLY_MEM) => i64::from(!vm.has_protected_state()),
        Ok(cap::SYNC_REGS) if !vm.has_protected_state() => sync_regs::ALL as i64,
        Ok(cap::MULTI_ADDRESS_SPACE) => vm.address_spaces().into(),
        Ok(cap::MAX_VCPUS) => vm.max_vcpus().into(),
        Ok(cap::X86_APIC_BUS_CYCLES_NS) => {
            vm.irq().apic_bus_cycle().unwrap_or(APIC_BUS_CYCLE_NS) as i64
        }
        Ok(number) => common(vm.kernel(), number),
        Err(_) => 0,
    }
}

/// The capabilities for which VMs do not differ.
fn common(kernel: &Kernel, number: u32) -> i64 {
    match number {
        cap::IRQCHIP
        | cap::HLT
        | cap::USER_MEMORY
        | cap::SET_TSS_ADDR
        | cap::EXT_CPUID
        | cap::PIT
        | cap::MP_STATE
        | cap::SYNC_MMU
        | cap::COALESCED_PIO
        | cap::ONE_REG
        | cap::VCPU_ATTRIBUTES
        | cap::DESTROY_MEMORY_REGION_WORKS
        | cap::JOIN_MEMORY_REGIONS_WORKS
        | cap::PIT2
        | cap::VCPU_EVENTS
        | cap::SET_GUEST_DEBUG
        | cap::DEBUGREGS
        | cap::XSAVE
        | cap::XCRS
        | cap::EXCEPTION_PAYLOAD
        | cap::X86_TRIPLE_FAULT_EVENT
        | cap::SET_BOOT_CPU_ID
        | cap::SET_IDENTITY_MAP_ADDR
        | cap::ADJUST_CLOCK
        | cap::INTERNAL_ERROR_DATA
        | cap::IOEVENTFD
        | cap::IOEVENTFD_NO_LENGTH
        | cap::IOEVENTFD_ANY_LENGTH
        | cap::IRQFD
        | cap::IRQFD_RESAMPLE
        | cap::IRQ_INJECT_STATUS
        | cap::SIGNAL_MSI
        | cap::PIT_STATE2
        | cap::X86_ROBUST_SINGLESTEP
        | cap::KVMCLOCK_CTRL
        | cap::TSC_DEADLINE_TIMER
        | cap::SREGS2
        | cap::BINARY_STATS_FD
        | cap::ENABLE_CAP
        | cap::ENABLE_CAP_VM
        | cap::DISABLE_QUIRKS
        | cap::CHECK_EXTENSION_VM
        | cap::TSC_CONTROL
        | cap::GET_TSC_KHZ
        | cap::VM_TSC_CONTROL
        | cap::SPLIT_IRQCHIP
        | cap::IMMEDIATE_EXIT
        | cap::GET_MSR_FEATURES
        | cap::X86_USER_SPACE_MSR
        | cap::X86_MSR_FILTER
        | cap::VM_COPY_ENC_CONTEXT_FROM
        | cap::VM_MOVE_ENC_CONTEXT_FROM
        | cap::SYS_ATTRIBUTES
        | cap::USER_MEMORY2
        | cap::MEMORY_FAULT_INFO
        | cap::GUEST_MEMFD
        | cap::PRE_FAULT_MEMORY => 1,
        cap::COALESCED_MMIO => COALESCED_MMIO_PAGE as i64,
        cap::SET_GUEST_DEBUG2 => guest_debug::ALL.into(),
        cap::IRQ_ROUTING => MAX_IRQ_ROUTES as i64,
        cap::MCE => MAX_MCE_BANKS as i64,
        cap::MANUAL_DIRTY_LOG_PROTECT2 => dirty_log_flags::ALL as i64,
        cap::DISABLE_QUIRKS2 => KNOWN_QUIRKS as i64,
        cap::XSAVE2 => XSAVE_SIZE as i64,
        cap::X2APIC_API => x2apic_flags::ALL as i64,
        cap::NR_VCPUS => NR_VCPUS,
        cap::NR_MEMSLOTS => USER_SLOTS.into(),
        cap::MAX_VCPUS => MAX_VCPUS.into(),
        cap::MAX_VCPU_ID => (MAX_VCPUS * VCPU_ID_RATIO).into(),
        cap::EXIT_HYPERCALL => 1 << HC_MAP_GPA_RANGE,
        cap::VM_TYPES => kernel.vm_types().into(),
        _ => 0,
    }
}
