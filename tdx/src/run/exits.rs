//! TD exits by their reason, and EPT violations.

use kvm_ops::{CpuId, Error, Exit, Gpa, Host, PAGE_SIZE, Privacy, Result};

use super::{INTERNAL_ERROR_UNEXPECTED_EXIT, Pending};
use crate::status::{Class, CompletionStatus};
use crate::td::{Fault, POISONED};
use crate::{Leaf, TdxVcpu};

/// Basic exit reasons (SDM vol. 3, appendix C) that a TD's host sees.
mod reason {
    pub(super) const EXCEPTION_OR_NMI: u16 = 0;
    pub(super) const EXTERNAL_INTERRUPT: u16 = 1;
    pub(super) const TRIPLE_FAULT: u16 = 2;
    pub(super) const OTHER_SMI: u16 = 6;
    pub(super) const EPT_VIOLATION: u16 = 48;
    pub(super) const EPT_MISCONFIG: u16 = 49;
    pub(super) const BUS_LOCK: u16 = 74;
    pub(super) const TDCALL: u16 = 77;
}

/// Interruption information (SDM vol. 3, 25.9.2): the type in bits 10:8, and the type NMI.
const INTERRUPTION_TYPE: u64 = 7 << 8;
const INTERRUPTION_NMI: u64 = 2 << 8;

/// An EPT violation by an instruction fetch.
const QUALIFICATION_FETCH: u64 = 1 << 2;
/// The extended qualification's type, and the type of a page that was not accepted.
const EXTENDED_TYPE: u64 = 0xf;
const EXTENDED_PENDING: u64 = 6;

/// The advice to the author of a guest that touched a pending page.
const ACCEPT: &str = "the guest must accept the page first with TDG.MEM.PAGE.ACCEPT, or share it with \
                      MapGPA; the TD is poisoned: destroy it";

impl<H: Host> TdxVcpu<H> {
    /// Handles what TDH.VP.ENTER returned.
    pub(super) fn handle(&mut self, status: CompletionStatus, cpu: CpuId) -> Result<Option<Exit>> {
        let basic = status.detail() as u16;
        match status.class() {
            Class::SUCCESS => self.handle_exit(basic, status, cpu),
            // The epoch lock, or the tree lock of zero-step filtering: nothing was entered.
            Class::OPERAND_BUSY => {
                self.td.relax();
                Ok(None)
            }
            // The guest insists on a lock that a host waits for. The host has it by now.
            Class::HOST_PRIORITY_BUSY_TIMEOUT => {
                self.td.relax();
                Ok(None)
            }
            Class::NON_RECOVERABLE_VCPU if basic == reason::TRIPLE_FAULT => {
                Ok(self.run.leave(Pending::ShutDown, Exit::Shutdown))
            }
            class => {
                // Every other status ends the TD, not only this vCPU.
                let ends_all = class != Class::NON_RECOVERABLE_VCPU;
                Ok(self.unexpected(status, cpu, ends_all))
            }
        }
    }

    fn handle_exit(
        &mut self,
        basic: u16,
        status: CompletionStatus,
        cpu: CpuId,
    ) -> Result<Option<Exit>> {
        let info = self.run.regs.r9;
        match basic {
            // The host's: served when the module returned.
            reason::EXCEPTION_OR_NMI if info & INTERRUPTION_TYPE == INTERRUPTION_NMI => Ok(None),
            reason::EXTERNAL_INTERRUPT | reason::OTHER_SMI | reason::BUS_LOCK => Ok(None),
            reason::EPT_VIOLATION => self.ept_violation(),
            // Shared tables never hold an entry that is misconfigured.
            reason::EPT_MISCONFIG => {
                let gpa = Gpa::new(self.run.regs.r8);
                let error = Error::Firmware(status.get());
                Err(self.bug(error, gpa, "an EPT entry is misconfigured", POISONED))
            }
            reason::TDCALL => Ok(self.vmcall()),
            _ => Ok(self.unexpected(status, cpu, false)),
        }
    }

