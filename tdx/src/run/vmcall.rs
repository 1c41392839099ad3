//! TDG.VP.VMCALL: what the guest asks of the host (GHCI; Linux `handle_tdvmcall`).

use kvm_ops::{Gpa, Host, Irqchip, PAGE_SIZE, Privacy, Result, TdxRequest};

use super::{Leave, Next, Pending, Run};
use crate::TdxVcpu;

/// Sub-functions, in R11. The small ones name an instruction by its exit reason.
mod function {
    pub(super) const CPUID: u64 = 10;
    pub(super) const HLT: u64 = 12;
    pub(super) const IO: u64 = 30;
    pub(super) const RDMSR: u64 = 31;
    pub(super) const WRMSR: u64 = 32;
    pub(super) const MMIO: u64 = 48;
    pub(super) const GET_TD_VM_CALL_INFO: u64 = 0x1_0000;
    pub(super) const MAP_GPA: u64 = 0x1_0001;
    pub(super) const GET_QUOTE: u64 = 0x1_0002;
    pub(super) const REPORT_FATAL_ERROR: u64 = 0x1_0003;
    pub(super) const SETUP_EVENT_NOTIFY: u64 = 0x1_0004;
}

/// Statuses, in R10.
pub(super) const SUCCESS: u64 = 0;
pub(super) const RETRY: u64 = 1;
pub(super) const INVALID_OPERAND: u64 = 1 << 63;
pub(super) const ALIGN_ERROR: u64 = 1 << 63 | 2;
pub(super) const SUBFUNC_UNSUPPORTED: u64 = 1 << 63 | 3;

/// `KVM_HC_MAP_GPA_RANGE`, and the bit of its third argument that says private.
const HC_MAP_GPA_RANGE: u64 = 12;
const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;
/// `-KVM_EINVAL`.
const HC_EINVAL: u64 = 22u64.wrapping_neg();

const FIRST_VECTOR: u64 = 32;

impl Run {
    /// Finishes the call at once with this status.
    pub(super) fn finish_call(&mut self, status: u64) -> Next {
        self.regs.r10 = status;
        Next::Enter
    }

    /// Leaves; `pending` finishes it.
    fn leave(&mut self, pending: Pending, leave: Leave) -> Result<Next> {
        self.pending = pending;
        Ok(Next::Leave(leave))
    }

    /// Leaves with an answer of the embedder's to come, which begins as `ret`.
    fn ask(&mut self, ret: u64, pending: Pending, leave: Leave) -> Result<Next> {
        (self.ret, self.values, self.error) = (ret, [0; 4], 0);
        self.leave(pending, leave)
    }

    fn set_data(&mut self, value: u64) {
        self.data = value.to_le_bytes();
    }
}

impl<H: Host> TdxVcpu<H> {
    pub(super) fn vmcall(&mut self) -> Result<Next> {
        if self.run.regs.r10 != 0 {
            return self.hypercall();
        }
        match self.run.regs.r11 {
            function::CPUID => self.cpuid(),
            function::HLT => match self.td.params.irqchip {
                Irqchip::None => self.run.leave(Pending::Halt, Leave::Hlt),
                _ => {
                    self.run.pending = Pending::Halt;
                    Ok(Next::Enter)
                }
            },
            function::IO => self.io(),
            function::MMIO => self.mmio(),
            function::RDMSR | function::WRMSR => self.msr(),
            function::GET_TD_VM_CALL_INFO => self.vm_call_info(),
            function::MAP_GPA => Ok(self.map_gpa()),
            function::GET_QUOTE => self.get_quote(),
            function::REPORT_FATAL_ERROR => self.fatal_error(),
            function::SETUP_EVENT_NOTIFY => self.setup_event_notify(),
            _ => Ok(self.run.finish_call(SUBFUNC_UNSUPPORTED)),
        }
    }

    /// A KVM hypercall: R10 is its number, R11 to R14 are its arguments, R10 is the answer.
    fn hypercall(&mut self) -> Result<Next> {
        let r = self.run.regs;
        let leave = match r.r10 {
            HC_MAP_GPA_RANGE => {
                let gpa = Gpa::new(r.r11);
                let bytes = r.r12.checked_mul(PAGE_SIZE).filter(|bytes| *bytes != 0);
                let end = bytes.and_then(|bytes| r.r11.checked_add(bytes));
                let fits = end.is_some_and(|end| end <= self.td.mask.bits());
                if !gpa.is_page_aligned() || !fits {
                    return Ok(self.run.finish_call(HC_EINVAL));
                }
                let to = match r.r13 & MAP_GPA_RANGE_ENCRYPTED {
                    0 => Privacy::Shared,
                    _ => Privacy::Private,
                };
                let pages = r.r12;
                let leave = Leave::MapGpaRange { gpa, pages, to };
                return self.run.ask(0, Pending::HypercallErrno, leave);
            }
            nr => Leave::Hypercall {
                nr,
                args: [r.r11, r.r12, r.r13, r.r14],
            },
        };
        self.run.ask(0, Pending::Ret, leave)
    }

    /// Answered from what the TD was created with; a leaf that is not in there is all zeros.
    fn cpuid(&mut self) -> Result<Next> {
        let (leaf, subleaf) = (self.run.regs.r12 as u32, self.run.regs.r13 as u32);
        let found = self.td.td_params.cpuid.iter().find(|entry| {
            entry.leaf == leaf && (!entry.subleaf_significant || entry.subleaf == subleaf)
        });
        let [eax, ebx, ecx, edx] = found.map_or([0; 4], |entry| entry.regs);
        let r = &mut self.run.regs;
        [r.r12, r.r13, r.r14, r.r15] = [eax.into(), ebx.into(), ecx.into(), edx.into()];
        Ok(self.run.finish_call(SUCCESS))
    }

