//! The page that a vCPU shares with user space, and its exits.

use crate::layout::layout;
use crate::{U16, U32, U64};

/// Bytes that a vCPU's file offers to `mmap`: run page, port data, coalesced MMIO.
pub const MMAP_SIZE: u64 = 3 * 4096;
/// Bytes of `struct kvm_run`.
pub const RUN_SIZE: usize = 2352;
/// The page with the data of port accesses, as `mmap` counts.
pub const PIO_PAGE: u64 = 1;

/// Numbers in `exit_reason`.
pub mod exit_reason {
    /// Nothing is known.
    pub const UNKNOWN: u32 = 0;
    /// Ports.
    pub const IO: u32 = 2;
    /// [`Hypercall`](super::Hypercall).
    pub const HYPERCALL: u32 = 3;
    /// Memory without a slot.
    pub const MMIO: u32 = 6;
    /// Triple fault, or an ended guest.
    pub const SHUTDOWN: u32 = 8;
    /// The entry failed.
    pub const FAIL_ENTRY: u32 = 9;
    /// A signal.
    pub const INTR: u32 = 10;
    /// KVM cannot go on.
    pub const INTERNAL_ERROR: u32 = 17;
    /// [`SystemEvent`](super::SystemEvent).
    pub const SYSTEM_EVENT: u32 = 24;
    /// [`MemoryFault`](super::MemoryFault).
    pub const MEMORY_FAULT: u32 = 39;
    /// [`TdxExit`](super::TdxExit).
    pub const TDX: u32 = 40;
    /// [`SnpReqCerts`](super::SnpReqCerts).
    pub const SNP_REQ_CERTS: u32 = 43;
}

/// Types of [`SystemEvent`] that confidential VMs end with.
pub mod system_event {
    /// A SEV-ES or SNP guest asked to be ended; `data[0]` is the GHCB MSR.
    pub const SEV_TERM: u32 = 6;
    /// A TD reported a fatal error; `data` has 16 registers.
    pub const TDX_FATAL: u32 = 7;
}

layout! {
    /// `struct kvm_run` as far as every exit has it. `exit` is the union.
    RunPage 2352 {
        0 request_interrupt_window: u8, 1 immediate_exit: u8, 2 padding1: [u8; 6],
        8 exit_reason: U32, 12 ready_for_interrupt_injection: u8, 13 if_flag: u8, 14 flags: U16,
        16 cr8: U64, 24 apic_base: U64, 32 exit: [u8; 256], 288 kvm_valid_regs: U64,
        296 kvm_dirty_regs: U64, 304 sync: [u8; 2048],
    }
}

/// Where the union starts in the run page.
pub const EXIT_OFFSET: usize = 32;

layout! {
    /// `KVM_EXIT_HYPERCALL`.
    Hypercall 72 { 0 nr: U64, 8 args: [U64; 6], 56 ret: U64, 64 flags: U64, }
}

layout! {
    /// `KVM_EXIT_MEMORY_FAULT`: the access was private if bit 3 of `flags` is set.
    MemoryFault 24 { 0 flags: U64, 8 gpa: U64, 16 size: U64, }
}

layout! {
    /// `KVM_EXIT_SYSTEM_EVENT`.
    SystemEvent 136 { 0 kind: U32, 4 ndata: U32, 8 data: [U64; 16], }
}

layout! {
    /// `KVM_EXIT_TDX`: the function, and the union of its arguments.
    TdxExit 64 { 0 flags: U64, 8 nr: U64, 16 call: [u8; 48], }
}

layout! {
    /// [`TdxExit`] of GetTdVmCallInfo.
    TdVmCallInfo 48 { 0 ret: U64, 8 leaf: U64, 16 r11: U64, 24 r12: U64, 32 r13: U64, 40 r14: U64, }
}

layout! {
    /// [`TdxExit`] of GetQuote. The address has no shared bit.
    GetQuote 24 { 0 ret: U64, 8 gpa: U64, 16 size: U64, }
}

layout! {
    /// [`TdxExit`] of SetupEventNotifyInterrupt.
    SetupEventNotify 16 { 0 ret: U64, 8 vector: U64, }
}

layout! {
    /// `KVM_EXIT_SNP_REQ_CERTS`.
    SnpReqCerts 24 { 0 gpa: U64, 8 npages: U64, 16 ret: U64, }
}
