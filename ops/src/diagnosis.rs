//! The reason of a failure with everything named: technology, VM, vCPU, address, access, firmware
//! call, status, and what to do.

use alloc::boxed::Box;
use core::fmt;

use spin::Mutex;

use crate::{Error, Gpa, Privacy, Tech, VcpuId, VmId};

/// A call of firmware and its answer: a SEAMCALL, a command of the AMD SP, or an RMP instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirmwareCall {
    /// The name of the call, as the manuals have it.
    pub name: &'static str,
    /// The status of the answer: RAX of a SEAMCALL, the status of a command, EAX of an instruction.
    pub status: u64,
    /// The name of the status. `None` for a number that the manuals do not name.
    pub status_name: Option<&'static str>,
    /// The operand that the status blames, if it blames one.
    pub operand: Option<&'static str>,
}

impl fmt::Display for FirmwareCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status_name {
            Some(status) => write!(f, "{} answered {status} ({:#x})", self.name, self.status)?,
            None => write!(f, "{} answered status {:#x}", self.name, self.status)?,
        }
        self.operand
            .map_or(Ok(()), |operand| write!(f, " because of {operand}"))
    }
}

/// The reason of a failure, in full. An [`Error`] is two registers; this is what a back end knows
/// beside it.
///
/// ```
/// use kvm_ops_core::{Diagnosis, Error, FirmwareCall, Gpa, Privacy, Tech, VcpuId, VmId};
///
/// let call = FirmwareCall {
///     name: "TDH.MEM.PAGE.AUG",
///     status: 0xc000_0b0d_0000_0001,
///     status_name: Some("TDX_EPT_ENTRY_STATE_INCORRECT"),
///     operand: Some("RCX"),
/// };
/// let diagnosis = Diagnosis::of(Tech::Tdx, VmId(3), Error::Firmware(call.status))
///     .on_vcpu(VcpuId(0))
///     .at(Gpa::new(0x8000), Privacy::Private)
///     .called(call)
///     .advise("destroy it");
/// assert_eq!(
///     diagnosis.to_string(),
///     "tdx VM 3, vCPU 0, private access at 0x8000: TDH.MEM.PAGE.AUG answered \
///      TDX_EPT_ENTRY_STATE_INCORRECT (0xc0000b0d00000001) because of RCX; destroy it"
/// );
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// The technology that holds the VM.
    pub tech: Tech,
    /// The VM.
    pub vm: VmId,
    /// The vCPU, if the failure is one vCPU's.
    pub vcpu: Option<VcpuId>,
    /// The address that was touched, without mask bits, and the kind of memory that it was taken for.
    pub access: Option<(Gpa, Privacy)>,
    /// The call of firmware that failed.
    pub call: Option<FirmwareCall>,
    /// The error that the caller got. `None` for an end without one, such as an exit that the platform
    /// has no answer to.
    pub error: Option<Error>,
    /// The cause in words; empty where call or error say it all.
    pub cause: &'static str,
    /// The way out, in words; empty where there is none.
    pub advice: &'static str,
    /// True if nothing went wrong: the guest left this VM and goes on elsewhere.
    pub gone: bool,
}

impl Diagnosis {
    /// A failure of a VM of which nothing else is known.
    pub const fn new(tech: Tech, vm: VmId) -> Self {
        Self {
            tech,
            vm,
            vcpu: None,
            access: None,
            call: None,
            error: None,
            cause: "",
            advice: "",
            gone: false,
        }
    }

    /// A failure with that error, and the advice that goes with it on every back end.
    pub const fn of(tech: Tech, vm: VmId, error: Error) -> Self {
        let mut this = Self::new(tech, vm);
        this.error = Some(error);
        this.advice = error.advice(tech);
        this
    }

    /// Names the vCPU.
    #[must_use]
    pub const fn on_vcpu(mut self, vcpu: VcpuId) -> Self {
        self.vcpu = Some(vcpu);
        self
    }

    /// Names the address without mask bits, and the access.
    #[must_use]
    pub const fn at(mut self, gpa: Gpa, access: Privacy) -> Self {
        self.access = Some((gpa, access));
        self
    }

    /// Names the call of firmware.
    #[must_use]
    pub const fn called(mut self, call: FirmwareCall) -> Self {
        self.call = Some(call);
        self
    }

    /// Says the cause.
    #[must_use]
    pub const fn because(mut self, cause: &'static str) -> Self {
        self.cause = cause;
        self
    }

    /// Says what to do.
    #[must_use]
    pub const fn advise(mut self, advice: &'static str) -> Self {
        self.advice = advice;
        self
    }

    /// Says that the guest left this VM and goes on elsewhere.
    #[must_use]
    pub const fn gone(mut self) -> Self {
        self.gone = true;
        self
    }

    /// The part of the error that the text needs: cause and call say the others in better words.
    fn told_error(&self) -> Option<Error> {
        let told = self.call.is_some() || !self.cause.is_empty();
        self.error
            .filter(|error| !(told && matches!(error, Error::Firmware(_) | Error::Poisoned)))
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} VM {}", self.tech, self.vm)?;
        if let Some(vcpu) = self.vcpu {
            write!(f, ", vCPU {vcpu}")?;
        }
        if let Some((gpa, access)) = self.access {
            write!(f, ", {access} access at {gpa}")?;
        }
        if !self.cause.is_empty() {
            write!(f, ": {}", self.cause)?;
        }
        if let Some(call) = self.call {
            write!(f, ": {call}")?;
        }
        if let Some(error) = self.told_error() {
            write!(f, ": {error}")?;
        }
        match self.advice {
            "" => Ok(()),
            advice => write!(f, "; {advice}"),
        }
    }
}

