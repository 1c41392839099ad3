//! VM exits of an L2 VM: to L1, to the host, or neither.

use super::super::exits::{
    REASON_CR_ACCESS, REASON_EPT_MISCONFIG, REASON_EPT_VIOLATION, REASON_EXCEPTION_OR_NMI,
    REASON_INTERRUPT, REASON_NOTIFY, REASON_SMI, VmExit, host_exit,
};
use super::super::{Guest, GuestEvent, Next, REASON_TDCALL, TDCALL_LENGTH};
use super::control_registers::Access;
use crate::l2::exit_info;
use crate::l2::vmcs::{CTL_VMCALL, DEBUG_EVERY_EXIT, PerVm};
use crate::leaf::GuestLeaf;
use crate::sept::SeptState;
use crate::status::Code;
use crate::vcpu::Event;
use crate::virt::answer::MsrAnswer;
use crate::virt::msr::MsrAccess;

const REASON_RDMSR: u16 = 31;
const REASON_WRMSR: u16 = 32;
const REASON_ENTRY_FAILURE: u16 = 33;
const REASON_ENTRY_MACHINE_CHECK: u16 = 41;
const NMI: u64 = 2;
const MACHINE_CHECK: u64 = 18;

/// Ways in which the module itself completes an exit of an L2 VM.
enum Inside {
    /// The VM goes on where it was.
    Resume,
    /// The instruction is done.
    Complete(u64),
    /// An exception.
    Raise(Event),
}

