//! One step of a vCPU: an entry, an interruption, or the instruction.

use super::exit::Exit;
use super::fault::{Access, StopCause, Stopped};
use super::td::Inner;
use super::vcpu::Handler;
use crate::sync::lock;
use soft_tdx_module::{
    Code, Event, Flow, GuestEvent, GuestFlow, HostLeaf, LpError, Regs, Status, VmExit,
};

const TDCALL: u64 = 77;
const EPT_VIOLATION: u16 = 48;
/// Bytes of an instruction that accesses memory; distance of an exception's handler from RIP.
const ACCESS_LENGTH: u64 = 3;
const HANDLER_DISTANCE: u64 = 0x1000;
const INTERRUPT: VmExit = VmExit {
    reason: 1,
    qualification: 0,
    gpa: 0,
    gla: 0,
    info: 0x8000_0020,
    error: 0,
    ilen: 0,
    iinfo: 0,
    idt_vectoring: 0,
    idt_error: 0,
    cpl: 0,
};

/// A vCPU between two instructions.
#[derive(Default)]
pub(super) struct Processor {
    /// Inside the TD: no host has this processor.
    inside: bool,
    /// Bytes by which RIP has moved since the module last heard of it.
    advance: u64,
    gprs: Regs,
    /// The registers of the next entry.
    answer: Regs,
    /// The instruction that left completes with the next entry.
    completes_at_entry: bool,
    /// An event that comes before the next instruction.
    injected: Option<Event>,
    pub(super) stopped: Option<Stopped>,
    pub(super) handler: Option<Handler>,
}

