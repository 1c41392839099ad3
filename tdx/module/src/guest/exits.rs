//! VM exits other than TDCALL.

use super::l2::Access;
use super::{Guest, Next, TdExit};
use crate::meta::vcpu_store::class;
use crate::status::Code;
use crate::vcpu::{Event, EventType, LastExit, VcpuState, VeInfo};
use crate::virt::cpuid::XCR0_COMPONENTS;
use crate::virt::msr::MsrAccess;
use std::sync::atomic::Ordering;

/// A VM exit as the processor reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VmExit {
    /// Basic exit reason.
    pub reason: u16,
    /// Exit qualification.
    pub qualification: u64,
    /// Guest physical address.
    pub gpa: u64,
    /// Guest linear address.
    pub gla: u64,
    /// Interruption information.
    pub info: u64,
    /// Interruption error code.
    pub error: u64,
    /// Instruction length.
    pub ilen: u32,
    /// Instruction information.
    pub iinfo: u32,
    /// IDT-vectoring information.
    pub idt_vectoring: u64,
    /// IDT-vectoring error code.
    pub idt_error: u64,
    /// Current privilege level.
    pub cpl: u8,
}

pub(super) const REASON_EXCEPTION_OR_NMI: u16 = 0;
pub(super) const REASON_INTERRUPT: u16 = 1;
const REASON_TRIPLE_FAULT: u16 = 2;
pub(super) const REASON_SMI: u16 = 6;
pub(super) const REASON_NMI_WINDOW: u16 = 8;
pub(super) const REASON_CR_ACCESS: u16 = 28;
const REASON_TASK_SWITCH: u16 = 9;
pub(super) const REASON_EPT_VIOLATION: u16 = 48;
pub(super) const REASON_EPT_MISCONFIG: u16 = 49;
pub(super) const REASON_NOTIFY: u16 = 75;
const MACHINE_CHECK: u8 = 18;
/// The field XSETBV writes.
const XCR0: (u8, u32) = (class::STATE, 0x20);
/// Bits 12:7 of an EPT-violation qualification are not shown to the host.
const HIDDEN_QUALIFICATION: u64 = 0x1F80;
/// Extended exit qualification: the page is pending.
pub(super) const EXTENDED_PENDING: u64 = 6;

