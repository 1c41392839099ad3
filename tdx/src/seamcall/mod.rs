//! SEAMCALLs as functions: operands in the registers that the ABI says, statuses through the
//! [retry table](crate::retry), and failures that know their leaf.

mod leaf;
mod mem;
mod migrate;
mod mng;
mod phymem;
mod sys;
#[cfg(test)]
mod tests;
mod vp;

pub use leaf::Leaf;
pub(crate) use mem::EntryAt;
pub(crate) use migrate::{BundleAt, ListAt};

use kvm_ops::{CpuId, Diagnosis, Error, Gpa, Life, PAGE_SIZE, Privacy, SeamPort, SeamRegs};

use crate::retry::{Action, LONGEST_WAIT, Verdict, rule};
use crate::status::CompletionStatus;
use crate::trace;

/// Makes calls through a port.
#[derive(Debug)]
pub(crate) struct Calls<'a, S> {
    seam: &'a S,
}

/// A call that did not do what was wanted, with what the retry table says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) leaf: Leaf,
    cause: Cause,
    /// RCX of the call, for reports: the GPA of a TDH.MEM leaf, the page of most others.
    rcx: u64,
}

/// The bits of an address.
const GPA_BITS: u64 = (1 << 52) - 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The module answered this, for the last time.
    Status(CompletionStatus),
    /// Nothing was called: the port could not get onto the processor.
    Port(Error),
}

impl Failed {
    /// The port refused to call `leaf`.
    pub(crate) const fn port(leaf: Leaf, error: Error) -> Self {
        Self {
            leaf,
            cause: Cause::Port(error),
            rcx: 0,
        }
    }

    /// Reports the failure as an event that names the call, its operand and status, and says what to
    /// do: an error with that consequence, or a note of a failure that changed nothing. Each failure
    /// that a caller or the report of a leak gets comes here once. The VM remembers it, and it is
    /// returned in full for whoever poisons the VM by it.
    #[cold]
    pub(crate) fn report(&self, life: &Life, consequence: Option<&'static str>) -> Diagnosis {
        let Self { leaf, rcx, .. } = *self;
        let (seamcall, technology, vm) = (leaf.name(), "tdx", life.id().0);
        match (self.cause, consequence) {
            (Cause::Status(status), Some(advice)) => {
                tracing::error!(technology, vm, seamcall, %status, rcx, "{advice}");
            }
            (Cause::Status(status), None) => {
                let advice = rule(leaf, status).1.advice();
                tracing::debug!(technology, vm, seamcall, %status, rcx, "{advice}");
            }
            (Cause::Port(error), _) => {
                let advice = consequence.unwrap_or("bring the processor online and call again");
                tracing::error!(technology, vm, seamcall, %error, rcx, "not called: {advice}");
            }
        }
        let diagnosis = self.diagnosis(life, consequence);
        // Contention is common, and its error says it all.
        if !self.error().is_transient() {
            life.note(diagnosis);
        }
        diagnosis
    }

    /// Everything that is known of the failure.
    fn diagnosis(&self, life: &Life, consequence: Option<&'static str>) -> Diagnosis {
        let mut diagnosis = Diagnosis::of(life.tech(), life.id(), self.error());
        match self.cause {
            Cause::Status(status) => {
                let advice = consequence.unwrap_or(rule(self.leaf, status).1.advice());
                diagnosis = diagnosis.called(status.answer_of(self.leaf)).advise(advice);
            }
            Cause::Port(_) => {
                let advice = consequence.unwrap_or(diagnosis.advice);
                diagnosis = diagnosis.because(self.leaf.not_called()).advise(advice);
            }
        }
        if self.leaf.takes_gpa() {
            let gpa = Gpa::new(self.rcx & GPA_BITS & !(PAGE_SIZE - 1));
            diagnosis = diagnosis.at(gpa, Privacy::Private);
        }
        diagnosis
    }

    /// The caller's error.
    pub(crate) fn error(&self) -> Error {
        match self.cause {
            Cause::Status(status) => rule(self.leaf, status).1.error(status),
            Cause::Port(error) => error,
        }
    }