impl Guest<'_> {
    /// An event of an L2 VM of a TD that is not lost.
    pub(in super::super) fn l2_event(&mut self, event: &GuestEvent) -> Next {
        let (exit, mode_64bit) = match event {
            GuestEvent::Exit(exit) => (*exit, true),
            GuestEvent::Tdcall { mode_64bit } => {
                let exit = VmExit {
                    reason: REASON_TDCALL,
                    ilen: TDCALL_LENGTH as u32,
                    ..VmExit::default()
                };
                (exit, *mode_64bit)
            }
        };
        exit_info::record(&mut self.ctx, &exit, mode_64bit);
        let vm = self.ctx.vm();
        if self.ctx.per_vm(PerVm::DebugControls, vm) & DEBUG_EVERY_EXIT != 0 {
            return self.debug_exit(Code::TD_EXIT_ON_L2_VM_EXIT);
        }
        self.ctx.note_progress();
        match event {
            GuestEvent::Exit(_) => self.l2_exit(&exit, vm),
            GuestEvent::Tdcall { .. } => self.l2_tdcall(mode_64bit, vm),
        }
    }

    fn l2_tdcall(&mut self, mode_64bit: bool, vm: usize) -> Next {
        let for_host = self.ctx.gprs.rax as u16 == GuestLeaf::VpVmcall.number() as u16
            && self.ctx.per_vm(PerVm::Controls, vm) & CTL_VMCALL != 0;
        if !for_host {
            return self.exit_to_l1(Code::SUCCESS, 0);
        }
        if !mode_64bit {
            return self.inside(Inside::Raise(Event::GP));
        }
        match self.tdcall() {
            Next::Done { length } => self.inside(Inside::Complete(length)),
            other => other,
        }
    }

    fn l2_exit(&mut self, e: &VmExit, vm: usize) -> Next {
        match e.reason {
            REASON_EXCEPTION_OR_NMI if e.info >> 8 & 7 == NMI => host_exit(e, e.info),
            REASON_EXCEPTION_OR_NMI if e.info & 0xFF == MACHINE_CHECK => self.machine_check(e),
            REASON_INTERRUPT => self.l2_interrupt(e),
            5 => host_exit(e, 0),
            3 | 42 | 74 => host_exit(e, if e.reason == 42 { e.info } else { 0 }),
            REASON_SMI if e.qualification & 1 != 0 => self.machine_check(e),
            REASON_SMI => host_exit(e, e.info),
            REASON_NOTIFY if e.qualification & 1 != 0 => self.lost(e),
            REASON_NOTIFY => host_exit(e, 0),
            REASON_CR_ACCESS => match self.write_control_register(e, vm) {
                Access::Done => self.inside(Inside::Complete(e.ilen.into())),
                Access::Fault => self.inside(Inside::Raise(Event::GP)),
                Access::Refused | Access::Unexpected => self.exit_to_l1(Code::SUCCESS, 0),
            },
            REASON_RDMSR => self.l2_msr(e, vm, MsrAccess::Read),
            REASON_WRMSR => self.l2_msr(e, vm, MsrAccess::Write),
            REASON_EPT_VIOLATION => self.l2_ept_violation(e),
            REASON_EPT_MISCONFIG => self.ept_misconfiguration(e),
            REASON_ENTRY_FAILURE => self.exit_to_l1(Code::SUCCESS, 0),
            REASON_ENTRY_MACHINE_CHECK => self.machine_check(e),
            0
            | 2
            | 7..=27
            | 29
            | 30
            | 36
            | 39
            | 40
            | 43
            | 45..=47
            | 50..=61
            | 63..=65
            | 67..=73
            | 76 => self.exit_to_l1(Code::SUCCESS, 0),
            _ => self.debug_exit_or_fatal(e),
        }
    }

    /// The VM goes on, unless an exception on the way is L1's to see.
    fn inside(&mut self, how: Inside) -> Next {
        let vm = self.ctx.vm();
        match how {
            Inside::Resume => {}
            Inside::Complete(length) => self.ctx.step_over(length),
            Inside::Raise(event) => exit_info::raise(&mut self.ctx, event),
        }
        exit_info::redeliver(&mut self.ctx);
        if exit_info::l1_intercepts_entry(&self.ctx) {
            exit_info::entry_to_exit(&mut self.ctx);
            return self.exit_to_l1(Code::SUCCESS, 0);
        }
        crate::l2::preemption::arm(self.p, &mut self.ctx, vm);
        self.run_l2()
    }

    fn l2_interrupt(&mut self, e: &VmExit) -> Next {
        match self.posted_interrupt(e) {
            None => host_exit(e, e.info),
            Some(true) => self.exit_to_l1(Code::L2_EXIT_PENDING_INTERRUPT, 0),
            Some(false) => self.inside(Inside::Resume),
        }
    }

    fn l2_ept_violation(&mut self, e: &VmExit) -> Next {
        const PENDING: u64 = 6;
        if self.is_beyond_width(e) {
            return self.exit_to_l1(Code::SUCCESS, 0);
        }
        if e.gpa & self.td.shared_bit() != 0 {
            return self.violation_exit(e, 0, false);
        }
        // Without a linear address the bits beyond the width are ignored.
        let translated = (1 << (12 + 9 * u32::from(self.td.levels()))) - 1;
        let walked = self.td.walk(&self.p.tables, e.gpa & translated, 0);
        match walked.map(|w| w.content.state()) {
            Some(SeptState::Mapped) => self.exit_to_l1(Code::SUCCESS, 0),
            Some(SeptState::Pending) => self.exit_to_l1(Code::SUCCESS, PENDING),
            _ => self.violation_exit(e, 0, true),
        }
    }

    /// L1 sees the accesses that it asked for in the VM's shadow bitmap, and those that in L1 would be #VE; the module
    /// answers the others.
    fn l2_msr(&mut self, e: &VmExit, vm: usize, access: MsrAccess) -> Next {
        const LOW: u64 = 0xFFFF_FFFF;
        let r = self.ctx.gprs;
        let (address, value) = (r.rcx as u32, r.rdx << 32 | r.rax & LOW);
        if self.ctx.msr_exits_to_l1(vm, address, access) {
            return self.exit_to_l1(Code::SUCCESS, 0);
        }
        match self.virtual_cpu().msr_exit(address, access, value) {
            MsrAnswer::VirtualizationException => self.exit_to_l1(Code::SUCCESS, 0),
            MsrAnswer::GeneralProtection => self.inside(Inside::Raise(Event::GP)),
            MsrAnswer::Direct => self.inside(Inside::Complete(e.ilen.into())),
            MsrAnswer::Completed(value) => {
                if access == MsrAccess::Read {
                    (self.ctx.gprs.rax, self.ctx.gprs.rdx) = (value & LOW, value >> 32);
                }
                self.inside(Inside::Complete(e.ilen.into()))
            }
        }
    }
}
