//! Why a vCPU stopped running: one type for all technologies.

use crate::{Gpa, Privacy};

/// Why [`VcpuOps::vcpu_run`](crate::VcpuOps::vcpu_run) returned.
///
/// Reads borrow the buffer that the guest will see: fill it before the next `vcpu_run`. All
/// numbers are those of the guest's instruction; string I/O of several items comes as one exit
/// whose `data` holds them one after the other.
#[non_exhaustive]
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'a> {
    /// The guest reads `data.len() / size` items of `size` bytes (1, 2 or 4) from an I/O port.
    IoIn {
        /// The port.
        port: u16,
        /// Bytes in an item.
        size: u8,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// The guest writes `data.len() / size` items of `size` bytes (1, 2 or 4) to an I/O port.
    IoOut {
        /// The port.
        port: u16,
        /// Bytes in an item.
        size: u8,
        /// What it writes.
        data: &'a [u8],
    },
    /// The guest reads memory that no slot backs.
    MmioRead {
        /// Where.
        gpa: Gpa,
        /// To be filled; 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// The guest writes memory that no slot backs, or that a read-only slot backs.
    MmioWrite {
        /// Where.
        gpa: Gpa,
        /// What it writes; 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The guest halted. Without an in-kernel irqchip, run the vCPU again when an interrupt comes.
    Hlt,
    /// A triple fault, or a guest that shut itself down.
    Shutdown,
    /// Another thread kicked the vCPU, or a signal came. The guest saw nothing of it.
    Interrupted,
    /// The guest can take an interrupt now, as `enable_irq_window` asked.
    IrqWindow,
    /// The guest asks that a range become private or shared: `KVM_HC_MAP_GPA_RANGE`, MapGPA, or a
    /// page state change. Fill `ret` with 0, or a positive errno.
    MapGpaRange {
        /// The first page, without mask bits.
        gpa: Gpa,
        /// How many 4 KiB pages.
        pages: u64,
        /// What they shall become.
        to: Privacy,
        /// The answer, 0 when the vCPU exits.
        ret: &'a mut u64,
    },
    /// The guest touched memory as private that is shared, or the other way round
    /// (`KVM_EXIT_MEMORY_FAULT`).
    MemoryFault {
        /// The first byte, without mask bits.
        gpa: Gpa,
        /// Bytes.
        bytes: u64,
        /// How the guest touched it.
        access: Privacy,
    },
    /// A hypercall that the platform does not handle. Fill `ret`.
    Hypercall {
        /// Its number.
        nr: u64,
        /// Its arguments.
        args: [u64; 6],
        /// The answer.
        ret: &'a mut u64,
    },
    /// A TD asks for something that only the embedder can do (`KVM_EXIT_TDX`).
    Tdx {
        /// What.
        request: TdxRequest,
        /// The answer, a status of the GHCI: 0 for success. It begins as what the guest is told if
        /// nobody answers.
        ret: &'a mut u64,
        /// What else is answered, in R11 to R14. Only [`TdxRequest::GetTdVmCallInfo`] looks at it.
        values: &'a mut [u64; 4],
    },
    /// The guest reads an MSR that the platform hands to the embedder. Set `error` to inject #GP.
    ReadMsr {
        /// The MSR.
        index: u32,
        /// Its value.
        value: &'a mut u64,
        /// Whether the guest gets #GP instead.
        error: &'a mut u8,
    },
    /// The guest writes an MSR that the platform hands to the embedder.
    WriteMsr {
        /// The MSR.
        index: u32,
        /// The value.
        value: u64,
        /// Whether the guest gets #GP.
        error: &'a mut u8,
    },
    /// A single step, breakpoint or watchpoint of guest debugging.
    Debug {
        /// The address of the instruction.
        rip: u64,
        /// The exception: 1 for #DB, 3 for #BP.
        exception: u32,
    },
    /// The guest asks for reset, shutdown, or reports a fatal error (`KVM_EXIT_SYSTEM_EVENT`).
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`.
        kind: u32,
        /// What comes with it.
        data: &'a [u64],
    },
    /// The processor refused to enter the guest (`KVM_EXIT_FAIL_ENTRY`).
    FailEntry {
        /// The processor's reason, unchanged.
        reason: u64,
        /// The processor that refused.
        cpu: u32,
    },
    /// The platform cannot go on with this guest (`KVM_EXIT_INTERNAL_ERROR`): an instruction that
    /// it can neither run nor emulate, mostly.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`: 1 for an emulation failure.
        suberror: u32,
        /// What comes with it; for an emulation failure the instruction bytes, where KVM knows
        /// them.
        data: &'a [u64],
    },
    /// An exit of a reason that this version has no name for.
    Unknown {
        /// The platform's number of the reason.
        reason: u32,
    },
}

/// What a TD asks of the embedder (GHCI, "TDG.VP.VMCALL").
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TdxRequest {
    /// A quote for the TD report in a shared buffer, which the embedder fills and then answers by
    /// an interrupt (GetQuote).
    GetQuote {
        /// The buffer, without the shared bit.
        gpa: Gpa,
        /// Its length in bytes.
        bytes: u64,
    },
    /// Which sub-functions there are beyond the basic ones (GetTdVmCallInfo).
    GetTdVmCallInfo {
        /// Which part of the list: 1.
        leaf: u64,
    },
    /// The vector by which the guest wants to hear of events (SetupEventNotifyInterrupt).
    SetupEventNotify {
        /// 32 to 255.
        vector: u8,
    },
}

impl Exit<'_> {
    /// The kind of exit, without its data.
    pub const fn kind(&self) -> ExitKind {
        match self {
            Self::IoIn { .. } => ExitKind::IoIn,
            Self::IoOut { .. } => ExitKind::IoOut,
            Self::MmioRead { .. } => ExitKind::MmioRead,
            Self::MmioWrite { .. } => ExitKind::MmioWrite,
            Self::Hlt => ExitKind::Hlt,
            Self::Shutdown => ExitKind::Shutdown,
            Self::Interrupted => ExitKind::Interrupted,
            Self::IrqWindow => ExitKind::IrqWindow,
            Self::MapGpaRange { .. } => ExitKind::MapGpaRange,
            Self::MemoryFault { .. } => ExitKind::MemoryFault,
            Self::Hypercall { .. } => ExitKind::Hypercall,
            Self::Tdx { .. } => ExitKind::Tdx,
            Self::ReadMsr { .. } => ExitKind::ReadMsr,
            Self::WriteMsr { .. } => ExitKind::WriteMsr,
            Self::Debug { .. } => ExitKind::Debug,
            Self::SystemEvent { .. } => ExitKind::SystemEvent,
            Self::FailEntry { .. } => ExitKind::FailEntry,
            Self::InternalError { .. } => ExitKind::InternalError,
            Self::Unknown { .. } => ExitKind::Unknown,
        }
    }
}

