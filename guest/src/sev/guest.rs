//! Blocking calls, for a kernel that can execute VMGEXIT and PVALIDATE in place.

use super::msr::{self, CpuidRegister, Features, ResponseError, SevInfo, Termination};
use super::{
    Adjust, Convert, ConvertError, GhcbMsrPort, HypercallPort, Kind, Permissions, Progress,
    PvalidatePort, Reply, RmpadjustPort, Validate, Vmpl,
};
use crate::{Flush, GpaRange, Privacy, RangeError};
use core::fmt;

/// An SEV guest's kernel, in front of its ports.
///
/// The port's traits decide which methods it has: an SEV guest has VMMCALL only, an
/// SEV-ES guest has the GHCB MSR, an SNP guest PVALIDATE as well.
#[derive(Clone, Debug)]
pub struct SevGuest<P> {
    port: P,
    coherent: bool,
}

/// Versions of the GHCB protocol that a guest speaks, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The lowest: 2 for SNP, which needs what 2 brought.
    pub min: u16,
    /// The highest.
    pub max: u16,
}

impl Versions {
    /// The protocol of an SEV-ES guest.
    pub const ES: Self = Self { min: 1, max: 2 };
    /// The protocol of an SNP guest.
    pub const SNP: Self = Self { min: 2, max: 2 };

    /// The highest version that both speak. `None` if there is none; a host whose own minimum is
    /// above its maximum speaks none.
    pub const fn common(self, host: SevInfo) -> Option<u16> {
        let max = if host.max < self.max {
            host.max
        } else {
            self.max
        };
        if max < self.min || max < host.min {
            return None;
        }
        Some(max)
    }
}

impl<P> SevGuest<P> {
    /// In front of `port`. `coherent` is SME_COHERENT, see [`Convert::coherent`].
    pub const fn new(port: P, coherent: bool) -> Self {
        Self { port, coherent }
    }

    /// The port.
    pub fn port(&mut self) -> &mut P {
        &mut self.port
    }
}

impl<P: GhcbMsrPort> SevGuest<P> {
    /// Agrees with the host on a version of the GHCB protocol.
    ///
    /// # Errors
    /// The host gave no answer, or speaks none of `ours`. The guest then asks to be ended with
    /// [`Termination::PROTOCOL`].
    pub fn negotiate(&mut self, ours: Versions) -> Result<u16, MsrError> {
        let host = self.sev_info()?;
        ours.common(host).ok_or(MsrError::NoCommonVersion(host))
    }

    /// The host's answer to the SEV information request.
    ///
    /// # Errors
    /// See [`ResponseError`].
    pub fn sev_info(&mut self) -> Result<SevInfo, ResponseError> {
        msr::sev_info(self.port.exchange(msr::SEV_INFO_REQUEST))
    }

    /// EAX, EBX, ECX and EDX of a CPUID function, as the host says. An SNP guest takes what
    /// matters from its CPUID page instead.
    ///
    /// # Errors
    /// See [`ResponseError`].
    pub fn cpuid(&mut self, function: u32) -> Result<[u32; 4], ResponseError> {
        use CpuidRegister::{Eax, Ebx, Ecx, Edx};
        let mut values = [0; 4];
        for (value, register) in values.iter_mut().zip([Eax, Ebx, Ecx, Edx]) {
            let request = msr::cpuid_request(function, register);
            *value = msr::cpuid(self.port.exchange(request), register)?;
        }
        Ok(values)
    }

    /// The features that the host claims.
    ///
    /// # Errors
    /// See [`ResponseError`].
    pub fn features(&mut self) -> Result<Features, ResponseError> {
        msr::features(self.port.exchange(msr::FEATURES_REQUEST))
    }

    /// Tells the host where the GHCB is: a shared page. SNP only.
    ///
    /// # Errors
    /// See [`ResponseError`]. The guest then asks to be ended.
    pub fn register_ghcb(&mut self, gpa: u64) -> Result<(), ResponseError> {
        let request = msr::register_ghcb_request(gpa);
        msr::register_ghcb(self.port.exchange(request), gpa)
    }

    /// Asks to be ended. The host may enter the guest again, so the caller halts in a loop.
    pub fn terminate(&mut self, why: Termination) {
        self.port.exchange(why.request());
    }
}

impl<P: HypercallPort> SevGuest<P> {
    /// Tells the host of an SEV or SEV-ES guest what its pages are; the C-bit in the guest's page
    /// tables is the kernel's to change, before or after.
    ///
    /// # Errors
    /// See [`SevError`].
    pub fn notify(
        &mut self,
        range: GpaRange,
        to: Privacy,
        flush: impl FnMut(Flush),
    ) -> Result<(), SevError> {
        let mut convert = Convert::new(range, to, Kind::Legacy)?.coherent(self.coherent);
        drive(
            |last| convert.next(last),
            flush,
            |step| match step {
                Progress::Hypercall(nr, args) => {
                    Some(Reply::Hypercall(self.port.hypercall(nr, args)))
                }
                _ => None,
            },
        )
    }
}

