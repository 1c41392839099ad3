//! Intercepted instructions. With encrypted registers the host sees some of them (automatic exits);
//! the others are #VC, whose handler tells the host what it has to know (APM vol. 2, 15.35.5).

use kvm_ops::{Exit, Gpa, Privacy, Result};
use kvm_ops_cpu::{Cause, Exception, Exit as CpuExit};

use super::bus::Refusal;
use crate::processor::{Next, Processor, Resume};

/// General registers by their numbers.
pub(super) const RAX: usize = 0;
pub(super) const RCX: usize = 1;
pub(super) const RDX: usize = 2;
pub(super) const RBX: usize = 3;

const UD: u8 = 6;
pub(super) const GP: u8 = 13;
pub(super) const VC: u8 = 29;

/// Exit codes, which #VC has as its error code (APM vol. 2, appendix C).
pub(super) const CPUID: u32 = 0x72;
pub(super) const INVD: u32 = 0x76;
pub(super) const HLT: u32 = 0x78;
pub(super) const IOIO: u32 = 0x7b;
pub(super) const MSR: u32 = 0x7c;
pub(super) const VMMCALL: u32 = 0x81;
pub(super) const WBINVD: u32 = 0x89;
pub(super) const NESTED_FAULT: u32 = 0x400;
/// Of an SNP guest that touches a page which it has not validated.
pub(super) const PAGE_NOT_VALIDATED: u32 = 0x404;

/// `KVM_HC_MAP_GPA_RANGE`, and its attribute: encrypted.
pub(super) const MAP_GPA_RANGE: u64 = 12;
const ENCRYPTED: u64 = 1 << 4;

const EMULATION: u32 = 1;

impl Processor {
    /// True if an exit is an encrypted guest's business, which is handled outside of the turn.
    pub(crate) fn is_sev_exit(&self, exit: &CpuExit) -> bool {
        if self.sev.is_none() {
            return false;
        }
        match exit.cause {
            Cause::InterruptWindow => false,
            Cause::Violation { .. } | Cause::Cpuid | Cause::Rdmsr | Cause::Wrmsr => true,
            Cause::TripleFault => true,
            Cause::Vmmcall => self.vm.has_vmsas() || self.cpu.gpr(RAX) == MAP_GPA_RANGE,
            _ => self.vm.has_vmsas(),
        }
    }

    pub(crate) fn outside(&mut self, exit: CpuExit) -> Result<Next> {
        let protected = self.vm.has_vmsas();
        match exit.cause {
            Cause::Violation { code, .. } => self.nested_fault(exit, Refusal::of(code)),
            Cause::TripleFault => Ok(self.triple_fault()),
            Cause::Rdmsr => self.msr(exit, false),
            Cause::Wrmsr => self.msr(exit, true),
            Cause::Cpuid if !protected => {
                self.answer_cpuid();
                self.cpu.skip(&exit);
                Ok(Next::Again)
            }
            Cause::Vmmcall if !protected => Ok(self.map_gpa_range(exit)),
            Cause::Cpuid => Ok(self.vc(&exit, CPUID)),
            Cause::Invd => Ok(self.vc(&exit, INVD)),
            Cause::Wbinvd => Ok(self.vc(&exit, WBINVD)),
            Cause::Io(_) => Ok(self.vc(&exit, IOIO)),
            Cause::Vmmcall => Ok(self.vc(&exit, VMMCALL)),
            Cause::Hlt => {
                self.cpu.skip(&exit);
                Ok(Next::Leave(Exit::Hlt, Vec::new()))
            }
            Cause::Vmgexit => self.vmgexit(exit),
            Cause::Pvalidate => self.pvalidate(exit),
            Cause::Rmpadjust => self.rmpadjust(exit),
            // Instructions of other processors, and of AMD's hosts.
            Cause::Vmcall | Cause::Tdcall | Cause::Seamcall | Cause::Rmpupdate | Cause::Psmash => {
                Ok(self.raise(Exception::plain(UD)))
            }
            cause => {
                tracing::debug!(vcpu = self.id.0, ?cause, "not emulated");
                let suberror = EMULATION;
                Ok(Next::Leave(Exit::InternalError { suberror }, Vec::new()))
            }
        }
    }

    /// The registers of CPUID's answer, in a guest whose registers the host sees.
    fn answer_cpuid(&mut self) {
        let [function, index] = [RAX, RCX].map(|n| self.cpu.gpr(n) as u32);
        let leaf = self.cpuid_answer(function, index);
        for (register, value) in [
            (RAX, leaf.eax),
            (RBX, leaf.ebx),
            (RCX, leaf.ecx),
            (RDX, leaf.edx),
        ] {
            self.cpu.set_gpr(register, value.into());
        }
    }

    /// The hypercall by which a SEV guest says that it shares memory.
    fn map_gpa_range(&mut self, exit: CpuExit) -> Next {
        let [gpa, pages, attributes] = [RBX, RCX, RDX].map(|n| self.cpu.gpr(n));
        self.resume = Resume::Call(exit);
        convert(gpa, pages, attributes)
    }

    /// The vCPU ends. Where it ended is what an author of guests wants to know.
    fn triple_fault(&mut self) -> Next {
        let r = self.cpu.registers();
        tracing::error!(
            technology = %self.vm.tech,
            vcpu = self.id.0,
            rip = format_args!("{:#x}", r.rip),
            rsp = format_args!("{:#x}", r.gpr[4]),
            cr2 = format_args!("{:#x}", r.cr2),
            idt = format_args!("{:#x}+{:#x}", r.idtr.base, r.idtr.limit),
            "triple fault: the guest has no handler for an exception"
        );
        Next::Leave(Exit::Shutdown, Vec::new())
    }
}

/// The exit of KVM_HC_MAP_GPA_RANGE.
pub(super) fn convert(gpa: u64, pages: u64, attributes: u64) -> Next {
    let to = match attributes & ENCRYPTED {
        0 => Privacy::Shared,
        _ => Privacy::Private,
    };
    let gpa = Gpa::new(gpa);
    Next::Leave(Exit::MapGpaRange { gpa, pages, to }, Vec::new())
}
