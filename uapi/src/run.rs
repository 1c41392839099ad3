//! The page that a vCPU shares with user space, and its exits.

use crate::layout::layout;
use crate::{U16, U32, U64};

/// Bytes that a vCPU's file offers to `mmap`: run page, port data, coalesced MMIO.
pub const MMAP_SIZE: u64 = 3 * 4096;
/// Bytes of `struct kvm_run`.
pub const RUN_SIZE: usize = 2352;
/// The page with the data of port accesses, as `mmap` counts.
pub const PIO_PAGE: u64 = 1;
/// The page with the ring of coalesced writes, the same for all vCPUs of a VM.
pub const COALESCED_MMIO_PAGE: u64 = 2;

/// Numbers in `exit_reason`.
pub mod exit_reason {
    /// Nothing is known.
    pub const UNKNOWN: u32 = 0;
    /// Ports.
    pub const IO: u32 = 2;
    /// [`Hypercall`](super::Hypercall).
    pub const HYPERCALL: u32 = 3;
    /// A single step or breakpoint: [`Debug`](super::Debug).
    pub const DEBUG: u32 = 4;
    /// HLT, without an interrupt controller in the kernel.
    pub const HLT: u32 = 5;
    /// Memory without a slot.
    pub const MMIO: u32 = 6;
    /// The guest can take an interrupt, as was asked.
    pub const IRQ_WINDOW_OPEN: u32 = 7;
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
    /// The end of an interrupt of an I/O APIC in user space: [`IoapicEoi`](super::IoapicEoi).
    pub const IOAPIC_EOI: u32 = 26;
    /// RDMSR that user space answers: [`MsrExit`](super::MsrExit).
    pub const X86_RDMSR: u32 = 29;
    /// WRMSR that user space answers: [`MsrExit`](super::MsrExit).
    pub const X86_WRMSR: u32 = 30;
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

/// Bits of `kvm_valid_regs` and `kvm_dirty_regs`.
pub mod sync_regs {
    /// [`Regs`](crate::state::Regs), at byte 0 of the area.
    pub const REGS: u64 = 1;
    /// [`Sregs`](crate::state::Sregs), at byte 144.
    pub const SREGS: u64 = 2;
    /// [`VcpuEvents`](crate::state::VcpuEvents), at byte 456.
    pub const EVENTS: u64 = 4;
    /// All of them.
    pub const ALL: u64 = REGS | SREGS | EVENTS;
}

layout! {
    /// The three groups of registers in the run page's area.
    SyncRegs 520 {
        0 regs: crate::state::Regs, 144 sregs: crate::state::Sregs,
        456 events: crate::state::VcpuEvents,
    }
}

layout! {
    /// `KVM_EXIT_IO`. The data is at `data_offset` of the mapping.
    Io 16 { 0 direction: u8, 1 size: u8, 2 port: U16, 4 count: U32, 8 data_offset: U64, }
}

layout! {
    /// `KVM_EXIT_MMIO`.
    Mmio 24 { 0 phys_addr: U64, 8 data: [u8; 8], 16 len: U32, 20 is_write: u8, 21 pad: [u8; 3], }
}

layout! {
    /// `KVM_EXIT_DEBUG`. `pc` is a linear address; DR6 and DR7 count for exception 1.
    Debug 32 { 0 exception: U32, 4 pad: U32, 8 pc: U64, 16 dr6: U64, 24 dr7: U64, }
}

layout! {
    /// `KVM_EXIT_X86_RDMSR` and `KVM_EXIT_X86_WRMSR`. `error` is the answer: anything but 0 is #GP.
    MsrExit 24 { 0 error: u8, 1 pad: [u8; 7], 8 reason: U32, 12 index: U32, 16 data: U64, }
}

layout! {
    /// `KVM_EXIT_IOAPIC_EOI`.
    IoapicEoi 1 { 0 vector: u8, }
}

layout! {
    /// `KVM_EXIT_INTERNAL_ERROR`.
    InternalError 136 { 0 suberror: U32, 4 ndata: U32, 8 data: [U64; 16], }
}

layout! {
    /// `KVM_EXIT_FAIL_ENTRY`.
    FailEntry 16 { 0 reason: U64, 8 cpu: U32, 12 pad: U32, }
}

/// The bit of [`Hypercall`]'s `flags`: the guest is in 64-bit mode.
pub const HYPERCALL_LONG_MODE: u64 = 1;
/// The bit of [`MemoryFault`]'s `flags`: the access was to private memory.
pub const MEMORY_FAULT_PRIVATE: u64 = 1 << 3;

layout! {
    /// `KVM_EXIT_HYPERCALL`.
    Hypercall 72 { 0 nr: U64, 8 args: [U64; 6], 56 ret: U64, 64 flags: U64, }
}

layout! {
    /// `KVM_EXIT_MEMORY_FAULT`, with [`MEMORY_FAULT_PRIVATE`] in `flags`.
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