    /// R12 the size, R13 0 for IN and 1 for OUT, R14 the port, R15 what is written.
    fn io(&mut self) -> Result<Next> {
        let r = self.run.regs;
        let (Ok(port), size @ (1 | 2 | 4)) = (u16::try_from(r.r14), r.r12) else {
            return Ok(self.run.finish_call(INVALID_OPERAND));
        };
        let size = size as usize;
        match r.r13 {
            0 => {
                self.run.set_data(0);
                let leave = Leave::IoIn { port, size };
                self.run.leave(Pending::Read(size), leave)
            }
            1 => {
                self.run.set_data(r.r15);
                let leave = Leave::IoOut { port, size };
                self.run.leave(Pending::Success, leave)
            }
            _ => Ok(self.run.finish_call(INVALID_OPERAND)),
        }
    }

    /// R12 the size, R13 0 for a read and 1 for a write, R14 the address, R15 what is written.
    fn mmio(&mut self) -> Result<Next> {
        let r = self.run.regs;
        let last = r.r14.checked_add(r.r12.wrapping_sub(1));
        let fits = matches!(r.r12, 1 | 2 | 4 | 8)
            && self.is_shared(r.r14)
            && last.is_some_and(|last| self.is_shared(last));
        if !fits {
            return Ok(self.run.finish_call(INVALID_OPERAND));
        }
        let (gpa, size) = (Gpa::new(r.r14 & !self.td.mask.bits()), r.r12 as usize);
        match r.r13 {
            0 => {
                self.run.set_data(0);
                let leave = Leave::MmioRead { gpa, size };
                self.run.leave(Pending::Read(size), leave)
            }
            1 => {
                self.run.set_data(r.r15);
                let leave = Leave::MmioWrite { gpa, size };
                self.run.leave(Pending::Success, leave)
            }
            _ => Ok(self.run.finish_call(INVALID_OPERAND)),
        }
    }

    /// Returns whether that is a shared address of the TD.
    pub(super) fn is_shared(&self, gpa: u64) -> bool {
        self.is_legal(gpa) && self.td.mask.split(Gpa::new(gpa)).1 == Privacy::Shared
    }

    /// Returns whether the address has no bit above the shared one, the TD's highest.
    pub(super) fn is_legal(&self, gpa: u64) -> bool {
        gpa < self.td.mask.bits() << 1
    }

    /// R12 the MSR, R13 what is written.
    fn msr(&mut self) -> Result<Next> {
        let r = self.run.regs;
        let Ok(index) = u32::try_from(r.r12) else {
            return Ok(self.run.finish_call(INVALID_OPERAND));
        };
        match r.r11 {
            function::RDMSR => self.run.ask(0, Pending::MsrRead, Leave::ReadMsr { index }),
            _ => {
                let value = r.r13;
                let leave = Leave::WriteMsr { index, value };
                self.run.ask(0, Pending::MsrWritten, leave)
            }
        }
    }

    /// R12 of 0: all basic sub-functions are there, which nothing but zeros says. R12 of 1: which
    /// others there are, the embedder knows.
    fn vm_call_info(&mut self) -> Result<Next> {
        match self.run.regs.r12 {
            0 => {
                let r = &mut self.run.regs;
                [r.r11, r.r12, r.r13, r.r14] = [0; 4];
                Ok(self.run.finish_call(SUCCESS))
            }
            leaf @ 1 => {
                let request = TdxRequest::GetTdVmCallInfo { leaf };
                let leave = Leave::Tdx(request);
                self.run.ask(SUCCESS, Pending::RetAndValues, leave)
            }
            _ => Ok(self.run.finish_call(INVALID_OPERAND)),
        }
    }

    /// R12 a shared buffer, R13 its length.
    fn get_quote(&mut self) -> Result<Next> {
        let r = self.run.regs;
        if !self.is_shared(r.r12) {
            return Ok(self.run.finish_call(INVALID_OPERAND));
        }
        let request = TdxRequest::GetQuote {
            gpa: Gpa::new(r.r12 & !self.td.mask.bits()),
            bytes: r.r13,
        };
        let leave = Leave::Tdx(request);
        self.run.ask(SUBFUNC_UNSUPPORTED, Pending::Ret, leave)
    }

    fn setup_event_notify(&mut self) -> Result<Next> {
        match u8::try_from(self.run.regs.r12) {
            Ok(vector) if u64::from(vector) >= FIRST_VECTOR => {
                let leave = Leave::Tdx(TdxRequest::SetupEventNotify { vector });
                self.run.ask(SUBFUNC_UNSUPPORTED, Pending::Ret, leave)
            }
            _ => Ok(self.run.finish_call(INVALID_OPERAND)),
        }
    }

    /// All registers, in the order of their numbers; RSP and RBP are not the host's to see. The
    /// guest may be run again.
    fn fatal_error(&mut self) -> Result<Next> {
        const TDCALL: u64 = 77;
        let r = self.run.regs;
        self.run.details = [
            TDCALL, r.rcx, r.rdx, r.rbx, 0, 0, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
            r.r13, r.r14, r.r15,
        ];
        self.run.leave(Pending::Success, Leave::Fatal)
    }
}