/// An instruction.
pub(super) enum Op<'a> {
    Tdcall(Regs),
    /// One that exits, with the registers that it reads.
    Exit(VmExit, Regs),
    /// An access inside a page.
    Read(Access, &'a mut [u8]),
    Write(Access, &'a [u8]),
}

/// Result of a step.
pub(super) enum Step {
    /// The instruction is done; these are the registers.
    Done(Regs),
    /// It has to be executed (again).
    Again,
    /// The host's processor was busy.
    Busy,
    Event(Event),
    Exit(Exit),
}

impl Processor {
    fn play(&mut self, inner: &Inner, lp: usize, op: &mut Op<'_>) -> Result<Step, LpError> {
        let p = &inner.machine.p;
        let advance = std::mem::take(&mut self.advance);
        let reach = match op {
            Op::Read(access, _) | Op::Write(access, _) => inner.reach(access),
            Op::Tdcall(_) | Op::Exit(..) => Reach::Memory,
        };
        match reach {
            Reach::Memory => {}
            Reach::Device(exit) => {
                let flow = p.guest_device_access(lp, exit, advance)?;
                return Ok(self.settle(inner, flow, false));
            }
            Reach::Violation(exit) => {
                let flow = p.guest_event(lp, self.gprs, GuestEvent::Exit(exit), advance)?;
                return Ok(self.settle(inner, flow, false));
            }
        }
        let flow = match op {
            Op::Tdcall(regs) => {
                let event = GuestEvent::Tdcall { mode_64bit: true };
                Some(p.guest_event(lp, *regs, event, advance)?)
            }
            Op::Exit(exit, regs) => {
                Some(p.guest_event(lp, *regs, GuestEvent::Exit(*exit), advance)?)
            }
            Op::Read(access, bytes) => p.guest_read(lp, access.gpa, bytes, advance)?,
            Op::Write(access, bytes) => p.guest_write(lp, access.gpa, bytes, advance)?,
        };
        Ok(match flow {
            Some(flow) => self.settle(inner, flow, matches!(op, Op::Tdcall(_))),
            None => {
                self.advance = ACCESS_LENGTH;
                Step::Done(self.gprs)
            }
        })
    }

    fn settle(&mut self, inner: &Inner, flow: GuestFlow, is_tdcall: bool) -> Step {
        match flow {
            GuestFlow::Resume {
                guest,
                injected,
                completed,
                ..
            } => {
                self.gprs = guest;
                match injected {
                    Some(event) => {
                        self.advance = HANDLER_DISTANCE;
                        Step::Event(event)
                    }
                    None if completed => Step::Done(guest),
                    None => Step::Again,
                }
            }
            GuestFlow::Exit { host } => {
                self.inside = false;
                let status = Status(host.rax);
                let timed_out = status.code() == Code::HOST_PRIORITY_BUSY_TIMEOUT;
                self.completes_at_entry |= is_tdcall && (host.rax == TDCALL || timed_out);
                Step::Exit(Exit::from_host(&host, inner.machine.gpaw))
            }
        }
    }

    /// TDH.VP.ENTER.
    fn enter(&mut self, inner: &Inner, lp: usize) -> Result<Step, LpError> {
        let mut regs = Regs {
            rax: HostLeaf::VpEnter.number(),
            rcx: inner.machine.tdvprs.get(lp).copied().unwrap_or(0),
            ..self.answer
        };
        match inner.machine.p.seamcall_step(lp, &mut regs)? {
            Flow::Entered {
                guest, injected, ..
            } => {
                self.inside = true;
                self.answer = Regs::default();
                self.gprs = guest;
                self.injected = injected;
                Ok(match std::mem::take(&mut self.completes_at_entry) {
                    true => Step::Done(guest),
                    false => Step::Again,
                })
            }
            Flow::Returned(status) if super::machine::is_busy(status) => Ok(Step::Busy),
            Flow::Returned(_) => Ok(Step::Exit(Exit::from_host(&regs, inner.machine.gpaw))),
        }
    }

    fn step(&mut self, inner: &Inner, lp: usize, op: &mut Op<'_>) -> Result<Step, LpError> {
        if !self.inside {
            return self.enter(inner, lp);
        }
        if let Some(event) = self.injected.take() {
            return Ok(Step::Event(event));
        }
        let p = &inner.machine.p;
        if let Some(exit) = p.guest_interruption(lp)? {
            let advance = std::mem::take(&mut self.advance);
            let flow = p.guest_event(lp, self.gprs, GuestEvent::Exit(exit), advance)?;
            return Ok(match self.settle(inner, flow, false) {
                Step::Done(_) => Step::Again,
                step => step,
            });
        }
        self.play(inner, lp, op)
    }

    /// The host's answer to the last exit.
    pub(super) fn answer(&mut self, regs: Regs) {
        self.answer = regs;
    }
}

/// Where an access goes.
enum Reach {
    /// To the module, and through it to memory.
    Memory,
    /// To a page that the host's shared EPT leaves to the guest's handler of #VE.
    Device(VmExit),
    /// To a page that the host's shared EPT does not have.
    Violation(VmExit),
}

impl Inner {
    fn reach(&self, access: &Access) -> Reach {
        const LINEAR_AND_TRANSLATED: u64 = 0x180;
        let bit = self.machine.gpaw.shared_bit();
        let bare = access.gpa & !bit;
        let is_shared_address = access.gpa & bit != 0 && bare < bit;
        if !is_shared_address || self.is_shared(bare) {
            return Reach::Memory;
        }
        let exit = VmExit {
            reason: EPT_VIOLATION,
            qualification: LINEAR_AND_TRANSLATED | if access.is_write { 2 } else { 1 },
            gpa: access.gpa,
            gla: access.gpa,
            ilen: ACCESS_LENGTH as u32,
            ..VmExit::default()
        };
        match self.machine.is_ram(bare, access.len as u64) {
            true => Reach::Violation(exit),
            false => Reach::Device(exit),
        }
    }

    /// One step of a vCPU.
    pub(super) fn step(&self, vcpu: usize, op: &mut Op<'_>) -> Result<Step, Stopped> {
        let mut processor = lock(&self.vcpus[vcpu]);
        if let Some(stopped) = &processor.stopped {
            return Err(stopped.clone());
        }
        processor.step(self, vcpu, op).map_err(|error| Stopped {
            vcpu,
            access: None,
            cause: StopCause::Processor(error),
        })
    }

    /// Interrupts a vCPU: if it is inside the TD, it leaves, and enters again with its next instruction.
    pub(super) fn interrupt(&self, vcpu: usize) {
        let mut processor = lock(&self.vcpus[vcpu]);
        if !processor.inside {
            return;
        }
        let advance = std::mem::take(&mut processor.advance);
        let event = GuestEvent::Exit(INTERRUPT);
        let flow = self
            .machine
            .p
            .guest_event(vcpu, processor.gprs, event, advance);
        // An external interrupt leaves every TD.
        processor.inside = !matches!(flow, Ok(GuestFlow::Exit { .. }));
    }
}
