//! The one error type of the framework.

use core::fmt;

use crate::{Step, Tech};

/// The result of an operation. 16 bytes for `Result<()>`: two registers.
pub type Result<T, E = Error> = core::result::Result<T, E>;

static_assertions::assert_eq_size!(Result<()>, [u64; 2]);

/// Why an operation failed. Each value maps to the errno that Linux KVM gives for it.
///
/// It is `Copy` and carries at most one 64-bit value, so that it is cheap on a fault path; errors
/// that need texts or files (opening a host, loading an image) have types of their own whose
/// `source()` leads here.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No VM of the technology of that name can be had here (`EOPNOTSUPP`).
    Unsupported(Missing, &'static OpName),
    /// The technology has no such operation (`EOPNOTSUPP`).
    NotOffered(&'static OpName),
    /// The operation concerns state that is the guest's secret (`EINVAL`, as for
    /// `guest_state_protected` in KVM).
    Protected(&'static OpName),
    /// The host lacks this capability or port (`EOPNOTSUPP`).
    HostLacks(&'static OpName),
    /// An argument is not acceptable (`EINVAL`); the value is the one refused.
    Invalid(Field, u64),
    /// The call does not fit the state the VM is in (`EINVAL`); the step is the one it was in.
    WrongState(Step),
    /// A thing of that name or address exists already (`EEXIST`).
    Exists(Field, u64),
    /// Nothing of that name or address exists (`ENOENT`).
    NotFound(Field, u64),
    /// Something else holds what the call needs (`EBUSY`). Nothing changed; it may be tried again.
    Busy,
    /// A transient shortage, such as entropy (`EAGAIN`). Nothing changed; it may be tried again.
    Again,
    /// No free KeyID or ASID (`ENOSPC`).
    NoKeyId,
    /// Out of memory (`ENOMEM`).
    NoMemory,
    /// Firmware answered with this status word (`EIO`).
    Firmware(u64),
    /// An earlier failure left the VM unusable; only its teardown is allowed (`EIO`).
    Poisoned,
    /// A system call failed with this errno.
    Sys(Call, i32),
}

impl Error {
    /// The Linux errno for this error, as a positive number.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Unsupported(..) | Self::NotOffered(_) | Self::HostLacks(_) => 95,
            Self::Invalid(..) | Self::WrongState(_) | Self::Protected(_) => 22,
            Self::Exists(..) => 17,
            Self::NotFound(..) => 2,
            Self::Busy => 16,
            Self::Again => 11,
            Self::NoKeyId => 28,
            Self::NoMemory => 12,
            Self::Firmware(_) | Self::Poisoned => 5,
            Self::Sys(_, errno) => *errno,
        }
    }

    /// The advice that goes with the error on every back end; empty where only the call that failed
    /// says what to do.
    ///
    /// ```
    /// use kvm_ops_core::{Error, Tech};
    /// assert!(Error::NoKeyId.advice(Tech::Tdx).contains("private KeyIDs"));
    /// assert_eq!(Error::NoMemory.advice(Tech::Vmx), "give the host more memory, or the VM less");
    /// ```
    pub const fn advice(&self, tech: Tech) -> &'static str {
        match (self, tech) {
            (Self::Busy, _) => "nothing changed: call again when the other user is done",
            (Self::Again, _) => "nothing changed: call again later",
            (Self::NoMemory, _) => "give the host more memory, or the VM less",
            (Self::Poisoned, _) => "destroy the VM",
            (Self::NoKeyId, Tech::Tdx) => {
                "destroy another TD of this host, or give the machine more private KeyIDs (TDX keys in \
                 the setup of its firmware; PlatformBuilder::keyids of a software machine)"
            }
            (Self::NoKeyId, Tech::Sev) => {
                "destroy another SEV guest of this host, or leave SEV more of the ASIDs (minimum SEV \
                 ASID in the setup of its firmware; Builder::asids of a software machine)"
            }
            (Self::NoKeyId, _) => {
                "destroy another SEV-ES or SNP guest of this host, or give these more of the ASIDs \
                 (minimum SEV ASID in the setup of its firmware; Builder::asids of a software machine)"
            }
            _ => "",
        }
    }

    /// True if nothing changed and the same call may succeed later.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Busy | Self::Again | Self::Sys(_, 11 | 4 | 16))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(missing, tech) => missing.tell(tech, f),
            Self::NotOffered(op) => {
                write!(f, "not supported: {op} is not offered by this technology")
            }
            Self::Protected(op) => {
                write!(
                    f,
                    "{op} is not possible: the state is protected from the host"
                )
            }
            Self::HostLacks(what) => write!(f, "not supported: the host lacks {what}"),
            Self::Invalid(field, value) => write!(f, "invalid {field}: {value:#x}"),
            Self::WrongState(step) => write!(f, "not allowed while the VM is {step}"),
            Self::Exists(field, value) => write!(f, "{field} {value:#x} exists already"),
            Self::NotFound(field, value) => write!(f, "no {field} {value:#x}"),
            Self::Busy => f.write_str("busy, nothing changed"),
            Self::Again => f.write_str("not ready yet, nothing changed"),
            Self::NoKeyId => f.write_str("no free KeyID or ASID"),
            Self::NoMemory => f.write_str("out of memory"),
            Self::Firmware(status) => write!(f, "firmware answered {status:#018x}"),
            Self::Poisoned => f.write_str("the VM is poisoned by an earlier failure"),
            Self::Sys(call, errno) => write!(f, "{call} failed with errno {errno}"),
        }
    }
}

