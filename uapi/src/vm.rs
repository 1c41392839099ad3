//! The VM file: capabilities that are enabled, interrupts, clock.

use crate::layout::layout;
use crate::{U32, U64};

layout! {
    /// `struct kvm_enable_cap`.
    EnableCap 104 { 0 cap: U32, 4 flags: U32, 8 args: [U64; 4], 40 pad: [u8; 64], }
}

/// The flag of [`PitConfig`]: port 0x61 is in the kernel.
pub const PIT_SPEAKER_DUMMY: u32 = 1;

layout! {
    /// `struct kvm_pit_config`, with [`PIT_SPEAKER_DUMMY`] in `flags`.
    PitConfig 64 { 0 flags: U32, 4 pad: [U32; 15], }
}

layout! {
    /// `struct kvm_clock_data`.
    ClockData 48 {
        0 clock: U64, 8 flags: U32, 12 pad0: U32, 16 realtime: U64, 24 host_tsc: U64,
        32 pad: [U32; 4],
    }
}

layout! {
    /// The fixed part of `struct kvm_irq_routing`.
    IrqRouting 8 { 0 nr: U32, 4 flags: U32, }
}

layout! {
    /// `struct kvm_irq_routing_entry`.
    IrqRoutingEntry 48 {
        0 gsi: U32, 4 kind: U32, 8 flags: U32, 12 pad: U32, 16 route: [u8; 32],
    }
}

layout! {
    /// `struct kvm_msi`.
    Msi 32 {
        0 address_lo: U32, 4 address_hi: U32, 8 data: U32, 12 flags: U32, 16 devid: U32,
        20 pad: [u8; 12],
    }
}

layout! {
    /// `struct kvm_irq_level`.
    IrqLevel 8 { 0 irq: U32, 4 level: U32, }
}

layout! {
    /// `struct kvm_msr_filter_range`: `bitmap` is an address.
    MsrFilterRange 24 { 0 flags: U32, 4 nmsrs: U32, 8 base: U32, 12 pad: U32, 16 bitmap: U64, }
}

layout! {
    /// `struct kvm_msr_filter`.
    MsrFilter 392 { 0 flags: U32, 4 pad: U32, 8 ranges: [MsrFilterRange; 16], }
}

/// Flags of an [`MsrFilter`] and of its ranges.
pub mod msr_filter_flags {
    /// Of the filter: MSRs in no range are refused.
    pub const DEFAULT_DENY: u32 = 1;
    /// Of a range: it decides of reads.
    pub const READ: u32 = 1;
    /// Of a range: it decides of writes.
    pub const WRITE: u32 = 2;
}

/// The most bytes of a range's bitmap, which is read in words of 8 bytes.
pub const MSR_FILTER_BITMAP_SIZE: usize = 0x600;

/// Reasons of the exits `X86_RDMSR` and `X86_WRMSR`, which `KVM_CAP_X86_USER_SPACE_MSR` enables.
pub mod msr_exit_reason {
    /// The MSR has no such value, or is not there in this mode.
    pub const INVAL: u64 = 1;
    /// The MSR is not known.
    pub const UNKNOWN: u64 = 2;
    /// The filter refuses the access.
    pub const FILTER: u64 = 4;
    /// All of them.
    pub const ALL: u64 = INVAL | UNKNOWN | FILTER;
}

/// `KVM_HC_VAPIC_POLL_IRQ`: nothing but an exit, after which interrupts are taken.
pub const HC_VAPIC_POLL_IRQ: u64 = 1;
/// `KVM_HC_SCHED_YIELD`: gives the processor's time to the vCPU with that APIC ID.
pub const HC_SCHED_YIELD: u64 = 11;
/// `KVM_HC_MAP_GPA_RANGE`: the hypercall that leaves to user space when EXIT_HYPERCALL is enabled.
pub const HC_MAP_GPA_RANGE: u64 = 12;
/// Its attribute bit: to private.
pub const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;

/// Behaviours that `KVM_CAP_DISABLE_QUIRKS2` takes away (`KVM_X86_QUIRK_*`).
pub mod quirk {
    /// The other vendor's hypercall instruction is overwritten with the processor's own.
    pub const FIX_HYPERCALL_INSN: u64 = 1 << 5;
    /// A slot that is deleted takes all of a VM's second-level table along.
    pub const SLOT_ZAP_ALL: u64 = 1 << 7;
}
/// The most GSIs that a split irqchip reserves, and that routes may name.
pub const MAX_IRQ_ROUTES: u64 = 4096;
/// vCPUs of a VM by the kernel's default configuration.
pub const MAX_VCPUS: u32 = 1024;
/// Numbers for each vCPU that a VM may have.
pub const VCPU_ID_RATIO: u32 = 4;
