//! Exits of the processor, as the events that the module handles.

use kvm_ops_cpu::{Cause, Cpu, Event as CpuEvent, EventKind, Exception, Exit as CpuExit, Stopped};
use soft_tdx_module::{Event, EventType, GuestEvent, MsrAccess, VmExit};

use super::bus::{Refusal, insist};
use super::{Left, Processor};

/// General registers by their numbers.
pub(super) const RAX: usize = 0;
pub(super) const RCX: usize = 1;
pub(super) const RDX: usize = 2;

const UD: u8 = 6;
const DF: u8 = 8;

/// Error code of a page fault: present, write, user, reserved bit, fetch.
const PRESENT: u32 = 1;
const WRITE: u32 = 1 << 1;
const USER: u32 = 1 << 2;
const RESERVED: u32 = 1 << 3;
const FETCH: u32 = 1 << 4;

/// EFER.LMA, and the L bit of a code segment's rights.
const LMA: u64 = 1 << 10;
const LONG: u32 = 1 << 13;
/// The code segment among the segment registers.
const CS: usize = 1;

const PAGE: usize = 4096;

/// An exit in VMX's encoding. Instructions that only AMD's processors have do not get here.
pub(super) fn vm_exit(cpu: &Cpu, exit: &CpuExit) -> VmExit {
    let Some(e) = exit.vmx() else {
        return VmExit::default();
    };
    VmExit {
        reason: e.reason,
        qualification: e.qualification,
        gpa: exit.physical.unwrap_or(0),
        gla: exit.linear.unwrap_or(0),
        info: e.interruption.into(),
        error: e.error_code.into(),
        ilen: e.len.into(),
        iinfo: 0,
        idt_vectoring: e.vectoring.into(),
        idt_error: e.vectoring_error_code.into(),
        cpl: cpu.cpl(),
    }
}

/// An event that the module injects.
pub(super) fn cpu_event(event: &Event) -> CpuEvent {
    let kind = match event.kind {
        EventType::Interrupt => EventKind::Interrupt,
        EventType::Nmi => EventKind::Nmi,
        EventType::HardwareException => EventKind::Exception,
        EventType::SoftwareInterrupt => EventKind::Software,
        EventType::PrivilegedSoftwareException => EventKind::Privileged,
        EventType::SoftwareException => EventKind::SoftwareException,
    };
    const PF: u8 = 14;
    CpuEvent {
        kind,
        vector: event.vector,
        code: event.error,
        address: (event.vector == PF && kind == EventKind::Exception).then_some(event.cr2),
        len: 0,
    }
}

/// True for an instruction whose registers the module changes when it completes it.
pub(super) fn changes_registers(exit: &CpuExit) -> bool {
    matches!(
        exit.cause,
        Cause::Wrmsr | Cause::WriteControl { .. } | Cause::Clts | Cause::Lmsw(_) | Cause::Xsetbv
    )
}

impl Processor {
    pub(super) fn exit(&mut self, exit: CpuExit) -> Left {
        match exit.cause {
            Cause::Violation { .. } => self.violation(exit),
            Cause::Tdcall => {
                let r = self.cpu.registers();
                let mode_64bit = r.efer & LMA != 0 && r.segments[CS].rights & LONG != 0;
                self.play_event(GuestEvent::Tdcall { mode_64bit }, Some(exit))
            }
            Cause::Rdmsr => self.msr(exit, MsrAccess::Read),
            Cause::Wrmsr => self.msr(exit, MsrAccess::Write),
            Cause::WriteControl { .. } | Cause::Clts | Cause::Lmsw(_) => self.control(exit),
            Cause::TripleFault => self.triple_fault(exit),
            Cause::NmiWindow => self.play(vm_exit(&self.cpu, &exit), None),
            // Instructions of AMD's guests.
            _ if exit.vmx().is_none() => self.raise(Exception::plain(UD)).map(|()| None),
            _ => self.play(vm_exit(&self.cpu, &exit), Some(exit)),
        }
    }

