//! What a vCPU of an SEV guest leaves it for, and what the host answers.

use kvm_ops_guest::sev::MsrRequest;
use soft_amd_sp::AccessFault;
use std::fmt;

/// A VM exit, as the host gets it.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// VMGEXIT with a request in the GHCB MSR ([`MsrRequest::from_msr`]).
    Msr(u64),
    /// VMMCALL.
    Hypercall {
        /// RAX.
        nr: u64,
        /// RBX, RCX, RDX, RSI.
        args: [u64; 4],
    },
    /// VMGEXIT with the address of the GHCB in the GHCB MSR
    /// ([`Hypervisor::ghcb`](super::Hypervisor::ghcb)).
    Ghcb {
        /// The page.
        gpa: u64,
    },
    /// A nested page fault: the nested page table has no such page, or the RMP does not agree with it.
    Fault(AccessFault),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Msr(msr) => match MsrRequest::from_msr(*msr) {
                Some(request) => write!(f, "{request:x?}"),
                None => write!(f, "VMGEXIT with {msr:#018x} in the GHCB MSR"),
            },
            Self::Ghcb { gpa } => write!(f, "VMGEXIT with the GHCB at {gpa:#x}"),
            Self::Hypercall { nr, .. } => write!(f, "hypercall {nr:#x}"),
            Self::Fault(fault) => fault.fmt(f),
        }
    }
}

/// The host's answer to an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Enters again. A request stays in the GHCB MSR, as KVM leaves one that it does not know; a
    /// hypercall has answered 0; an access is tried again.
    Enter,
    /// Enters again with this value in the GHCB MSR, or in RAX of a hypercall.
    Value(u64),
    /// Does not enter the vCPU again.
    Stop,
}
