//! The instructions of an SEV guest as ports, and the steps of machines that use them.

use super::{ConvertError, Permissions, Vmpl};
use crate::{Flush, PageSize};
use core::fmt;

/// Exchanges a value with the host through the GHCB MSR (C001_0130h).
pub trait GhcbMsrPort {
    /// Writes the MSR, executes VMGEXIT, reads the MSR.
    ///
    /// Nothing else may use the MSR in between: interrupts are off, and the value that was there
    /// before (the GHCB's address) is put back.
    fn exchange(&mut self, request: u64) -> u64;
}

/// Executes PVALIDATE.
pub trait PvalidatePort {
    /// Executes it on the page, through a private mapping of the same size.
    fn pvalidate(&mut self, operation: Pvalidate) -> Validated;
}

/// Executes RMPADJUST.
pub trait RmpadjustPort {
    /// Executes it on the page, through a private mapping of the same size.
    fn rmpadjust(&mut self, operation: Rmpadjust) -> RmpCode;
}

/// Executes VMMCALL.
pub trait HypercallPort {
    /// Calls the host; the answer comes in RAX.
    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> u64;
}

impl<P: GhcbMsrPort + ?Sized> GhcbMsrPort for &mut P {
    fn exchange(&mut self, request: u64) -> u64 {
        (**self).exchange(request)
    }
}

impl<P: PvalidatePort + ?Sized> PvalidatePort for &mut P {
    fn pvalidate(&mut self, operation: Pvalidate) -> Validated {
        (**self).pvalidate(operation)
    }
}

impl<P: RmpadjustPort + ?Sized> RmpadjustPort for &mut P {
    fn rmpadjust(&mut self, operation: Rmpadjust) -> RmpCode {
        (**self).rmpadjust(operation)
    }
}

impl<P: HypercallPort + ?Sized> HypercallPort for &mut P {
    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> u64 {
        (**self).hypercall(nr, args)
    }
}

/// PVALIDATE: says that a page the host assigned is, or is no longer, the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pvalidate {
    /// The page, without the C-bit.
    pub gpa: u64,
    /// 4 KiB or 2 MiB.
    pub size: PageSize,
    /// Set *validated*, or clear it.
    pub validate: bool,
}

/// The result of PVALIDATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validated {
    /// EAX.
    pub code: RmpCode,
    /// The carry flag: the page was what it should become already.
    pub unchanged: bool,
}

/// RMPADJUST: what a lower VMPL may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rmpadjust {
    /// The page, without the C-bit.
    pub gpa: u64,
    /// 4 KiB or 2 MiB.
    pub size: PageSize,
    /// The VMPL whose permissions change.
    pub target: Vmpl,
    /// Its permissions.
    pub permissions: Permissions,
    /// The page becomes the register state of a vCPU.
    pub vmsa: bool,
}

impl Rmpadjust {
    /// RDX of the instruction: VMPL in bits 7 to 0, permissions in 15 to 8, VMSA in 16.
    pub const fn operand(&self) -> u64 {
        let vmpl = self.target as u64;
        let permissions = self.permissions.bits() as u64;
        let vmsa = self.vmsa as u64;
        vmpl | permissions << 8 | vmsa << 16
    }
}

/// The values that PVALIDATE and RMPADJUST leave in EAX (APM vol. 3).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RmpCode(pub u32);

impl RmpCode {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// An operand is not valid.
    pub const FAIL_INPUT: Self = Self(1);
    /// The caller's VMPL may not do it.
    pub const FAIL_PERMISSION: Self = Self(2);
    /// The host assigned the range in 4 KiB pages.
    pub const FAIL_SIZEMISMATCH: Self = Self(6);
}

impl fmt::Display for RmpCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SUCCESS => f.write_str("SUCCESS"),
            Self::FAIL_INPUT => f.write_str("FAIL_INPUT"),
            Self::FAIL_PERMISSION => f.write_str("FAIL_PERMISSION"),
            Self::FAIL_SIZEMISMATCH => f.write_str("FAIL_SIZEMISMATCH"),
            Self(other) => write!(f, "code {other:#x}"),
        }
    }
}

impl fmt::Debug for RmpCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RmpCode({self})")
    }
}

/// The next request of a state machine, or its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Flush this of the machine's range, then ask for the next step with `None`.
    Flush(Flush),
    /// Execute PVALIDATE; answer with [`Reply::Pvalidate`].
    Pvalidate(Pvalidate),
    /// Execute RMPADJUST; answer with [`Reply::Rmpadjust`].
    Rmpadjust(Rmpadjust),
    /// Exchange this through the GHCB MSR; answer with [`Reply::GhcbMsr`].
    GhcbMsr(u64),
    /// VMMCALL with this number and these arguments; answer with [`Reply::Hypercall`].
    Hypercall(u64, [u64; 4]),
    /// It is done.
    Done,
    /// It is over before its end.
    Failed(ConvertError),
}

/// The result of a request. `None` instead says that it was not executed; it comes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Of [`Progress::Pvalidate`].
    Pvalidate(Validated),
    /// Of [`Progress::Rmpadjust`].
    Rmpadjust(RmpCode),
    /// Of [`Progress::GhcbMsr`]: the MSR afterwards.
    GhcbMsr(u64),
    /// Of [`Progress::Hypercall`]: RAX.
    Hypercall(u64),
}
