//! Information from the TDX module for a TD: about itself and about #VE.

use super::{CompletionStatus, Gpaw, Regs, leaf};

/// TDG.VP.INFO: facts, from the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TdInfo {
    /// The width of guest-physical addresses.
    pub gpaw: Gpaw,
    /// ATTRIBUTES of the TD.
    pub attributes: u64,
    /// The largest number of vCPUs.
    pub max_vcpus: u32,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// The index of this vCPU.
    pub vcpu: u32,
}

impl TdInfo {
    /// ATTRIBUTES.DEBUG: the host can read and write everything. No secret belongs here.
    pub const DEBUG: u64 = 1;
    /// ATTRIBUTES.SEPT_VE_DISABLE: a page that is not accepted makes the TD exit, not a #VE. A
    /// kernel should insist on it: without it the host can raise #VE at any instruction of its
    /// choice, by taking away the page that the instruction needs, also where the kernel cannot
    /// take an exception (the first instructions of a system call, where the stack is not set up).
    pub const SEPT_VE_DISABLE: u64 = 1 << 28;

    /// The registers to ask with.
    pub fn request() -> Regs {
        Regs {
            rax: leaf::VP_INFO,
            ..Regs::default()
        }
    }

    /// From what came back.
    ///
    /// # Errors
    /// The status, if it is not success. A width that is neither 48 nor 52 comes with SUCCESS as
    /// the error.
    pub fn from_regs(regs: &Regs) -> Result<Self, CompletionStatus> {
        let status = CompletionStatus(regs.rax);
        let gpaw = Gpaw::from_bits(regs.rcx & 0x3F).ok_or(status)?;
        if !status.is_success() {
            return Err(status);
        }
        Ok(Self {
            gpaw,
            attributes: regs.rdx,
            max_vcpus: (regs.r8 >> 32) as u32,
            vcpus: regs.r8 as u32,
            vcpu: regs.r9 as u32,
        })
    }

    /// Returns whether the host can debug the TD.
    pub const fn is_debug(&self) -> bool {
        self.attributes & Self::DEBUG != 0
    }
}

/// TDG.VP.VEINFO.GET: why there was a #VE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VeInfo {
    /// The VMX exit reason.
    pub reason: u32,
    /// The exit qualification.
    pub qualification: u64,
    /// The linear address of an EPT violation.
    pub gla: u64,
    /// The guest-physical address of an EPT violation, with the shared bit.
    pub gpa: u64,
    /// The length of the instruction.
    pub instruction_length: u32,
    /// VM-exit instruction information.
    pub instruction_info: u32,
}

/// The event behind a #VE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VeKind {
    /// An instruction to emulate with the host's help, by its exit reason.
    Instruction(u32),
    /// An access to device memory: to be emulated with [`Vmcall::MmioRead`](super::Vmcall) and
    /// `MmioWrite`, and only if the kernel mapped a device there.
    Device {
        /// The address, without the shared bit.
        gpa: u64,
    },
    /// A private page that the host gave and the guest has not accepted. If the kernel accepted this page
    /// before, the host took it away and put another in its place: the data is gone and the kernel
    /// must not go on. **Accepting it here would turn that into silent zeros.**
    NotAccepted {
        /// The address.
        gpa: u64,
    },
}

impl VeInfo {
    const EPT_VIOLATION: u32 = 48;

    /// The registers to ask with. Asking makes the information go; until then another #VE is a
    /// double fault.
    pub fn request() -> Regs {
        Regs {
            rax: leaf::VP_VEINFO_GET,
            ..Regs::default()
        }
    }

    /// From what came back; `None` where there was no #VE.
    ///
    /// # Errors
    /// The status, if it is another.
    pub fn from_regs(regs: &Regs) -> Result<Option<Self>, CompletionStatus> {
        let status = CompletionStatus(regs.rax);
        match status.code() {
            CompletionStatus::SUCCESS => Ok(Some(Self {
                reason: regs.rcx as u32,
                qualification: regs.rdx,
                gla: regs.r8,
                gpa: regs.r9,
                instruction_length: regs.r10 as u32,
                instruction_info: (regs.r10 >> 32) as u32,
            })),
            CompletionStatus::NO_VALID_VE_INFO => Ok(None),
            _ => Err(status),
        }
    }

    /// The event, decoded for the kernel.
    pub const fn kind(&self, gpaw: Gpaw) -> VeKind {
        match (self.reason, self.gpa & gpaw.shared_bit() != 0) {
            (Self::EPT_VIOLATION, true) => VeKind::Device {
                gpa: self.gpa & !gpaw.shared_bit(),
            },
            (Self::EPT_VIOLATION, false) => VeKind::NotAccepted { gpa: self.gpa },
            (reason, _) => VeKind::Instruction(reason),
        }
    }
}

/// TDG.MR.REPORT: writes a TDREPORT of 1024 bytes at `report` (aligned to 1024) over the 64 bytes
/// at `data` (aligned to 64). Both addresses are as the TD uses them, and private if the report is to
/// be kept from the host.
pub fn report_request(report: u64, data: u64) -> Regs {
    Regs {
        rax: leaf::MR_REPORT,
        rcx: report,
        rdx: data,
        ..Regs::default()
    }
}

/// TDG.MR.RTMR.EXTEND: extends RTMR `index` (0 to 3) by the 48 bytes at the private address `data`,
/// aligned to 64.
pub fn rtmr_extend_request(data: u64, index: u64) -> Regs {
    Regs {
        rax: leaf::MR_RTMR_EXTEND,
        rcx: data,
        rdx: index,
        ..Regs::default()
    }
}
