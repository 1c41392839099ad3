//! Blocking calls, for a kernel that can execute TDCALL in place.

use super::info::{report_request, rtmr_extend_request};
use super::{
    Accept, CallError, CompletionStatus, Convert, ConvertError, Gpaw, Progress, Regs, TdInfo,
    TdcallPort, VeInfo, Vmcall, Width,
};
use crate::{Flush, GpaRange, Privacy, RangeError};
use core::fmt;

/// A TD's kernel, in front of a [`TdcallPort`].
///
/// ```
/// use kvm_ops_guest::tdx::{Gpaw, Regs, TdGuest, TdcallPort};
/// use kvm_ops_guest::GpaRange;
///
/// /// An honest host and module, in two lines.
/// struct Port;
/// impl TdcallPort for Port {
///     fn tdcall(&mut self, regs: &mut Regs) {
///         (regs.rax, regs.r10) = (0, 0);
///     }
/// }
///
/// let mut guest = TdGuest::with_gpaw(Port, Gpaw::Bits48);
/// let buffer = GpaRange::pages(0x10_0000, 4)?;
/// // Unmap the range on all processors, then:
/// guest.share(buffer, |flush| {
///     assert!(flush.caches && flush.tlb);
///     // clflush the range, shoot down TLBs
/// })?;
/// // Map it as shared, use it, unmap it, and have it back:
/// guest.unshare(buffer, |flush| assert!(flush.tlb))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct TdGuest<P> {
    port: P,
    gpaw: Gpaw,
}

impl<P: TdcallPort> TdGuest<P> {
    /// Asks the module for the width of addresses.
    ///
    /// # Errors
    /// See [`TdInfo::from_regs`].
    pub fn new(mut port: P) -> Result<Self, CompletionStatus> {
        let mut regs = TdInfo::request();
        port.tdcall(&mut regs);
        let gpaw = TdInfo::from_regs(&regs)?.gpaw;
        Ok(Self { port, gpaw })
    }

    /// With a width that is known.
    pub const fn with_gpaw(port: P, gpaw: Gpaw) -> Self {
        Self { port, gpaw }
    }

    /// The width of addresses.
    pub const fn gpaw(&self) -> Gpaw {
        self.gpaw
    }

    /// The port.
    pub fn port(&mut self) -> &mut P {
        &mut self.port
    }

    /// Makes private pages shared. `flush` is called before the call to the host; see [`Flush`] for
    /// what must hold by then. The contents of the pages afterwards are the host's choice.
    ///
    /// # Errors
    /// See [`TdError`]. After [`TdError::Convert`] the rest is in no known state.
    pub fn share(&mut self, range: GpaRange, flush: impl FnMut(Flush)) -> Result<(), TdError> {
        self.convert(Convert::new(range, Privacy::Shared, self.gpaw)?, flush)
    }

    /// Makes shared pages private and accepts them: they hold zeros afterwards.
    ///
    /// # Errors
    /// As [`TdGuest::share`].
    pub fn unshare(&mut self, range: GpaRange, flush: impl FnMut(Flush)) -> Result<(), TdError> {
        self.convert(Convert::new(range, Privacy::Private, self.gpaw)?, flush)
    }

    /// Runs a conversion to its end.
    ///
    /// # Errors
    /// As [`TdGuest::share`].
    pub fn convert(
        &mut self,
        mut convert: Convert,
        flush: impl FnMut(Flush),
    ) -> Result<(), TdError> {
        self.run(|last| convert.next(last), flush)
    }

    /// Accepts pages that the host gave at start, or by hot plug: they hold zeros afterwards.
    ///
    /// # Errors
    /// As [`TdGuest::share`].
    pub fn accept(&mut self, range: GpaRange) -> Result<(), TdError> {
        self.run_accept(Accept::new(range, self.gpaw)?)
    }

    /// Runs an acceptance to its end.
    ///
    /// # Errors
    /// As [`TdGuest::share`].
    pub fn run_accept(&mut self, mut accept: Accept) -> Result<(), TdError> {
        self.run(|last| accept.next(last), |_| ())
    }