impl Guest<'_> {
    pub(super) fn vm_exit(&mut self, e: &VmExit) -> Next {
        let vectoring = Event::from_info(e.idt_vectoring, e.idt_error);
        if vectoring.is_some() {
            let delivered_later = matches!(
                e.reason,
                REASON_TASK_SWITCH | REASON_EPT_VIOLATION | REASON_EPT_MISCONFIG
            );
            if !delivered_later {
                // Hardware declares the module itself lost if this is not a debug TD.
                return self.debug_exit_or_fatal(e);
            }
        }
        let next = self.by_reason(e, vectoring);
        match next {
            Next::Inject(_) => {}
            _ => self.ctx.vectoring = vectoring,
        }
        next
    }

    fn by_reason(&mut self, e: &VmExit, vectoring: Option<Event>) -> Next {
        match e.reason {
            REASON_EXCEPTION_OR_NMI => self.exception_or_nmi(e),
            REASON_INTERRUPT => host_exit(e, e.info),
            3 | REASON_TASK_SWITCH | 74 => host_exit(e, 0),
            REASON_TRIPLE_FAULT => triple_fault(e.qualification),
            REASON_SMI if e.qualification & 1 != 0 => self.machine_check(e),
            REASON_SMI => host_exit(e, e.info),
            REASON_NOTIFY if e.qualification & 1 != 0 => self.lost(e),
            REASON_NOTIFY => host_exit(e, 0),
            REASON_NMI_WINDOW => self.nmi_window(),
            12 | 13 | 18 | 30 | 54 | 56 | 65 => self.ve(e, e.qualification),
            10 => self.cpuid(e),
            31 => self.msr(e, MsrAccess::Read),
            32 => self.msr(e, MsrAccess::Write),
            11 | 17 | 19..=27 | 36 | 39 | 50 | 53 | 59 | 60 | 70 | 76 => Next::Inject(Event::UD),
            15 => Next::Inject(Event::GP),
            REASON_EPT_VIOLATION => self.ept_violation(e, vectoring),
            REASON_EPT_MISCONFIG => self.ept_misconfiguration(e),
            REASON_CR_ACCESS => match self.write_control_register(e, 0) {
                Access::Done => Next::Done {
                    length: e.ilen.into(),
                },
                Access::Fault => Next::Inject(Event::GP),
                Access::Refused => self.ve(e, e.qualification),
                Access::Unexpected => self.debug_exit_or_fatal(e),
            },
            55 => self.xsetbv(e),
            _ => self.debug_exit_or_fatal(e),
        }
    }

    fn exception_or_nmi(&mut self, e: &VmExit) -> Next {
        match Event::from_info(e.info, e.error) {
            Some(event) if event.kind == EventType::Nmi => host_exit(e, e.info),
            Some(event) if event.is_exception(MACHINE_CHECK) => self.machine_check(e),
            // Hardware declares the module lost if this is not a debug TD.
            _ if self.td.is_debug() => host_exit(e, e.info),
            _ => self.lost(e),
        }
    }

    pub(super) fn debug_exit_or_fatal(&mut self, e: &VmExit) -> Next {
        if self.td.is_debug() {
            host_exit(e, 0)
        } else {
            self.lost(e)
        }
    }

    /// The TD is lost, in an orderly way.
    pub(super) fn lost(&mut self, e: &VmExit) -> Next {
        self.td.fatal.store(true, Ordering::Release);
        let exit = TdExit::new(Code::NON_RECOVERABLE_TD, e.reason);
        Next::Leave(Box::new(TdExit {
            rcx: e.qualification,
            state: None,
            ..exit
        }))
    }

    /// A machine check inside the TD: its memory cannot be trusted, so nothing in it is updated.
    pub(super) fn machine_check(&mut self, e: &VmExit) -> Next {
        self.td.fatal.store(true, Ordering::Release);
        let exit = TdExit::new(Code::NON_RECOVERABLE_TD_NON_ACCESSIBLE, e.reason);
        Next::Leave(Box::new(TdExit {
            rcx: e.qualification,
            r9: e.info,
            state: None,
            inaccessible: true,
            ..exit
        }))
    }

    fn nmi_window(&mut self) -> Next {
        if self.ctx.pend_nmi != 0 && self.ctx.ve_info.is_none() {
            self.ctx.pend_nmi = 0;
            return Next::Inject(Event::NMI);
        }
        Next::Done { length: 0 }
    }

    pub(super) fn ve(&mut self, e: &VmExit, qualification: u64) -> Next {
        self.inject_ve(VeInfo {
            reason: u32::from(e.reason),
            qualification,
            ilen: e.ilen,
            iinfo: e.iinfo,
            ..VeInfo::default()
        })
    }

    /// XSETBV: XCR0 must be one the TD's XFAM allows.
    fn xsetbv(&mut self, e: &VmExit) -> Next {
        let r = &self.ctx.gprs;
        let xcr0 = r.rdx << 32 | r.rax & 0xFFFF_FFFF;
        let user = XCR0_COMPONENTS & self.td.config().xfam;
        if r.rcx as u32 != 0 || xcr0 & !user != 0 || !is_consistent_xcr0(xcr0) {
            return Next::Inject(Event::GP);
        }
        self.ctx.store.set(XCR0, xcr0);
        Next::Done {
            length: u64::from(e.ilen),
        }
    }

    /// To software it is a page-table entry with reserved bits set.
    pub(super) fn is_beyond_width(&self, e: &VmExit) -> bool {
        const GLA_VALID: u64 = 1 << 7;
        let beyond_width = e.gpa >> self.td.gpa_width();
        beyond_width != 0 && e.qualification & GLA_VALID != 0
    }

    /// The host's shared EPT is at fault.
    pub(super) fn ept_misconfiguration(&self, e: &VmExit) -> Next {
        let exit = TdExit::new(Code::SUCCESS, e.reason);
        Next::Leave(Box::new(TdExit {
            r8: e.gpa & !0xFFF,
            ..exit
        }))
    }

    fn ept_violation(&mut self, e: &VmExit, vectoring: Option<Event>) -> Next {
        if self.is_beyond_width(e) {
            return self.page_fault(e, vectoring);
        }
        if e.gpa & self.td.shared_bit() != 0 {
            return self.violation_exit(e, 0, false);
        }
        let content = self.td.walk(&self.p.tables, e.gpa, 0).map(|w| w.content);
        let pending = content.is_some_and(|c| c.state().is_acceptable());
        if !pending {
            return self.violation_exit(e, 0, true);
        }
        if self.pending_exits_to_host() {
            return self.violation_exit(e, EXTENDED_PENDING, true);
        }
        self.inject_ve(violation_info(e))
    }

    /// TD_CTLS.PENDING_VE_DISABLE
    pub(super) fn pending_exits_to_host(&self) -> bool {
        self.td.td_ctls.load(Ordering::Acquire) & 1 != 0
    }

    pub(super) fn violation_exit(&mut self, e: &VmExit, extended: u64, private: bool) -> Next {
        let exit = TdExit::new(Code::SUCCESS, e.reason);
        Next::Leave(Box::new(TdExit {
            rcx: e.qualification & !HIDDEN_QUALIFICATION,
            rdx: extended,
            r8: e.gpa & !0xFFF,
            zero_step: private.then_some(e.gpa),
            last_exit: match private {
                true => LastExit::PrivateEptViolation(violation_info(e)),
                false => LastExit::Other,
            },
            ..exit
        }))
    }

    /// A GPA beyond the TD's width is, to the guest, a page-table entry with reserved bits set.
    fn page_fault(&mut self, e: &VmExit, vectoring: Option<Event>) -> Next {
        match vectoring {
            Some(v) if v.is_exception(8) => return triple_fault(0),
            Some(v) if v.is_exception(14) || v.is_exception(20) => {
                return Next::Inject(Event::DF);
            }
            _ => {}
        }
        let q = |bit: u32| (e.qualification >> bit & 1) as u32;
        let user = u32::from(e.cpl == 3);
        let error = 1 | q(1) << 1 | user << 2 | 8 | q(2) << 4 | q(13) << 6;
        self.ctx.cr2 = e.gla;
        Next::Inject(Event {
            cr2: e.gla,
            ..Event::exception(14, Some(error))
        })
    }
}

pub(super) fn violation_info(e: &VmExit) -> VeInfo {
    VeInfo {
        reason: u32::from(e.reason),
        qualification: e.qualification,
        gla: e.gla,
        gpa: e.gpa,
        ilen: e.ilen,
        iinfo: e.iinfo,
    }
}

pub(super) fn host_exit(e: &VmExit, r9: u64) -> Next {
    let exit = TdExit::new(Code::SUCCESS, e.reason);
    Next::Leave(Box::new(TdExit {
        rcx: e.qualification,
        r9,
        ..exit
    }))
}

fn triple_fault(qualification: u64) -> Next {
    let exit = TdExit::new(Code::NON_RECOVERABLE_VCPU, REASON_TRIPLE_FAULT);
    Next::Leave(Box::new(TdExit {
        rcx: qualification,
        state: Some(VcpuState::Disabled),
        ..exit
    }))
}

fn is_consistent_xcr0(xcr0: u64) -> bool {
    let bit = |n: u32| xcr0 >> n & 1;
    bit(0) == 1
        && (bit(2) == 0 || bit(1) == 1)
        && (bit(5) == 0 || bit(2) == 1)
        && bit(5) == bit(6)
        && bit(6) == bit(7)
        && bit(17) == bit(18)
}