    /// The error in the report of a leak: the status word itself, also where callers get less.
    pub(crate) const fn leak_error(&self) -> Error {
        match self.cause {
            Cause::Status(status) => Error::Firmware(status.get()),
            Cause::Port(error) => error,
        }
    }

    /// Returns whether it breaks the VM. A port that calls nothing breaks nothing.
    pub(crate) fn poisons(&self) -> bool {
        match self.cause {
            Cause::Status(status) => rule(self.leaf, status).1 == Verdict::Poison,
            Cause::Port(_) => false,
        }
    }

    /// The module's answer, if it was called.
    pub(crate) const fn status(&self) -> Option<CompletionStatus> {
        match self.cause {
            Cause::Status(status) => Some(status),
            Cause::Port(_) => None,
        }
    }

    /// Returns whether to call once more with all vCPUs out of the TD.
    pub(crate) fn wants_kick(&self) -> bool {
        match self.cause {
            Cause::Status(status) => rule(self.leaf, status).0 == Action::KickAndRetry,
            Cause::Port(_) => false,
        }
    }
}

pub(crate) type Outcome<T = ()> = core::result::Result<T, Failed>;

impl<'a, S: SeamPort> Calls<'a, S> {
    pub(crate) const fn new(seam: &'a S) -> Self {
        Self { seam }
    }

    pub(crate) const fn port(&self) -> &'a S {
        self.seam
    }

    /// Calls on the processor that the caller is on.
    fn here(&self, leaf: Leaf, regs: SeamRegs) -> Outcome<SeamRegs> {
        self.on(self.seam.this_cpu(), leaf, regs)
    }

    /// Calls on `cpu`, again as often as the retry table says. Returns the registers of the call
    /// that succeeded.
    fn on(&self, cpu: CpuId, leaf: Leaf, input: SeamRegs) -> Outcome<SeamRegs> {
        let mut last = input;
        self.on_into(cpu, leaf, input, &mut last).map(|()| last)
    }

    /// The same; `last` gets the registers of the last call also if it failed.
    #[allow(unsafe_code)]
    fn on_into(&self, cpu: CpuId, leaf: Leaf, input: SeamRegs, last: &mut SeamRegs) -> Outcome {
        let mut tries = Tries::default();
        let mut next = input;
        loop {
            *last = next;
            // SAFETY: each page among the operands is the TD's: a `Page` that the caller took for this
            // call, one that the TD's records or the mirror own, or a TDR, TDVPR or TDCX page of it.
            let called = unsafe { self.seam.seamcall(cpu, leaf.rax(), last) };
            let rax = called.map_err(|error| Failed {
                rcx: input.rcx,
                ..Failed::port(leaf, error)
            })?;
            let status = CompletionStatus::new(rax);
            trace::call(leaf, cpu, &next, status);
            let action = rule(leaf, status).0;
            match action {
                Action::Done => return Ok(()),
                Action::Retry(most) if tries.retried < most => tries.retried += 1,
                Action::BackOff(most) if tries.backed_off < most => {
                    let mut wait = 1u32 << tries.backed_off.min(LONGEST_WAIT.ilog2());
                    while wait > 0 {
                        self.seam.relax();
                        wait -= 1;
                    }
                    tries.backed_off += 1;
                }
                Action::Resume(most) if tries.resumed < most => {
                    tries.resumed += 1;
                    next = migrate::resumed(leaf, input, last);
                }
                Action::Restart(most) if tries.restarted < most => {
                    tries.restarted += 1;
                    next = input;
                }
                _ => {
                    let cause = Cause::Status(status);
                    let rcx = input.rcx;
                    return Err(Failed { leaf, cause, rcx });
                }
            }
        }
    }
}

/// The number of times each action was taken. Each has a separate bound, so that a status after
/// another one still gets its tries, and all end.
#[derive(Default)]
struct Tries {
    retried: u32,
    backed_off: u32,
    resumed: u32,
    restarted: u32,
}

/// Registers RCX and RDX.
fn regs(rcx: u64, rdx: u64) -> SeamRegs {
    SeamRegs {
        rcx,
        rdx,
        ..SeamRegs::default()
    }
}
