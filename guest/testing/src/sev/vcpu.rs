//! The processor of an SEV guest: VMGEXIT, VMMCALL, PVALIDATE, RMPADJUST and memory.

use super::fault::{Access, StopCause, Stopped};
use super::guest::Inner;
use super::{Exit, Fault, Hypervisor, Reply};
use crate::pieces::pieces;
use crate::running;
use crate::sync::lock;
use kvm_ops_guest::PageSize as GuestSize;
use kvm_ops_guest::sev::{
    GhcbMsrPort, HypercallPort, MsrRequest, Pvalidate, PvalidatePort, RmpCode, Rmpadjust,
    RmpadjustPort, SevGuest, Validated,
};
use soft_amd_sp::{AccessFault, GuestPage, GuestRmpError, PageSize, Platform, RmpAdjust, RmpError};
use std::sync::Arc;

/// Faults in a row at one instruction, after which nothing is expected of the host any more.
const PATIENCE: u32 = 10_000;

/// A vCPU of a [`TestSev`](super::TestSev), as the code that runs on it has it: the ports of
/// [`SevGuest`], and the guest's loads and stores.
pub struct Vcpu {
    inner: Arc<Inner>,
    vmpl: u8,
}

impl Vcpu {
    pub(super) fn new(inner: Arc<Inner>, vmpl: u8) -> Self {
        Self { inner, vmpl }
    }

    /// The same vCPU at another VMPL, 0 to 3; above that nothing can be executed.
    #[must_use]
    pub fn at_vmpl(mut self, vmpl: u8) -> Self {
        self.vmpl = vmpl;
        self
    }

    /// A kernel in front of this vCPU.
    pub fn kernel(&mut self) -> SevGuest<&mut Self> {
        let coherent = self.inner.coherent;
        SevGuest::new(self, coherent)
    }

    /// Reads private memory (C-bit set).
    ///
    /// # Errors
    /// #VC of a page that is not validated, or the host did not enter the vCPU again.
    pub fn read(&mut self, gpa: u64, len: usize) -> Result<Vec<u8>, Fault> {
        self.read_as(Access::Read, gpa, len, |p, page, data| {
            p.guest_read(page, data)
        })
    }

    /// Reads shared memory (C-bit clear).
    ///
    /// # Errors
    /// As [`Vcpu::read`].
    pub fn read_shared(&mut self, gpa: u64, len: usize) -> Result<Vec<u8>, Fault> {
        self.read_as(Access::ReadShared, gpa, len, |p, page, data| {
            p.guest_read_shared(page, data)
        })
    }