impl core::error::Error for Error {}

macro_rules! texts {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$doc])*
        #[non_exhaustive]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text,)* })
            }
        }
    };
}

texts! {
    /// The system call behind an [`Error::Sys`], spelled as Linux does.
    Call {
        /// `KVM_CREATE_VM`.
        CreateVm => "KVM_CREATE_VM",
        /// `KVM_CREATE_VCPU`.
        CreateVcpu => "KVM_CREATE_VCPU",
        /// `KVM_SET_USER_MEMORY_REGION` or its second version.
        SetMemoryRegion => "KVM_SET_USER_MEMORY_REGION",
        /// `KVM_GET_DIRTY_LOG`.
        GetDirtyLog => "KVM_GET_DIRTY_LOG",
        /// `KVM_CREATE_GUEST_MEMFD`.
        CreateGuestMemfd => "KVM_CREATE_GUEST_MEMFD",
        /// `KVM_SET_MEMORY_ATTRIBUTES`.
        SetMemoryAttributes => "KVM_SET_MEMORY_ATTRIBUTES",
        /// `KVM_PRE_FAULT_MEMORY`.
        PreFaultMemory => "KVM_PRE_FAULT_MEMORY",
        /// `KVM_SET_TSS_ADDR`.
        SetTssAddr => "KVM_SET_TSS_ADDR",
        /// `KVM_SET_IDENTITY_MAP_ADDR`.
        SetIdentityMapAddr => "KVM_SET_IDENTITY_MAP_ADDR",
        /// `KVM_CREATE_IRQCHIP`, or `KVM_CAP_SPLIT_IRQCHIP`.
        CreateIrqchip => "KVM_CREATE_IRQCHIP",
        /// `KVM_CREATE_PIT2`.
        CreatePit => "KVM_CREATE_PIT2",
        /// `KVM_IRQFD`.
        Irqfd => "KVM_IRQFD",
        /// `KVM_IOEVENTFD`.
        Ioeventfd => "KVM_IOEVENTFD",
        /// `KVM_IRQ_LINE`.
        IrqLine => "KVM_IRQ_LINE",
        /// `KVM_SET_GSI_ROUTING`.
        SetGsiRouting => "KVM_SET_GSI_ROUTING",
        /// `KVM_SIGNAL_MSI`.
        SignalMsi => "KVM_SIGNAL_MSI",
        /// `KVM_RUN`.
        Run => "KVM_RUN",
        /// `KVM_GET_REGS` or `KVM_SET_REGS`.
        Regs => "KVM_GET/SET_REGS",
        /// `KVM_GET_SREGS` or `KVM_SET_SREGS`.
        Sregs => "KVM_GET/SET_SREGS",
        /// `KVM_GET_MSRS` or `KVM_SET_MSRS`.
        Msrs => "KVM_GET/SET_MSRS",
        /// `KVM_GET_FPU`, `KVM_SET_XSAVE` and the like.
        Fpu => "KVM_GET/SET_XSAVE",
        /// `KVM_GET_LAPIC` or `KVM_SET_LAPIC`.
        Lapic => "KVM_GET/SET_LAPIC",
        /// `KVM_GET_MP_STATE` or `KVM_SET_MP_STATE`.
        MpState => "KVM_GET/SET_MP_STATE",
        /// `KVM_GET_CPUID2`.
        GetCpuid => "KVM_GET_CPUID2",
        /// `KVM_GET_DEBUGREGS` or `KVM_SET_DEBUGREGS`.
        DebugRegs => "KVM_GET/SET_DEBUGREGS",
        /// `KVM_GET_VCPU_EVENTS` or `KVM_SET_VCPU_EVENTS`.
        VcpuEvents => "KVM_GET/SET_VCPU_EVENTS",
        /// `KVM_SET_CPUID2`.
        SetCpuid => "KVM_SET_CPUID2",
        /// `KVM_INTERRUPT`.
        Interrupt => "KVM_INTERRUPT",
        /// `KVM_NMI`.
        Nmi => "KVM_NMI",
        /// `KVM_X86_SETUP_MCE`.
        SetupMce => "KVM_X86_SETUP_MCE",
        /// `KVM_SET_DEVICE_ATTR` on a vCPU.
        SetDeviceAttr => "KVM_SET_DEVICE_ATTR",
        /// `KVM_SET_TSC_KHZ`.
        SetTscKhz => "KVM_SET_TSC_KHZ",
        /// `KVM_SET_GUEST_DEBUG`.
        SetGuestDebug => "KVM_SET_GUEST_DEBUG",
        /// `KVM_ENABLE_CAP`.
        EnableCap => "KVM_ENABLE_CAP",
        /// `KVM_MEMORY_ENCRYPT_OP` with a command that is not named below.
        MemoryEncryptOp => "KVM_MEMORY_ENCRYPT_OP",
        /// `KVM_MEMORY_ENCRYPT_REG_REGION`.
        RegisterRegion => "KVM_MEMORY_ENCRYPT_REG_REGION",
        /// `KVM_MEMORY_ENCRYPT_UNREG_REGION`.
        UnregisterRegion => "KVM_MEMORY_ENCRYPT_UNREG_REGION",
        /// `open` of `/dev/sev`.
        OpenSev => "open of /dev/sev",
        /// `KVM_ENABLE_CAP` with `KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM`.
        MoveContext => "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM",
        /// `KVM_ENABLE_CAP` with `KVM_CAP_VM_COPY_ENC_CONTEXT_FROM`.
        CopyContext => "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM",
        /// `KVM_SEV_INIT`.
        SevInit => "KVM_SEV_INIT",
        /// `KVM_SEV_ES_INIT`.
        SevEsInit => "KVM_SEV_ES_INIT",
        /// `KVM_SEV_INIT2`.
        SevInit2 => "KVM_SEV_INIT2",
        /// `KVM_SEV_LAUNCH_START`.
        SevLaunchStart => "KVM_SEV_LAUNCH_START",
        /// `KVM_SEV_LAUNCH_UPDATE_DATA`.
        SevLaunchUpdateData => "KVM_SEV_LAUNCH_UPDATE_DATA",
        /// `KVM_SEV_LAUNCH_UPDATE_VMSA`.
        SevLaunchUpdateVmsa => "KVM_SEV_LAUNCH_UPDATE_VMSA",
        /// `KVM_SEV_LAUNCH_SECRET`.
        SevLaunchSecret => "KVM_SEV_LAUNCH_SECRET",
        /// `KVM_SEV_LAUNCH_MEASURE`.
        SevLaunchMeasure => "KVM_SEV_LAUNCH_MEASURE",
        /// `KVM_SEV_LAUNCH_FINISH`.
        SevLaunchFinish => "KVM_SEV_LAUNCH_FINISH",
        /// `KVM_SEV_GUEST_STATUS`.
        SevGuestStatus => "KVM_SEV_GUEST_STATUS",
        /// `KVM_SEV_DBG_DECRYPT`.
        SevDbgDecrypt => "KVM_SEV_DBG_DECRYPT",
        /// `KVM_SEV_DBG_ENCRYPT`.
        SevDbgEncrypt => "KVM_SEV_DBG_ENCRYPT",
        /// `KVM_SEV_GET_ATTESTATION_REPORT`.
        SevAttestationReport => "KVM_SEV_GET_ATTESTATION_REPORT",
        /// `KVM_SEV_SEND_START`.
        SevSendStart => "KVM_SEV_SEND_START",
        /// `KVM_SEV_SEND_UPDATE_DATA`.
        SevSendUpdateData => "KVM_SEV_SEND_UPDATE_DATA",
        /// `KVM_SEV_SEND_FINISH`.
        SevSendFinish => "KVM_SEV_SEND_FINISH",
        /// `KVM_SEV_SEND_CANCEL`.
        SevSendCancel => "KVM_SEV_SEND_CANCEL",
        /// `KVM_SEV_RECEIVE_START`.
        SevReceiveStart => "KVM_SEV_RECEIVE_START",
        /// `KVM_SEV_RECEIVE_UPDATE_DATA`.
        SevReceiveUpdateData => "KVM_SEV_RECEIVE_UPDATE_DATA",
        /// `KVM_SEV_RECEIVE_FINISH`.
        SevReceiveFinish => "KVM_SEV_RECEIVE_FINISH",
        /// `KVM_SEV_SNP_ENABLE_REQ_CERTS`.
        SnpEnableReqCerts => "KVM_SEV_SNP_ENABLE_REQ_CERTS",
        /// `KVM_SEV_SNP_LAUNCH_START`.
        SnpLaunchStart => "KVM_SEV_SNP_LAUNCH_START",
        /// `KVM_SEV_SNP_LAUNCH_UPDATE`.
        SnpLaunchUpdate => "KVM_SEV_SNP_LAUNCH_UPDATE",
        /// `KVM_SEV_SNP_LAUNCH_FINISH`.
        SnpLaunchFinish => "KVM_SEV_SNP_LAUNCH_FINISH",
        /// `KVM_TDX_CAPABILITIES`.
        TdxCapabilities => "KVM_TDX_CAPABILITIES",
        /// `KVM_TDX_INIT_VM`.
        TdxInitVm => "KVM_TDX_INIT_VM",
        /// `KVM_TDX_INIT_VCPU`.
        TdxInitVcpu => "KVM_TDX_INIT_VCPU",
        /// `KVM_TDX_INIT_MEM_REGION`.
        TdxInitMemRegion => "KVM_TDX_INIT_MEM_REGION",
        /// `KVM_TDX_FINALIZE_VM`.
        TdxFinalizeVm => "KVM_TDX_FINALIZE_VM",
        /// `fallocate` with `FALLOC_FL_PUNCH_HOLE`.
        PunchHole => "fallocate(PUNCH_HOLE)",
        /// `mmap`.
        Mmap => "mmap",
        /// `close`.
        Close => "close",
    }
}