impl<P: GhcbMsrPort + PvalidatePort> SevGuest<P> {
    /// Makes private pages of an SNP guest shared. `flush` is called first; see [`Flush`].
    ///
    /// # Errors
    /// See [`SevError`].
    pub fn share(&mut self, range: GpaRange, flush: impl FnMut(Flush)) -> Result<(), SevError> {
        self.convert(Convert::new(range, Privacy::Shared, Kind::Snp)?, flush)
    }

    /// Makes shared pages of an SNP guest private. Their contents are undefined until written.
    ///
    /// # Errors
    /// See [`SevError`].
    pub fn unshare(&mut self, range: GpaRange, flush: impl FnMut(Flush)) -> Result<(), SevError> {
        self.convert(Convert::new(range, Privacy::Private, Kind::Snp)?, flush)
    }

    fn convert(&mut self, convert: Convert, flush: impl FnMut(Flush)) -> Result<(), SevError> {
        let mut convert = convert.coherent(self.coherent);
        drive(
            |last| convert.next(last),
            flush,
            |step| match step {
                Progress::Pvalidate(operation) => {
                    Some(Reply::Pvalidate(self.port.pvalidate(operation)))
                }
                Progress::GhcbMsr(request) => Some(Reply::GhcbMsr(self.port.exchange(request))),
                _ => None,
            },
        )
    }
}

impl<P: PvalidatePort> SevGuest<P> {
    /// Validates pages that the host assigned at start, or by hot plug.
    ///
    /// # Errors
    /// See [`SevError`].
    pub fn validate(&mut self, range: GpaRange) -> Result<(), SevError> {
        self.run_validate(Validate::new(range, true)?)
    }

    /// Runs a validation to its end.
    ///
    /// # Errors
    /// See [`SevError`].
    pub fn run_validate(&mut self, mut validate: Validate) -> Result<(), SevError> {
        drive(
            |last| validate.next(last),
            |_| (),
            |step| match step {
                Progress::Pvalidate(operation) => {
                    Some(Reply::Pvalidate(self.port.pvalidate(operation)))
                }
                _ => None,
            },
        )
    }
}

impl<P: RmpadjustPort> SevGuest<P> {
    /// Lets a lower VMPL do `permissions` in a validated range, and nothing else.
    ///
    /// # Errors
    /// See [`SevError`].
    pub fn adjust(
        &mut self,
        range: GpaRange,
        target: Vmpl,
        permissions: Permissions,
    ) -> Result<(), SevError> {
        let mut adjust = Adjust::new(range, target, permissions)?;
        drive(
            |last| adjust.next(last),
            |_| (),
            |step| match step {
                Progress::Rmpadjust(operation) => {
                    Some(Reply::Rmpadjust(self.port.rmpadjust(operation)))
                }
                _ => None,
            },
        )
    }
}

/// Takes a machine to its end. A machine asks only for what its table of steps names; if it asked
/// for something that `execute` does not know, the answer below would end it.
fn drive(
    mut next: impl FnMut(Option<Reply>) -> Progress,
    mut flush: impl FnMut(Flush),
    mut execute: impl FnMut(Progress) -> Option<Reply>,
) -> Result<(), SevError> {
    const REFUSED: Reply = Reply::Hypercall(u64::MAX);
    let mut last = None;
    loop {
        match next(last) {
            Progress::Done => return Ok(()),
            Progress::Failed(error) => return Err(error.into()),
            Progress::Flush(what) => {
                flush(what);
                last = None;
            }
            step => last = Some(execute(step).unwrap_or(REFUSED)),
        }
    }
}

/// Why there is no answer from the host.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrError {
    /// Its response is none.
    Response(ResponseError),
    /// It speaks other versions.
    NoCommonVersion(SevInfo),
}

impl fmt::Display for MsrError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Response(_) => f.write_str("no answer from the host"),
            Self::NoCommonVersion(host) => write!(
                f,
                "the host speaks ghcb versions {} to {} only",
                host.min, host.max
            ),
        }
    }
}

impl core::error::Error for MsrError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Response(error) => Some(error),
            Self::NoCommonVersion(_) => None,
        }
    }
}

impl From<ResponseError> for MsrError {
    fn from(error: ResponseError) -> Self {
        Self::Response(error)
    }
}

/// Why memory was not converted, validated or adjusted.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SevError {
    /// Nothing was done: the range is not one of this guest's.
    Range(RangeError),
    /// It stopped on the way.
    Convert(ConvertError),
}

impl fmt::Display for SevError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Range(_) => "range not allowed",
            Self::Convert(_) => "memory not converted",
        })
    }
}

impl core::error::Error for SevError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Range(error) => Some(error),
            Self::Convert(error) => Some(error),
        }
    }
}

impl From<RangeError> for SevError {
    fn from(error: RangeError) -> Self {
        Self::Range(error)
    }
}

impl From<ConvertError> for SevError {
    fn from(error: ConvertError) -> Self {
        Self::Convert(error)
    }
}
