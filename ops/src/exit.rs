//! The reasons why a vCPU stopped running, and the answers to them: one type for all technologies.

use crate::{Gpa, Privacy};

/// The reason why [`VcpuOps::vcpu_run`](crate::VcpuOps::vcpu_run) returned.
///
/// An exit owns its values. Bytes that the guest writes, or that it is to read, are in
/// [`VcpuOps::exit_data`](crate::VcpuOps::exit_data); fill the buffer of a read before the next
/// `vcpu_run`. Other answers go through [`VcpuOps::answer`](crate::VcpuOps::answer).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest reads `count` items of `size` bytes from an I/O port. String I/O of several items is
    /// one exit, with the items one after the other in the data.
    IoIn {
        /// The port.
        port: u16,
        /// Bytes in an item: 1, 2 or 4.
        size: u8,
        /// Items.
        count: u32,
    },
    /// The guest writes `count` items of `size` bytes to an I/O port.
    IoOut {
        /// The port.
        port: u16,
        /// Bytes in an item: 1, 2 or 4.
        size: u8,
        /// Items.
        count: u32,
    },
    /// The guest reads memory that no slot backs.
    MmioRead {
        /// The address.
        gpa: Gpa,
        /// Bytes, 1 to 8.
        len: u8,
    },
    /// The guest writes memory that no slot backs, or that a read-only slot backs.
    MmioWrite {
        /// The address.
        gpa: Gpa,
        /// Bytes, 1 to 8.
        len: u8,
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
    /// page state change. Answer with [`Answer::Value`]: 0, or a positive errno.
    MapGpaRange {
        /// The first page, without mask bits.
        gpa: Gpa,
        /// The number of 4 KiB pages.
        pages: u64,
        /// The state that they shall have.
        to: Privacy,
    },
    /// The guest touched memory as private that is shared, or the other way round
    /// (`KVM_EXIT_MEMORY_FAULT`).
    MemoryFault {
        /// The first byte, without mask bits.
        gpa: Gpa,
        /// Bytes.
        bytes: u64,
        /// The kind of memory that the guest took it for.
        access: Privacy,
    },
    /// A hypercall that the platform does not handle. Answer with [`Answer::Value`].
    Hypercall {
        /// The number of the call.
        nr: u64,
        /// Its arguments.
        args: [u64; 6],
    },
    /// A TD asks for something that only the embedder can do (`KVM_EXIT_TDX`). Answer with
    /// [`Answer::Tdx`].
    Tdx(TdxRequest),
    /// The guest reads an MSR that the platform hands to the embedder. Answer with [`Answer::Msr`] or
    /// [`Answer::InjectGp`].
    ReadMsr {
        /// The MSR.
        index: u32,
    },
    /// The guest writes an MSR that the platform hands to the embedder. Answer with
    /// [`Answer::InjectGp`] to refuse it.
    WriteMsr {
        /// The MSR.
        index: u32,
        /// The value.
        value: u64,
    },
    /// An SNP guest asked for a report with the certificates of the host's keys, and they shall be written to shared
    /// memory (`KVM_EXIT_SNP_REQ_CERTS`). Answer with [`Answer::SnpCertificates`].
    SnpCertificates {
        /// The first page.
        gpa: Gpa,
        /// The number of 4 KiB pages that the guest has for them.
        pages: u64,
    },
    /// A single step, breakpoint or watchpoint of guest debugging. On the software machine the data holds DR6 and DR7 of the
    /// event, 8 bytes each.
    Debug {
        /// The address of the instruction.
        rip: u64,
        /// The exception: 1 for #DB, 3 for #BP.
        exception: u32,
    },
    /// The guest asks for reset, shutdown, or reports a fatal error (`KVM_EXIT_SYSTEM_EVENT`). The
    /// data holds 64-bit words.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`.
        kind: u32,
    },
    /// The processor refused to enter the guest (`KVM_EXIT_FAIL_ENTRY`).
    FailEntry {
        /// The processor's reason, unchanged.
        reason: u64,
        /// The processor that refused.
        cpu: u32,
    },
    /// The platform cannot go on with this guest (`KVM_EXIT_INTERNAL_ERROR`), most often because of an
    /// instruction that it can neither run nor emulate. The data holds 64-bit words; for an emulation
    /// failure they are the instruction bytes, where KVM knows them.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`: 1 for an emulation failure.
        suberror: u32,
    },
    /// An exit of a reason that this version has no name for.
    Unknown {
        /// The platform's number of the reason.
        reason: u32,
    },
}

/// The answer to an [`Exit`], handed to the guest by the next `vcpu_run`.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The result of [`Exit::MapGpaRange`] or [`Exit::Hypercall`]. The default is 0.
    Value(u64),
    /// The result of [`Exit::Tdx`]. The default is the status that the GHCI has for a sub-function
    /// that the host does not offer.
    Tdx {
        /// A status of the GHCI: 0 for success.
        status: u64,
        /// R11 to R14. The guest sees them for [`TdxRequest::GetTdVmCallInfo`] only.
        values: [u64; 4],
    },
    /// The value that [`Exit::ReadMsr`] reads. The default is 0.
    Msr(u64),
    /// #GP for [`Exit::ReadMsr`] or [`Exit::WriteMsr`].
    InjectGp,
    /// The result of [`Exit::SnpCertificates`]. The default is `EIO`.
    SnpCertificates {
        /// 0 if they were written; a positive errno otherwise: `ENOSPC`, `EAGAIN` or `EIO`.
        errno: u32,
        /// With `ENOSPC` the number of pages that they need.
        pages: u64,
    },
}

impl Answer {
    /// True if this answers an exit of that kind.
    pub const fn fits(&self, exit: ExitKind) -> bool {
        match self {
            Self::Value(_) => matches!(exit, ExitKind::MapGpaRange | ExitKind::Hypercall),
            Self::Tdx { .. } => matches!(exit, ExitKind::Tdx),
            Self::Msr(_) => matches!(exit, ExitKind::ReadMsr),
            Self::InjectGp => matches!(exit, ExitKind::ReadMsr | ExitKind::WriteMsr),
            Self::SnpCertificates { .. } => matches!(exit, ExitKind::SnpCertificates),
        }
    }
}

/// Something that a TD asks of the embedder (GHCI, "TDG.VP.VMCALL").
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TdxRequest {
    /// A quote for the TD report in a shared buffer. The embedder fills the buffer and then sends an
    /// interrupt (GetQuote).
    GetQuote {
        /// The buffer, without the shared bit.
        gpa: Gpa,
        /// Its length in bytes.
        bytes: u64,
    },
    /// The list of sub-functions beyond the basic ones (GetTdVmCallInfo).
    GetTdVmCallInfo {
        /// The part of the list: 1.
        leaf: u64,
    },
    /// The vector by which the guest wants to hear of events (SetupEventNotifyInterrupt).
    SetupEventNotify {
        /// 32 to 255.
        vector: u8,
    },
}

impl Exit {
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
            Self::Tdx(_) => ExitKind::Tdx,
            Self::ReadMsr { .. } => ExitKind::ReadMsr,
            Self::WriteMsr { .. } => ExitKind::WriteMsr,
            Self::SnpCertificates { .. } => ExitKind::SnpCertificates,
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
    SnpCertificates,
    Debug,
    SystemEvent,
    FailEntry,
    InternalError,
    Unknown,
}

impl ExitKind {
    /// Every kind, in the order of its number.
    pub const ALL: [ExitKind; 20] = [
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
        Self::SnpCertificates,
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
            Self::SnpCertificates => "snp-certificates",
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