texts! {
    /// The argument that an [`Error::Invalid`], [`Error::Exists`] or [`Error::NotFound`] names.
    Field {
        /// A guest-physical address.
        Gpa => "guest-physical address",
        /// A guest frame number.
        Gfn => "guest frame number",
        /// The size of a range, in bytes.
        Size => "size",
        /// A host address.
        HostAddress => "host address",
        /// A memory slot number.
        Slot => "memory slot",
        /// A range that overlaps the slot of this number.
        OverlappedSlot => "overlap with memory slot",
        /// A vCPU index.
        Vcpu => "vCPU index",
        /// A number of vCPUs.
        VcpuCount => "number of vCPUs",
        /// A page level.
        Level => "page level",
        /// A model-specific register.
        Msr => "MSR",
        /// An interrupt or exception vector.
        Vector => "vector",
        /// An interrupt line (GSI).
        Gsi => "interrupt line",
        /// The address of an interrupt message to more or less than one vCPU, or of another kind than fixed.
        Msi => "interrupt message address",
        /// The length of a bitmap or buffer.
        BufferLength => "buffer length",
        /// An encryption command.
        Command => "encryption command",
        /// A logical processor.
        Cpu => "logical processor",
        /// A KeyID.
        Hkid => "KeyID",
        /// A guest policy.
        Policy => "guest policy",
        /// A VM by its number.
        Vm => "VM",
        /// A teardown token of the VM of this number.
        Token => "token of VM",
        /// Flags.
        Flags => "flags",
        /// An answer to an exit of this kind (the number of the [`ExitKind`](crate::ExitKind)).
        Answer => "answer to an exit of kind",
        /// A page that the port does not know.
        Page => "page",
        /// The value written to CR0.
        Cr0 => "CR0 value",
        /// The value written to CR4.
        Cr4 => "CR4 value",
        /// The value written to XCR0.
        Xcr0 => "XCR0 value",
        /// Bits of an XSAVE area's header or MXCSR that the processor lacks.
        Xstate => "extended state bits",
        /// The value written to DR7.
        Dr7 => "DR7 value",
        /// A time of a guest in nanoseconds.
        Clock => "guest time",
        /// A TSC scaling ratio.
        TscRatio => "TSC ratio",
        /// An I/O port.
        Port => "I/O port",
        /// The width of an access in bytes.
        AccessSize => "access size",
        /// Bits of a TD's ATTRIBUTES that must not be set, or must.
        TdAttributes => "TD attribute bits",
        /// Bits of a TD's XFAM that must not be set, or must.
        Xfam => "XFAM bits",
        /// The width of a TD's guest-physical addresses.
        Gpaw => "width of guest-physical addresses",
        /// The frequency of a TSC, in kHz.
        TscKhz => "TSC frequency in kHz",
        /// A CPUID leaf (bits 31:0) and sub-leaf (bits 63:32) whose value cannot be chosen.
        CpuidLeaf => "CPUID leaf to choose",
        /// A CPUID leaf and sub-leaf with bits set that cannot be chosen.
        CpuidBits => "bits in the value of CPUID leaf",
        /// A number of migration streams, or of one of them.
        Stream => "migration stream",
        /// A migration bundle of this type, which is not due or malformed.
        Bundle => "migration bundle of type",
        /// The package that has no processor online.
        OnlineCpu => "online processor in package",
    }
}