    /// Takes what the module changed to complete an instruction. Not after an event was delivered: the module keeps the
    /// registers in front of that, with interrupts enabled as they were.
    pub(super) fn reload(&mut self) -> Result<(), soft_tdx_module::LpError> {
        let state = insist(|| self.platform.guest_registers(self.lp()))?;
        self.sync(&state);
        Ok(())
    }

    /// The processor's own exception.
    pub(super) fn raise(&mut self, exception: Exception) -> Result<(), soft_tdx_module::LpError> {
        self.next = self.in_turn(|cpu| cpu.inject(CpuEvent::exception(exception)))?;
        Ok(())
    }

    /// MOV to a control register: the module sees it if it would change one of its bits.
    fn control(&mut self, exit: CpuExit) -> Left {
        let owned = match exit.cause {
            Cause::WriteControl { register, source } => {
                let r = self.cpu.registers();
                let (now, mask) = match register {
                    0 => (r.cr0, self.masks.0),
                    4 => (r.cr4, self.masks.1),
                    _ => (0, 0),
                };
                (self.cpu.gpr(source.into()) ^ now) & mask
            }
            _ => 0,
        };
        if owned != 0 {
            return self.play(vm_exit(&self.cpu, &exit), Some(exit));
        }
        self.cpu.controls_mut().control_registers = false;
        let stopped = self.in_turn(Cpu::finish_instruction);
        self.cpu.controls_mut().control_registers = true;
        match stopped? {
            Stopped::Exit(exit) => self.exit(exit),
            _ => Ok(None),
        }
    }

    fn violation(&mut self, exit: CpuExit) -> Left {
        let Cause::Violation { code, .. } = exit.cause else {
            return Ok(None);
        };
        let event = vm_exit(&self.cpu, &exit);
        match Refusal::of(code) {
            Refusal::Violation => self.play(event, None),
            // Convertible violations become #VE, unless an event is being delivered (SDM vol. 3, 26.5.7.1).
            Refusal::Device if exit.vectoring.is_none() => {
                self.save()?;
                let lp = self.lp();
                let flow = insist(|| self.platform.guest_device_access(lp, event, 0))?;
                self.follow(flow, None)
            }
            Refusal::Device => self.play(event, None),
            Refusal::Shared => self.page_fault(exit).map(|()| None),
            Refusal::Damaged => {
                self.save()?;
                // Reads the line that is damaged, with the others of its page.
                let (lp, page) = (self.lp(), event.gpa & !(PAGE as u64 - 1));
                let mut bytes = [0; PAGE];
                let flow = insist(|| self.platform.guest_read(lp, page, &mut bytes, 0))?;
                flow.map_or(Ok(None), |flow| self.follow(flow, None))
            }
        }
    }

    /// No code and no page table can be in shared memory: the shared bit is a reserved one there.
    fn page_fault(&mut self, exit: CpuExit) -> Result<(), soft_tdx_module::LpError> {
        let Cause::Violation { write, execute, .. } = exit.cause else {
            return Ok(());
        };
        if exit
            .vectoring
            .is_some_and(|event| event.kind == EventKind::Exception)
        {
            return self.raise(Exception::with_code(DF, 0));
        }
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        let user = bit(self.cpu.cpl() == 3, USER);
        let code = PRESENT | RESERVED | user | bit(write, WRITE) | bit(execute, FETCH);
        self.raise(Exception::page_fault(code, exit.linear.unwrap_or(0)))
    }

    /// The vCPU ends. Its registers are the TD's secret; where it ended is what an author of guests wants to know.
    fn triple_fault(&mut self, exit: CpuExit) -> Left {
        let r = self.cpu.registers();
        tracing::error!(
            technology = "tdx",
            vcpu = self.id.0,
            rip = format_args!("{:#x}", r.rip),
            rsp = format_args!("{:#x}", r.gpr[4]),
            cr2 = format_args!("{:#x}", r.cr2),
            idt = format_args!("{:#x}+{:#x}", r.idtr.base, r.idtr.limit),
            "triple fault: the guest has no handler for an exception"
        );
        self.play(vm_exit(&self.cpu, &exit), Some(exit))
    }
}
