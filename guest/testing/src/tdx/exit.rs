//! What a vCPU leaves its TD for, and what the host answers.

use kvm_ops_guest::tdx::{Gpaw, MapGpa, Regs, Vmcall, VmcallStatus};
use soft_tdx_module::{Code, Regs as ModuleRegs, Status};
use std::fmt;

const TDCALL: u64 = 77;
const EPT_VIOLATION: u64 = 48;
/// Type of the extended exit qualification: TDG.MEM.PAGE.ACCEPT, and an access to a pending page.
const ACCEPT: u64 = 1;
const PENDING: u64 = 6;

/// A TD exit, as the host gets it.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// MapGPA. Not checked: the guest may have put anything into the registers.
    MapGpa {
        /// R12: the first page, with the shared bit if it is to be shared.
        gpa: u64,
        /// R13.
        bytes: u64,
    },
    /// Another call of the GHCI.
    Vmcall(Vmcall),
    /// TDG.VP.VMCALL of something else, or with operands out of range.
    BadVmcall {
        /// The registers that the guest shows.
        regs: Box<Regs>,
        /// The status with which a host refuses it.
        refusal: VmcallStatus,
    },
    /// A hypercall of the hypervisor's own (R10 is not 0): its number, and R11 to R14.
    Hypercall {
        /// R10.
        nr: u64,
        /// R11 to R14.
        args: [u64; 4],
    },
    /// An EPT violation.
    Violation {
        /// The page, with the shared bit.
        gpa: u64,
        /// What the guest did there.
        by: ViolationBy,
    },
    /// The TD or the vCPU is lost, with this status.
    Lost(Status),
    /// Another exit, which a host answers by entering again: an interrupt of the host, for instance.
    Other(Status),
}

/// What a guest does when it meets an EPT violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViolationBy {
    /// It reads, writes or executes, and there is no page.
    Access,
    /// It reads, writes or executes, and the page is pending: given, and not accepted.
    PendingAccess,
    /// TDG.MEM.PAGE.ACCEPT of a page of this level (0 is 4 KiB, 1 is 2 MiB).
    Accept {
        /// The level.
        level: u8,
    },
}

impl Exit {
    /// From the registers that TDH.VP.ENTER returns.
    pub(super) fn from_host(r: &ModuleRegs, gpaw: Gpaw) -> Self {
        let status = Status(r.rax);
        match status.0 {
            TDCALL => Self::vmcall(&from_module(r), gpaw),
            EPT_VIOLATION => Self::Violation {
                gpa: r.r8,
                by: match r.rdx & 0xF {
                    PENDING => ViolationBy::PendingAccess,
                    ACCEPT => ViolationBy::Accept {
                        level: (r.rdx >> 32 & 7) as u8,
                    },
                    _ => ViolationBy::Access,
                },
            },
            _ if is_loss(status) => Self::Lost(status),
            _ => Self::Other(status),
        }
    }

    fn vmcall(regs: &Regs, gpaw: Gpaw) -> Self {
        match (regs.r10, regs.r11) {
            (0, MapGpa::FUNCTION) => Self::MapGpa {
                gpa: regs.r12,
                bytes: regs.r13,
            },
            (0, _) => match Vmcall::from_regs(regs, gpaw) {
                Ok(call) => Self::Vmcall(call),
                Err(refusal) => Self::BadVmcall {
                    regs: Box::new(*regs),
                    refusal,
                },
            },
            (nr, _) => Self::Hypercall {
                nr,
                args: [regs.r11, regs.r12, regs.r13, regs.r14],
            },
        }
    }
}

/// NON_RECOVERABLE_TD and its like. A guest that insists on a lock also exits with an error, and runs on.
fn is_loss(status: Status) -> bool {
    const NON_RECOVERABLE: u64 = 1 << 62;
    let is_error = status.is_error() || status.0 & NON_RECOVERABLE != 0;
    is_error && status.code() != Code::HOST_PRIORITY_BUSY_TIMEOUT
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MapGpa { gpa, bytes } => write!(f, "MapGPA of {bytes:#x} bytes at {gpa:#x}"),
            Self::Vmcall(call) => write!(f, "{call:x?}"),
            Self::BadVmcall { regs, refusal } => write!(
                f,
                "TDG.VP.VMCALL of sub-function {:#x} (refused with {refusal})",
                regs.r11
            ),
            Self::Hypercall { nr, .. } => write!(f, "hypercall {nr:#x}"),
            Self::Violation { gpa, by } => match by {
                ViolationBy::Access => write!(f, "access to {gpa:#x}, which is not mapped"),
                ViolationBy::PendingAccess => write!(f, "access to {gpa:#x}, which is pending"),
                ViolationBy::Accept { level } => {
                    write!(
                        f,
                        "TDG.MEM.PAGE.ACCEPT at level {level} of {gpa:#x}, which is not there"
                    )
                }
            },
            Self::Lost(status) | Self::Other(status) => write!(f, "{status}"),
        }
    }
}

/// The host's answer to an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Enters again. A TDG.VP.VMCALL gets SUCCESS, and zeros in R11 to R15.
    Enter,
    /// Enters again with R10 and R11: the completion of a TDG.VP.VMCALL.
    Status(VmcallStatus, u64),
    /// Enters again with these. Only what RCX of the TDG.VP.VMCALL named reaches the guest.
    Registers(Box<Regs>),
    /// Never enters the vCPU again.
    Stop,
}

impl Reply {
    /// SUCCESS with a value in R11: what IN, RDMSR and a read of device memory answer.
    pub const fn value(value: u64) -> Self {
        Self::Status(VmcallStatus::SUCCESS, value)
    }

    /// RETRY: MapGPA goes on at `gpa`, which has the shared bit as R12 has it.
    pub const fn retry(gpa: u64) -> Self {
        Self::Status(VmcallStatus::RETRY, gpa)
    }

    /// The registers of the next TDH.VP.ENTER. `None` if there is none.
    pub(super) fn registers(self) -> Option<ModuleRegs> {
        match self {
            Self::Enter => Some(ModuleRegs::default()),
            Self::Status(status, r11) => Some(ModuleRegs {
                r10: status.0,
                r11,
                ..ModuleRegs::default()
            }),
            Self::Registers(regs) => Some(to_module(&regs)),
            Self::Stop => None,
        }
    }
}

pub(super) fn to_module(regs: &Regs) -> ModuleRegs {
    ModuleRegs::from_array(regs.to_array())
}

pub(super) fn from_module(regs: &ModuleRegs) -> Regs {
    Regs::from_array(regs.to_array())
}