/// The reason why no VM of a technology can be had, in an [`Error::Unsupported`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Missing {
    /// The back end of the technology is compiled out.
    Feature,
    /// The host's processors are of the other vendor.
    Vendor,
    /// The host does not offer VMs of the technology.
    HostTech,
}

/// A name that fits an error: a pointer to a static string, so that [`Error`] stays two registers.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpName(pub &'static str);

impl fmt::Display for OpName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Missing {
    fn tell(self, tech: &OpName, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Tech::from_name(tech.0);
        match (self, known.and_then(Tech::vendor)) {
            (Self::Feature, _) => {
                let feature = known.map_or(tech.0, feature);
                write!(
                    f,
                    "not supported: this build has no {tech} (cargo feature `{feature}`)"
                )
            }
            (Self::Vendor, Some(vendor)) => write!(
                f,
                "not supported: {tech} needs {vendor} processors, and the host's are of another vendor"
            ),
            (Self::Vendor | Self::HostTech, _) => {
                write!(f, "not supported: the host offers no VMs of type {tech}")
            }
        }
    }
}

/// The cargo feature that builds a technology in.
const fn feature(tech: Tech) -> &'static str {
    match tech {
        Tech::Sev | Tech::SevEs | Tech::SevSnp => "sev",
        other => other.name(),
    }
}