    /// An exit that KVM does not know what to do about. [`TdxVm`](crate::TdxVm) explains it as
    /// [`Error::Firmware`] with the first word of its data.
    fn unexpected(&mut self, status: CompletionStatus, cpu: CpuId, ends_all: bool) -> Option<Exit> {
        let failure = self.explain(Error::Firmware(status.get()));
        if ends_all {
            let why = failure.because("the TD ended").advise(POISONED);
            self.td.poison_by(why);
        } else {
            let why = failure.because("the vCPU ended by an exit that has no handling");
            self.td.life.note(why.advise("stop the vCPU"));
        }
        let (vm, vcpu, cpu) = (self.td.life.id().0, self.record.id.0, u64::from(cpu.0));
        tracing::error!(
            technology = "tdx", vm, vcpu, cpu, seamcall = Leaf::VpEnter.name(), %status,
            "unexpected exit: stop the vCPU"
        );
        let words = [status.get(), cpu].map(u64::to_ne_bytes);
        let suberror = INTERNAL_ERROR_UNEXPECTED_EXIT;
        let exit = Exit::InternalError { suberror };
        self.run
            .leave_with(Pending::Nothing, words.as_flattened(), exit)
    }

    /// Remembers why the guest got no page, where no failed SEAMCALL says it.
    #[cold]
    fn not_given(&self, gfn: kvm_ops::Gfn, error: Error) {
        if matches!(error, Error::NoMemory | Error::HostLacks(_)) {
            let why = "the page that the guest touched could not be given to it";
            let gpa = Gpa::new(gfn.get() * PAGE_SIZE);
            let diagnosis = self.explain(error).at(gpa, Privacy::Private);
            self.td.life.note(diagnosis.because(why));
        }
    }

    fn ept_violation(&mut self) -> Result<Option<Exit>> {
        let regs = &self.run.regs;
        let (qualification, extended, gpa) = (regs.rcx, regs.rdx, Gpa::new(regs.r8));
        let (gfn, access) = self.td.mask.split(gpa);
        let fault = Exit::MemoryFault {
            gpa: Gpa::new(gfn.get() * PAGE_SIZE),
            bytes: PAGE_SIZE,
            access,
        };
        match access {
            // Such a TD has disabled #VE for pending pages. Only the TD itself can accept the page,
            // so it would fault for ever.
            Privacy::Private if extended & EXTENDED_TYPE == EXTENDED_PENDING => {
                let cause = "the guest uses a page that it has not accepted, with #VE disabled";
                Err(self.bug(Error::Poisoned, gpa, cause, ACCEPT))
            }
            Privacy::Private => self.private_fault(gfn, fault),
            // The module lets no TD run code from shared memory.
            Privacy::Shared if qualification & QUALIFICATION_FETCH != 0 => {
                let cause = "the guest runs code from shared memory";
                let advice = "the guest must run private code; the TD is poisoned: destroy it";
                Err(self.bug(Error::Poisoned, gpa, cause, advice))
            }
            Privacy::Shared => {
                let slot = self.record.id.0 as usize;
                let private = self.td.private.read(slot, || self.td.relax());
                // Else the VM below maps it when the guest is back.
                Ok(private.may_be_private(gfn).then_some(fault))
            }
        }
    }

    /// Maps the page. It does not return to the guest before that: each further fault at the same
    /// instruction would bring zero-step filtering on, which locks the whole Secure-EPT at every
    /// entry.
    fn private_fault(&mut self, gfn: kvm_ops::Gfn, fault: Exit) -> Result<Option<Exit>> {
        loop {
            let found = self.td.fault(self.record.id, gfn);
            match found.inspect_err(|error| self.not_given(gfn, *error))? {
                Fault::Mapped => return Ok(None),
                Fault::NotPrivate => {
                    let (vm, vcpu) = (self.td.life.id().0, self.record.id.0);
                    tracing::debug!(
                        technology = "tdx", vm, vcpu, %gfn, access = "private",
                        "memory fault: convert the frame to private, or add a slot, and run again"
                    );
                    return Ok(Some(fault));
                }
                // The next entry answers the kick.
                Fault::Retry if self.record.is_kicked() => return Ok(None),
                // The page comes from another host.
                Fault::Retry if self.td.journey.awaits_pages() => self.td.idle(),
                Fault::Retry => self.td.relax(),
            }
        }
    }
}