/// The kinds of [`Exit`], for counting.
#[non_exhaustive]
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // Each is named as the `Exit` that it counts.
pub enum ExitKind {
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Hlt,
    Shutdown,
    Interrupted,
    IrqWindow,
    MapGpaRange,
    MemoryFault,
    Hypercall,
    Tdx,
    ReadMsr,
    WriteMsr,
    Debug,
    SystemEvent,
    FailEntry,
    InternalError,
    Unknown,
}

impl ExitKind {
    /// Every kind, in the order of its number.
    pub const ALL: [ExitKind; 19] = [
        Self::IoIn,
        Self::IoOut,
        Self::MmioRead,
        Self::MmioWrite,
        Self::Hlt,
        Self::Shutdown,
        Self::Interrupted,
        Self::IrqWindow,
        Self::MapGpaRange,
        Self::MemoryFault,
        Self::Hypercall,
        Self::Tdx,
        Self::ReadMsr,
        Self::WriteMsr,
        Self::Debug,
        Self::SystemEvent,
        Self::FailEntry,
        Self::InternalError,
        Self::Unknown,
    ];

    /// A short name: `io-in`, `hlt`, ...
    pub const fn name(self) -> &'static str {
        match self {
            Self::IoIn => "io-in",
            Self::IoOut => "io-out",
            Self::MmioRead => "mmio-read",
            Self::MmioWrite => "mmio-write",
            Self::Hlt => "hlt",
            Self::Shutdown => "shutdown",
            Self::Interrupted => "interrupted",
            Self::IrqWindow => "irq-window",
            Self::MapGpaRange => "map-gpa-range",
            Self::MemoryFault => "memory-fault",
            Self::Hypercall => "hypercall",
            Self::Tdx => "tdx",
            Self::ReadMsr => "read-msr",
            Self::WriteMsr => "write-msr",
            Self::Debug => "debug",
            Self::SystemEvent => "system-event",
            Self::FailEntry => "fail-entry",
            Self::InternalError => "internal-error",
            Self::Unknown => "unknown",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_stand_in_the_order_of_their_numbers() {
        for (i, kind) in ExitKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, i);
        }
    }
}