    /// Writes private memory (C-bit set).
    ///
    /// # Errors
    /// As [`Vcpu::read`]; pages before the one at fault are written.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.write_as(Access::Write, gpa, bytes, |p, page, data| {
            p.guest_write(page, data)
        })
    }

    /// Writes shared memory (C-bit clear).
    ///
    /// # Errors
    /// As [`Vcpu::write`].
    pub fn write_shared(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.write_as(Access::WriteShared, gpa, bytes, |p, page, data| {
            p.guest_write_shared(page, data)
        })
    }

    fn read_as(
        &self,
        access: Access,
        gpa: u64,
        len: usize,
        read: impl Fn(&Platform, &GuestPage, &mut [u8]) -> Result<(), AccessFault>,
    ) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::new();
        for (at, len) in pieces(gpa, len) {
            let start = bytes.len();
            bytes.resize(start + len, 0);
            let piece = &mut bytes[start..];
            self.touch(access, at, |p, page| read(p, page, piece))?;
        }
        Ok(bytes)
    }

    fn write_as(
        &self,
        access: Access,
        gpa: u64,
        bytes: &[u8],
        write: impl Fn(&Platform, &GuestPage, &[u8]) -> Result<(), AccessFault>,
    ) -> Result<(), Fault> {
        let mut rest = bytes;
        for (at, len) in pieces(gpa, bytes.len()) {
            let (piece, after) = rest.split_at(len);
            self.touch(access, at, |p, page| write(p, page, piece))?;
            rest = after;
        }
        Ok(())
    }

    /// Executes an instruction on a page until it does not fault, or nothing cures the fault.
    fn touch<R>(
        &self,
        access: Access,
        gpa: u64,
        mut execute: impl FnMut(&Platform, &GuestPage) -> Result<R, AccessFault>,
    ) -> Result<R, Fault> {
        let hypervisor = self.hypervisor();
        let stop = |cause| {
            Fault::Stopped(Stopped {
                access: Some((access, gpa)),
                cause,
            })
        };
        let mut fault = AccessFault::NestedPage { gpa, error_code: 0 };
        if !self.inner.is_ram(gpa) {
            return Err(stop(StopCause::NoMemory));
        }
        for _ in 0..PATIENCE {
            fault = match hypervisor.guest_page(gpa, self.vmpl) {
                None => AccessFault::NestedPage { gpa, error_code: 0 },
                Some(page) => match execute(&self.inner.machine.p, &page) {
                    Ok(done) => return Ok(done),
                    Err(fault) => fault,
                },
            };
            match fault {
                AccessFault::NotValidated { .. } => {
                    return Err(Fault::NotValidated { gpa, access });
                }
                AccessFault::NestedPage { .. } => {}
                other => return Err(stop(StopCause::Refused(other))),
            }
            match self.ask_host(Exit::Fault(fault)) {
                Reply::Stop => return Err(stop(self.why(access, gpa, fault))),
                Reply::Enter | Reply::Value(_) => {}
            }
        }
        Err(stop(StopCause::NoProgress(fault)))
    }

    fn why(&self, access: Access, gpa: u64, fault: AccessFault) -> StopCause {
        match (access.is_shared(), self.hypervisor().is_shared(gpa)) {
            (true, false) => StopCause::NotShared,
            (false, true) => StopCause::NotPrivate,
            _ => StopCause::Nested(fault),
        }
    }

    fn hypervisor(&self) -> Hypervisor<'_> {
        Hypervisor { inner: &self.inner }
    }

    pub(super) fn ask_host(&self, exit: Exit) -> Reply {
        self.inner.note(exit);
        (lock(&self.inner.host))(&self.hypervisor(), &exit)
    }

    /// VMGEXIT with a value in the GHCB MSR; the value afterwards.
    ///
    /// # Errors
    /// The host did not enter the vCPU again.
    pub fn vmgexit(&mut self, request: u64) -> Result<u64, Stopped> {
        match self.ask_host(Exit::Msr(request)) {
            Reply::Enter => Ok(request),
            Reply::Value(response) => Ok(response),
            Reply::Stop => Err(Stopped {
                access: None,
                cause: match MsrRequest::from_msr(request) {
                    Some(MsrRequest::Terminate(why)) => StopCause::Terminated(why),
                    _ => StopCause::Denied(Exit::Msr(request)),
                },
            }),
        }
    }

    /// VMMCALL; RAX afterwards.
    ///
    /// # Errors
    /// The host did not enter the vCPU again.
    pub fn vmmcall(&mut self, nr: u64, args: [u64; 4]) -> Result<u64, Stopped> {
        let exit = Exit::Hypercall { nr, args };
        match self.ask_host(exit) {
            Reply::Enter => Ok(0),
            Reply::Value(rax) => Ok(rax),
            Reply::Stop => Err(Stopped::denied(exit)),
        }
    }

    /// PVALIDATE.
    ///
    /// # Errors
    /// The host did not enter the vCPU again after a fault, or the processor refused the instruction.
    pub fn try_pvalidate(&mut self, operation: Pvalidate) -> Result<Validated, Fault> {
        let result = match rmp_size(operation.size) {
            None => Validated {
                code: RmpCode::FAIL_INPUT,
                unchanged: false,
            },
            Some(size) => self.touch(Access::Pvalidate, operation.gpa, |p, page| {
                let done = p.pvalidate(page, size, operation.validate);
                let (code, changed) = completed(done)?;
                Ok(Validated {
                    code,
                    unchanged: changed == Some(false),
                })
            })?,
        };
        self.inner.note_pvalidate(operation, result);
        Ok(result)
    }

    /// RMPADJUST.
    ///
    /// # Errors
    /// As [`Vcpu::try_pvalidate`].
    pub fn try_rmpadjust(&mut self, operation: Rmpadjust) -> Result<RmpCode, Fault> {
        let Some(size) = rmp_size(operation.size) else {
            return Ok(RmpCode::FAIL_INPUT);
        };
        let adjust = RmpAdjust {
            target_vmpl: operation.target as u8,
            permissions: operation.permissions.bits(),
            vmsa: operation.vmsa,
        };
        self.touch(Access::Rmpadjust, operation.gpa, |p, page| {
            completed(p.rmpadjust(page, size, &adjust)).map(|(code, _)| code)
        })
    }
}

/// RCX of PVALIDATE and RMPADJUST has two sizes.
fn rmp_size(size: GuestSize) -> Option<PageSize> {
    match size {
        GuestSize::Size4K => Some(PageSize::Size4K),
        GuestSize::Size2M => Some(PageSize::Size2M),
        GuestSize::Size1G => None,
    }
}

/// EAX of an instruction that completed, and its result.
fn completed<T>(result: Result<T, GuestRmpError>) -> Result<(RmpCode, Option<T>), AccessFault> {
    match result {
        Ok(value) => Ok((RmpCode::SUCCESS, Some(value))),
        Err(GuestRmpError::Fault(fault)) => Err(fault),
        Err(GuestRmpError::Code(code)) => match RmpError::code(code) {
            Some(code) => Ok((RmpCode(code), None)),
            None => Err(AccessFault::GeneralProtection),
        },
        // Another way to fail would be a fault too.
        Err(_) => Err(AccessFault::GeneralProtection),
    }
}

impl GhcbMsrPort for Vcpu {
    /// VMGEXIT. A vCPU that the host does not enter again unwinds the code under test, up to
    /// [`TestSev::run`](super::TestSev::run), which returns the reason; outside of it, this panics with the
    /// reason. So do the other ports.
    fn exchange(&mut self, request: u64) -> u64 {
        self.vmgexit(request)
            .unwrap_or_else(|stopped| running::leave(stopped))
    }
}

impl HypercallPort for Vcpu {
    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> u64 {
        self.vmmcall(nr, args)
            .unwrap_or_else(|stopped| running::leave(stopped))
    }
}

impl PvalidatePort for Vcpu {
    fn pvalidate(&mut self, operation: Pvalidate) -> Validated {
        self.try_pvalidate(operation)
            .unwrap_or_else(|fault| running::leave(fault.into_stopped()))
    }
}

impl RmpadjustPort for Vcpu {
    fn rmpadjust(&mut self, operation: Rmpadjust) -> RmpCode {
        self.try_rmpadjust(operation)
            .unwrap_or_else(|fault| running::leave(fault.into_stopped()))
    }
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpu")
            .field("vmpl", &self.vmpl)
            .finish_non_exhaustive()
    }
}
