//! Running guest programs: from TDH.VP.ENTER to the TD exit.

use super::access::{Access, Fault as AccessFault};
use super::exits::{REASON_EXCEPTION_OR_NMI, REASON_INTERRUPT, REASON_NMI_WINDOW};
use super::{
    Guest, GuestEvent, GuestFlow, GuestOp, GuestProgram, Next, Outcome, REASON_TDCALL, Script,
    VmExit,
};
use crate::arena::lock;
use crate::faults::pending;
use crate::platform::{LpError, Platform};
use crate::regs::Regs;
use crate::status::{Code, Status};
use crate::vcpu::Event;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

/// Longest single [`GuestOp::Read`]; longer ones are cut to it.
const MAX_READ: usize = 2 << 20;
/// How far RIP jumps to an exception handler.
const HANDLER_DISTANCE: u64 = 0x1000;
const INSTRUCTION_LENGTH: u64 = 3;

/// A program and where it stands.
struct Slot {
    program: Box<dyn GuestProgram>,
    /// An operation to execute again.
    repeat: Option<GuestOp>,
    /// A TDCALL that completes with the next entry.
    completes_at_entry: bool,
    last: Option<Outcome>,
    /// Whether `last` is a completion that the program has not been told yet.
    untold: bool,
    /// An event that waits for that.
    event: Option<Event>,
    advance: u64,
}

/// The programs of a platform's vCPUs, by TDVPR.
#[derive(Default)]
pub(crate) struct Programs(Mutex<HashMap<u64, Slot>>);

impl Programs {
    fn attach(&self, tdvpr: u64, program: Box<dyn GuestProgram>) {
        let slot = Slot {
            program,
            repeat: None,
            completes_at_entry: false,
            last: None,
            untold: false,
            event: None,
            advance: 0,
        };
        lock(&self.0).insert(tdvpr, slot);
    }

    pub(crate) fn detach(&self, tdvpr: u64) {
        lock(&self.0).remove(&tdvpr);
    }
}

/// How one operation of a program went.
enum Ran {
    On,
    Left(Regs),
}

impl Platform {
    /// Gives a vCPU, named by its TDVPR page, the program it runs from its next entry on. Without one a
    /// vCPU asks the host to halt it.
    pub fn set_guest(&self, tdvpr: u64, program: impl GuestProgram + 'static) {
        self.programs.attach(tdvpr, Box::new(program));
    }

    /// Runs the program of the vCPU on a processor that has just entered it, up to the TD exit.
    pub(crate) fn run_program(
        &self,
        lp: usize,
        guest: Regs,
        injected: Option<Event>,
        regs: &mut Regs,
    ) -> Result<Status, LpError> {
        let tdvpr = {
            let (_, state) = self.lp(lp)?;
            state.running.ok_or(LpError::OutsideTd { lp })?.tdvpr
        };
        // Out of the map while it runs: other vCPUs' programs must not wait for it.
        let taken = lock(&self.programs.0).remove(&tdvpr);
        let mut slot = taken.unwrap_or_else(|| Slot {
            program: Box::new(Script::default()),
            repeat: None,
            completes_at_entry: false,
            last: None,
            untold: false,
            event: None,
            advance: 0,
        });
        slot.entered(guest, injected);
        let result = self.run_slot(lp, &mut slot);
        lock(&self.programs.0).entry(tdvpr).or_insert(slot);
        let host = result?;
        *regs = Regs {
            rsp: regs.rsp,
            ..host
        };
        Ok(Status(host.rax))
    }

    fn run_slot(&self, lp: usize, slot: &mut Slot) -> Result<Regs, LpError> {
        for _ in 0..self.cfg.guest_steps_per_entry {
            let ran = match self.interruption(lp)? {
                Some(exit) => self.run_event(lp, slot, GuestEvent::Exit(exit), None)?,
                None => {
                    let Some(op) = slot.repeat.take().or_else(|| slot.ask()) else {
                        continue;
                    };
                    self.run_op(lp, slot, op)?
                }
            };
            if let Ran::Left(host) = ran {
                return Ok(host);
            }
        }
        // The host's timer.
        match self.run_event(lp, slot, GuestEvent::Exit(interrupt()), None)? {
            Ran::Left(host) => Ok(host),
            Ran::On => Err(LpError::OutsideTd { lp }),
        }
    }

    /// An event that comes before the guest's next instruction.
    fn interruption(&self, lp: usize) -> Result<Option<VmExit>, LpError> {
        let Some(this) = self.lps.get(lp) else {
            return Err(LpError::Unknown { lp });
        };
        let events = this.pending.load(Ordering::Acquire);
        if events & pending::SMI != 0 {
            return Ok(Some(VmExit {
                reason: 6,
                ..VmExit::default()
            }));
        }
        if events & pending::NMI != 0 {
            const VALID_NMI: u64 = 0x8000_0202;
            return Ok(Some(VmExit {
                reason: REASON_EXCEPTION_OR_NMI,
                info: VALID_NMI,
                ..VmExit::default()
            }));
        }
        let offline = this.offline.load(Ordering::Acquire);
        if offline || this.guest_event_pending() {
            return Ok(Some(interrupt()));
        }
        let (this, state) = self.lp(lp)?;
        let guest = self.guest(lp, this, &state)?;
        if guest.td.is_fatal() {
            return Ok(Some(interrupt()));
        }
        let nmi = guest.ctx.pend_nmi != 0 && guest.ctx.ve_info.is_none();
        Ok(nmi.then(|| VmExit {
            reason: REASON_NMI_WINDOW,
            ..VmExit::default()
        }))
    }

