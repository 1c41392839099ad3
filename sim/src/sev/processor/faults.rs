//! Nested page faults of an encrypted guest.

use kvm_ops::{Exit, Gfn, Gpa, NestedFaultAnswer, PAGE_SIZE, Privacy, Result};
use kvm_ops_cpu::{Event, EventKind, Exception, Exit as CpuExit};

use super::bus::Refusal;
use super::exits::{NESTED_FAULT, PAGE_NOT_VALIDATED, VC};
use crate::processor::{Next, Processor};

const DF: u8 = 8;

/// `KVM_INTERNAL_ERROR_EMULATION` and `KVM_INTERNAL_ERROR_DELIVERY_EV`.
const EMULATION: u32 = 1;
const DELIVERY_EVENT: u32 = 3;

impl Processor {
    /// Handles a violation. The instruction is done again, or the guest gets #VC, or the embedder is told.
    pub(super) fn nested_fault(&mut self, exit: CpuExit, refusal: Refusal) -> Result<Next> {
        let gpa = Gpa::new(exit.physical.unwrap_or(0));
        let (gfn, _) = self.vm.sev.mask().split(gpa);
        tracing::trace!(
            vcpu = self.id.0,
            rip = format_args!("{:#x}", self.cpu.rip()),
            gpa = format_args!("{gpa}"),
            ?refusal,
            "nested page fault"
        );
        let (access, answer) = match refusal {
            Refusal::NotValidated => return Ok(self.vc(&exit, PAGE_NOT_VALIDATED)),
            // The host's table marks such addresses, so that the guest handles them (APM vol. 2, 15.35.5).
            Refusal::Mmio => return Ok(self.vc(&exit, NESTED_FAULT)),
            Refusal::Absent => (
                Privacy::Private,
                self.vm.sev.ask(|back_end| back_end.private_fault(gfn)),
            ),
            Refusal::SizeMismatch => (
                Privacy::Private,
                self.vm.sev.ask(|back_end| back_end.size_mismatch(gfn)),
            ),
            Refusal::InUse => {
                std::thread::yield_now();
                (Privacy::Private, NestedFaultAnswer::Retry)
            }
            Refusal::NotShared => (
                Privacy::Shared,
                self.vm.sev.ask(|back_end| back_end.shared_fault(gfn)),
            ),
            Refusal::Denied | Refusal::NoKey => (Privacy::Private, NestedFaultAnswer::Leave),
            Refusal::Device => {
                let suberror = match exit.vectoring {
                    Some(_) => DELIVERY_EVENT,
                    None => EMULATION,
                };
                return Ok(Next::Leave(Exit::InternalError { suberror }, Vec::new()));
            }
        };
        self.interrupted(&exit)?;
        match answer {
            NestedFaultAnswer::Retry => Ok(Next::Again),
            NestedFaultAnswer::Leave => Ok(memory_fault(gfn, access)),
            NestedFaultAnswer::Fail(error) => Err(error),
        }
    }

    /// Keeps the event in whose delivery the exit happened.
    fn interrupted(&mut self, exit: &CpuExit) -> Result<()> {
        self.side()?.interrupted = exit.vectoring;
        Ok(())
    }

    /// #VC with the exit's code. In the delivery of an exception it is a double fault.
    pub(super) fn vc(&mut self, exit: &CpuExit, code: u32) -> Next {
        tracing::trace!(
            vcpu = self.id.0,
            rip = format_args!("{:#x}", self.cpu.rip()),
            code = format_args!("{code:#x}"),
            "#VC"
        );
        let nested = |event: &Event| event.kind == EventKind::Exception;
        match exit.vectoring.as_ref().filter(|event| nested(event)) {
            Some(Event { vector: DF, .. }) => {
                self.change_activity(|activity| activity.shutdown = true);
                Next::Leave(Exit::Shutdown, Vec::new())
            }
            Some(_) => self.raise(Exception::with_code(DF, 0)),
            None => self.raise(Exception {
                address: exit.linear.filter(|_| code == PAGE_NOT_VALIDATED),
                ..Exception::with_code(VC, code)
            }),
        }
    }
}

pub(super) fn memory_fault(gfn: Gfn, access: Privacy) -> Next {
    let exit = Exit::MemoryFault {
        gpa: Gpa::new(gfn.get() * PAGE_SIZE),
        bytes: PAGE_SIZE,
        access,
    };
    Next::Leave(exit, Vec::new())
}
