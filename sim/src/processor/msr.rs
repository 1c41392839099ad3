//! RDMSR and WRMSR of a guest whose embedder has a say in them.

use kvm_ops::Exit;
use kvm_ops_cpu::{Cause, Event, Exception, Exit as CpuExit};

use crate::msr_exits::{MsrAccess, MsrRefusal};
use crate::processor::{Next, Processor, Resume};

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const GP: u8 = 13;
const LOW: u64 = 0xffff_ffff;

/// An access that waits for the embedder's answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MsrWait {
    pub(crate) exit: CpuExit,
    pub(crate) access: MsrAccess,
    pub(crate) refusal: MsrRefusal,
    /// The embedder refuses it, too.
    pub(crate) faults: bool,
}

impl MsrWait {
    /// The exit of an access.
    pub(crate) fn leave(index: u32, access: MsrAccess, value: u64) -> Exit {
        match access {
            MsrAccess::Read => Exit::ReadMsr { index },
            MsrAccess::Write => Exit::WriteMsr { index, value },
        }
    }
}

impl Resume {
    /// The access that waits.
    pub(crate) fn msr_wait(&mut self) -> Option<&mut MsrWait> {
        match self {
            Self::Msr(wait) => Some(wait),
            Self::Sev(pending) => pending.msr_wait(),
            _ => None,
        }
    }
}

impl Processor {
    /// True if RDMSR and WRMSR are the embedder's to see.
    pub(crate) fn watches_msrs(&self) -> bool {
        self.msr_exits.as_ref().is_some_and(|exits| exits.is_on())
    }

    /// RDMSR or WRMSR, which exited.
    pub(crate) fn msr_access(&mut self, exit: CpuExit) -> Next {
        let index = self.cpu.gpr(RCX) as u32;
        let access = match exit.cause {
            Cause::Wrmsr => MsrAccess::Write,
            _ => MsrAccess::Read,
        };
        let value = self.cpu.gpr(RDX) << 32 | self.cpu.gpr(RAX) & LOW;
        match self.try_msr(index, access, value) {
            Ok(read) => {
                self.end_msr(&exit, access, read);
                Next::Again
            }
            Err(refusal) if self.leaves(refusal) => {
                self.resume = Resume::Msr(MsrWait {
                    exit,
                    access,
                    refusal,
                    faults: false,
                });
                Next::Leave(MsrWait::leave(index, access, value), Vec::new())
            }
            Err(_) => {
                let fault = Event::exception(Exception::with_code(GP, 0));
                self.deliver(fault).unwrap_or(Next::Again)
            }
        }
    }

    /// Does an access, of which the guest's embedder may know. Returns the value that is read, or 0.
    pub(crate) fn try_msr(
        &mut self,
        index: u32,
        access: MsrAccess,
        value: u64,
    ) -> Result<u64, MsrRefusal> {
        let exits = self.msr_exits.as_ref();
        if exits.is_some_and(|exits| !exits.allows(index, access)) {
            return Err(MsrRefusal::Filtered);
        }
        // Some of them are times.
        if let Some(now) = self.vm.turns.host_clock() {
            self.cpu.advance_to(now);
        }
        let done = match access {
            MsrAccess::Read => self.cpu.read_msr(index),
            MsrAccess::Write => self.cpu.write_msr(index, value).map(|()| 0),
        };
        done.ok_or(match self.cpu.knows_msr(index) {
            true => MsrRefusal::Invalid,
            false => MsrRefusal::Unknown,
        })
    }

    /// True if the embedder wants to see an access that is refused.
    pub(crate) fn leaves(&self, refusal: MsrRefusal) -> bool {
        let exits = self.msr_exits.as_ref();
        exits.is_some_and(|exits| exits.leaves(refusal))
    }

    fn end_msr(&mut self, exit: &CpuExit, access: MsrAccess, read: u64) {
        if access == MsrAccess::Read {
            self.cpu.set_gpr(RAX, read & LOW);
            self.cpu.set_gpr(RDX, read >> 32);
        }
        self.cpu.skip(exit);
    }

    /// Takes the embedder's answer: #GP at the next entry, or the value that is read.
    pub(super) fn finish_msr(&mut self, wait: MsrWait, read: u64) {
        match wait.faults {
            true => self.exception = Some(kvm_ops::Exception::new(GP, Some(0))),
            false => self.end_msr(&wait.exit, wait.access, read),
        }
    }
}