    fn run_op(&self, lp: usize, slot: &mut Slot, op: GuestOp) -> Result<Ran, LpError> {
        match op {
            GuestOp::Tdcall(_) => {
                self.run_event(lp, slot, GuestEvent::Tdcall { mode_64bit: true }, Some(op))
            }
            GuestOp::Instruction(exit) => {
                self.run_event(lp, slot, GuestEvent::Exit(exit), Some(op))
            }
            GuestOp::Fault(exit) => {
                slot.completed(Outcome::Done);
                self.run_event(lp, slot, GuestEvent::Exit(exit), None)
            }
            GuestOp::Nop => {
                slot.advance += INSTRUCTION_LENGTH;
                slot.completed(Outcome::Done);
                Ok(Ran::On)
            }
            GuestOp::Read { gpa, len } => {
                let mut buf = vec![0; len.min(MAX_READ)];
                let fault = self.run_access(lp, slot, gpa, Access::Read(&mut buf))?;
                self.after_access(lp, slot, op, fault, Outcome::Data(buf))
            }
            GuestOp::Write { gpa, ref data } => {
                let fault = self.run_access(lp, slot, gpa, Access::Write(data))?;
                self.after_access(lp, slot, op, fault, Outcome::Done)
            }
        }
    }

    fn run_access(
        &self,
        lp: usize,
        slot: &mut Slot,
        gpa: u64,
        access: Access<'_>,
    ) -> Result<Option<AccessFault>, LpError> {
        let (this, state) = self.lp(lp)?;
        let mut guest = self.guest(lp, this, &state)?;
        guest.ctx.rip = guest
            .ctx
            .rip
            .wrapping_add(std::mem::take(&mut slot.advance));
        Ok(guest.access(gpa, access).err())
    }

    fn after_access(
        &self,
        lp: usize,
        slot: &mut Slot,
        op: GuestOp,
        fault: Option<AccessFault>,
        done: Outcome,
    ) -> Result<Ran, LpError> {
        match fault {
            None => {
                slot.advance = INSTRUCTION_LENGTH;
                slot.completed(done);
                Ok(Ran::On)
            }
            Some(AccessFault::Exit(exit)) => {
                self.run_event(lp, slot, GuestEvent::Exit(exit), Some(op))
            }
            Some(AccessFault::MachineCheck) => {
                let (this, mut state) = self.lp(lp)?;
                let mut guest: Guest<'_> = self.guest(lp, this, &state)?;
                let next = guest.poisoned();
                let Next::Leave(exit) = next else {
                    return Ok(Ran::On);
                };
                let host = guest.leave(*exit);
                state.running = None;
                Ok(Ran::Left(host))
            }
        }
    }

    /// Plays an event; `op` is the instruction that caused it, if one did.
    fn run_event(
        &self,
        lp: usize,
        slot: &mut Slot,
        event: GuestEvent,
        op: Option<GuestOp>,
    ) -> Result<Ran, LpError> {
        let gprs = match &op {
            Some(GuestOp::Tdcall(regs)) => *regs,
            _ => {
                let (this, state) = self.lp(lp)?;
                self.guest(lp, this, &state)?.ctx.gprs
            }
        };
        let is_tdcall = matches!(op, Some(GuestOp::Tdcall(_)));
        let advance = std::mem::take(&mut slot.advance);
        let flow = self.guest_event(lp, gprs, event, advance)?;
        match flow {
            GuestFlow::Resume {
                injected: Some(event),
                ..
            } => {
                slot.deliver(event);
            }
            GuestFlow::Resume {
                guest,
                completed: true,
                ..
            } => {
                if let Some(op) = op {
                    slot.completed(match op {
                        GuestOp::Tdcall(_) => Outcome::Registers(guest),
                        _ => Outcome::Done,
                    });
                }
            }
            GuestFlow::Resume { .. } => slot.repeat = op,
            GuestFlow::Exit { host } => {
                let status = Status(host.rax);
                let is_vmcall = status.detail() == u32::from(REASON_TDCALL);
                let timed_out = status.code() == Code::HOST_PRIORITY_BUSY_TIMEOUT;
                if is_tdcall && (is_vmcall || timed_out) {
                    slot.completes_at_entry = true;
                } else if op.is_some() {
                    slot.repeat = op;
                }
                return Ok(Ran::Left(host));
            }
        }
        Ok(Ran::On)
    }
}

impl Slot {
    fn entered(&mut self, guest: Regs, injected: Option<Event>) {
        if self.last.is_none() {
            self.completed(Outcome::Start(guest));
        }
        if std::mem::take(&mut self.completes_at_entry) {
            self.completed(Outcome::Registers(guest));
        }
        if let Some(event) = injected {
            self.deliver(event);
        }
    }

    fn completed(&mut self, outcome: Outcome) {
        self.last = Some(outcome);
        self.untold = true;
    }

    /// Asks the program for its next operation. `None` if an event comes before it.
    fn ask(&mut self) -> Option<GuestOp> {
        let op = self
            .program
            .step(self.last.as_ref().unwrap_or(&Outcome::Done));
        self.untold = false;
        match self.event.take() {
            Some(event) => {
                self.deliver(event);
                None
            }
            None => Some(op),
        }
    }

    fn deliver(&mut self, event: Event) {
        if self.untold {
            self.event = Some(event);
            return;
        }
        self.repeat = None;
        self.last = Some(Outcome::Event(event));
        self.advance = HANDLER_DISTANCE;
    }
}

fn interrupt() -> VmExit {
    const VALID_VECTOR_32: u64 = 0x8000_0020;
    VmExit {
        reason: REASON_INTERRUPT,
        info: VALID_VECTOR_32,
        ..VmExit::default()
    }
}