    fn run(
        &mut self,
        mut next: impl FnMut(Option<&Regs>) -> Progress,
        mut flush: impl FnMut(Flush),
    ) -> Result<(), TdError> {
        let mut last = None;
        loop {
            match next(last.as_ref()) {
                Progress::Flush(what) => {
                    flush(what);
                    last = None;
                }
                Progress::Call(mut regs) => {
                    self.port.tdcall(&mut regs);
                    last = Some(regs);
                }
                Progress::Done => return Ok(()),
                Progress::Failed(error) => return Err(error.into()),
            }
        }
    }

    /// Calls the host.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn vmcall(&mut self, call: Vmcall) -> Result<[u64; 4], CallError> {
        let mut regs = call.regs(self.gpaw)?;
        self.port.tdcall(&mut regs);
        call.answer(&regs)
    }

    /// Reads device memory through the host.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn mmio_read(&mut self, gpa: u64, width: Width) -> Result<u64, CallError> {
        let [value, ..] = self.vmcall(Vmcall::MmioRead { gpa, width })?;
        Ok(value)
    }

    /// Writes device memory through the host.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn mmio_write(&mut self, gpa: u64, width: Width, value: u64) -> Result<(), CallError> {
        self.vmcall(Vmcall::MmioWrite { gpa, width, value })
            .map(|_| ())
    }

    /// Reads an I/O port.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn io_read(&mut self, port: u16, width: Width) -> Result<u64, CallError> {
        let [value, ..] = self.vmcall(Vmcall::In { port, width })?;
        Ok(value)
    }

    /// Writes an I/O port.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn io_write(&mut self, port: u16, width: Width, value: u64) -> Result<(), CallError> {
        self.vmcall(Vmcall::Out { port, width, value }).map(|_| ())
    }

    /// The module's information on this TD and vCPU.
    ///
    /// # Errors
    /// See [`TdInfo::from_regs`].
    pub fn info(&mut self) -> Result<TdInfo, CompletionStatus> {
        TdInfo::from_regs(&self.plain(TdInfo::request()))
    }

    /// Why there was a #VE; to be called in its handler, once.
    ///
    /// # Errors
    /// See [`VeInfo::from_regs`].
    pub fn ve_info(&mut self) -> Result<Option<VeInfo>, CompletionStatus> {
        VeInfo::from_regs(&self.plain(VeInfo::request()))
    }

    /// Writes a TDREPORT: see [`report_request`].
    ///
    /// # Errors
    /// The module's status.
    pub fn report(&mut self, report: u64, data: u64) -> Result<(), CompletionStatus> {
        success(self.plain(report_request(report, data)))
    }

    /// Extends a run-time measurement: see [`rtmr_extend_request`].
    ///
    /// # Errors
    /// The module's status.
    pub fn rtmr_extend(&mut self, data: u64, index: u64) -> Result<(), CompletionStatus> {
        success(self.plain(rtmr_extend_request(data, index)))
    }

    fn plain(&mut self, mut regs: Regs) -> Regs {
        self.port.tdcall(&mut regs);
        regs
    }
}

fn success(regs: Regs) -> Result<(), CompletionStatus> {
    match CompletionStatus(regs.rax) {
        status if status.is_success() => Ok(()),
        status => Err(status),
    }
}

/// Why memory was not converted or accepted.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TdError {
    /// Nothing was done: the range is not one of this TD's.
    Range(RangeError),
    /// It stopped on the way.
    Convert(ConvertError),
}

impl fmt::Display for TdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Range(_) => "range not allowed",
            Self::Convert(_) => "memory not converted",
        })
    }
}

impl core::error::Error for TdError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Range(error) => Some(error),
            Self::Convert(error) => Some(error),
        }
    }
}

impl From<RangeError> for TdError {
    fn from(error: RangeError) -> Self {
        Self::Range(error)
    }
}

impl From<ConvertError> for TdError {
    fn from(error: ConvertError) -> Self {
        Self::Convert(error)
    }
}