impl Error {
    /// No VM of that technology can be had, for that reason.
    pub const fn unsupported(missing: Missing, tech: Tech) -> Self {
        Self::Unsupported(missing, tech.op_name())
    }
}

/// `Err(Error::NotOffered)` with the name of the operation.
#[macro_export]
#[doc(hidden)]
macro_rules! not_offered {
    ($name:literal) => {{
        static NAME: $crate::OpName = $crate::OpName($name);
        ::core::result::Result::Err($crate::Error::NotOffered(&NAME))
    }};
}

/// `Err` with the [`refusal`](crate::VcpuOps::refusal) of the vCPU for the operation of that name.
#[macro_export]
#[doc(hidden)]
macro_rules! refused {
    ($vcpu:expr, $name:literal) => {{
        static NAME: $crate::OpName = $crate::OpName($name);
        ::core::result::Result::Err($crate::VcpuOps::refusal($vcpu, &NAME))
    }};
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn each_kind_has_the_errno_that_kvm_gives() {
        static OP: OpName = OpName("x");
        let table = [
            (Error::NotOffered(&OP), 95),
            (Error::Protected(&OP), 22),
            (Error::HostLacks(&OP), 95),
            (Error::unsupported(Missing::HostTech, Tech::Tdx), 95),
            (Error::Invalid(Field::Gpa, 1), 22),
            (Error::WrongState(Step::Created), 22),
            (Error::Exists(Field::Slot, 1), 17),
            (Error::NotFound(Field::Slot, 1), 2),
            (Error::Busy, 16),
            (Error::Again, 11),
            (Error::NoKeyId, 28),
            (Error::NoMemory, 12),
            (Error::Firmware(1), 5),
            (Error::Poisoned, 5),
            (Error::Sys(Call::Run, 14), 14),
        ];
        for (error, errno) in table {
            assert_eq!(error.errno(), errno, "{error}");
        }
    }

    #[test]
    fn texts_name_the_value_and_end_without_a_full_stop() {
        let text = Error::Invalid(Field::Size, 0x1001).to_string();
        assert_eq!(text, "invalid size: 0x1001");
        for tech in Tech::ALL {
            let text = Error::unsupported(Missing::Feature, tech).to_string();
            assert!(text.contains(tech.name()) && !text.ends_with('.'), "{text}");
        }
    }
}