impl core::error::Error for Diagnosis {
    /// The error, unless the text has it as the answer of a call.
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        let error = self.error.as_ref().filter(|_| self.call.is_none())?;
        Some(error)
    }
}

/// The failures that a VM remembers, to explain the errors that its callers got.
#[derive(Debug, Default)]
pub(crate) struct Failures(Mutex<Remembered>);

#[derive(Debug, Default)]
struct Remembered {
    /// The one that poisoned the VM.
    fatal: Option<Box<Diagnosis>>,
    /// The last one.
    last: Option<Box<Diagnosis>>,
}

impl Remembered {
    /// The failure that a caller got this error from.
    fn find(&mut self, error: Error) -> Option<&mut Diagnosis> {
        let is_it = |diagnosis: &&mut Box<Diagnosis>| diagnosis.error == Some(error);
        let found = match (self.last.as_mut().filter(is_it), &mut self.fatal) {
            (Some(last), _) => last,
            (None, Some(fatal)) if error == Error::Poisoned || is_it(&fatal) => fatal,
            _ => return None,
        };
        Some(found)
    }
}

impl Failures {
    pub(crate) fn note(&self, diagnosis: Diagnosis) {
        self.0.lock().last = Some(Box::new(diagnosis));
    }

    /// The first fatal failure stays.
    pub(crate) fn note_fatal(&self, diagnosis: Diagnosis) {
        let mut failures = self.0.lock();
        failures.fatal.get_or_insert_with(|| Box::new(diagnosis));
    }

    pub(crate) fn on_vcpu(&self, error: Error, vcpu: VcpuId) {
        let mut failures = self.0.lock();
        if let Some(found) = failures.find(error) {
            found.vcpu.get_or_insert(vcpu);
        }
    }

    pub(crate) fn find(&self, error: Error) -> Option<Diagnosis> {
        self.0.lock().find(error).copied()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use core::error::Error as _;
    use std::string::ToString;

    const CALL: FirmwareCall = FirmwareCall {
        name: "ACTIVATE",
        status: 0xd,
        status_name: Some("INVALID_ASID"),
        operand: None,
    };

    fn of(error: Error) -> Diagnosis {
        Diagnosis::of(Tech::Tdx, VmId(1), error)
    }

    #[test]
    fn a_text_has_every_part_that_is_known_once_and_no_other() {
        let bare = Diagnosis::new(Tech::Svm, VmId(7));
        assert_eq!(bare.to_string(), "svm VM 7");
        assert_eq!(
            bare.on_vcpu(VcpuId(2)).because("it stopped").to_string(),
            "svm VM 7, vCPU 2: it stopped"
        );
        let shared = bare.at(Gpa::new(0x1000), Privacy::Shared);
        assert_eq!(shared.to_string(), "svm VM 7, shared access at 0x1000");
        let called = of(Error::Firmware(0x21_0000_000d)).called(CALL);
        assert_eq!(
            called.to_string(),
            "tdx VM 1: ACTIVATE answered INVALID_ASID (0xd)"
        );
        let nameless = FirmwareCall {
            status_name: None,
            ..CALL
        };
        assert_eq!(nameless.to_string(), "ACTIVATE answered status 0xd");
        let memory = of(Error::NoMemory).because("a page could not be mapped");
        assert!(
            memory
                .to_string()
                .starts_with("tdx VM 1: a page could not be mapped: out of memory; ")
        );
        let poisoned = of(Error::Poisoned).because("an unaccepted page");
        assert_eq!(
            poisoned.to_string(),
            "tdx VM 1: an unaccepted page; destroy the VM"
        );
    }

    #[test]
    fn the_source_is_the_error_unless_the_text_has_it() {
        assert!(of(Error::NoMemory).source().is_some());
        assert!(of(Error::Firmware(1)).called(CALL).source().is_none());
        assert!(Diagnosis::new(Tech::Vmx, VmId(1)).source().is_none());
    }

    #[test]
    fn a_poisoned_vm_is_explained_by_the_first_fatal_failure_and_others_by_their_own() {
        let failures = Failures::default();
        assert_eq!(failures.find(Error::Poisoned), None);
        let (first, second) = (Error::Firmware(1), Error::Firmware(2));
        failures.note_fatal(of(first).because("first"));
        failures.note_fatal(of(second).because("second"));
        failures.note(of(Error::NoMemory).because("later"));
        let cause = |error| failures.find(error).map(|found| found.cause);
        assert_eq!(cause(Error::Poisoned), Some("first"));
        assert_eq!(cause(first), Some("first"));
        assert_eq!(cause(second), None);
        assert_eq!(cause(Error::NoMemory), Some("later"));

        failures.on_vcpu(first, VcpuId(3));
        failures.on_vcpu(first, VcpuId(4));
        failures.on_vcpu(second, VcpuId(5));
        let vcpu = |error| failures.find(error).and_then(|found| found.vcpu);
        assert_eq!(vcpu(Error::Poisoned), Some(VcpuId(3)));
        assert_eq!(vcpu(Error::NoMemory), None);
    }
}
