//! Running guest programs: from TDH.VP.ENTER to the TD exit.

use super::access::Access;
use super::exits::{REASON_EXCEPTION_OR_NMI, REASON_INTERRUPT, REASON_NMI_WINDOW};
use super::slots::Slots;
use super::{GuestEvent, GuestFlow, GuestOp, GuestProgram, Outcome, REASON_TDCALL, VmExit};
use crate::faults::pending;
use crate::platform::{LpError, Platform};
use crate::regs::Regs;
use crate::status::{Code, Status};
use crate::vcpu::Event;
use std::sync::atomic::Ordering;

/// Longest single [`GuestOp::Read`]; longer ones are cut to it.
const MAX_READ: usize = 2 << 20;
const INSTRUCTION_LENGTH: u64 = 3;

/// Result of one operation of a program.
enum Ran {
    On,
    Left(Regs),
}

impl Platform {
    /// Gives a vCPU, named by its TDVPR page, the program it runs from its next entry on. Without one a
    /// vCPU asks the host to halt it.
    pub fn set_guest(&self, tdvpr: u64, program: impl GuestProgram + 'static) {
        self.programs.attach(tdvpr, 0, Box::new(program));
    }

    /// The same for an L2 VM (1 to 3) of the vCPU, whose program runs when L1 enters the VM. An instruction that
    /// exits to L1 is done once L1 has moved RIP of the VM's state past it; an L1 that leaves RIP where it is
    /// has it executed again. Other VMs do not exist, and a program for one is dropped.
    pub fn set_l2_guest(&self, tdvpr: u64, vm: usize, program: impl GuestProgram + 'static) {
        self.programs.attach(tdvpr, vm, Box::new(program));
    }

    /// Runs the program of the vCPU on a processor that has just entered it, up to the TD exit.
    pub(crate) fn run_program(
        &self,
        lp: usize,
        vm: u8,
        guest: Regs,
        injected: Option<Event>,
        regs: &mut Regs,
    ) -> Result<Status, LpError> {
        let tdvpr = {
            let (_, state) = self.lp(lp)?;
            state.running.ok_or(LpError::OutsideTd { lp })?.tdvpr
        };
        let mut slots = self.programs.take(tdvpr);
        let left_at = self.rip_of(lp, slots.vm())?;
        slots.host_entered(usize::from(vm), guest, injected, left_at);
        let result = self.run_slots(lp, &mut slots);
        self.programs.put_back(tdvpr, slots);
        let host = result?;
        *regs = Regs {
            rsp: regs.rsp,
            ..host
        };
        Ok(Status(host.rax))
    }

    fn run_slots(&self, lp: usize, slots: &mut Slots) -> Result<Regs, LpError> {
        for _ in 0..self.cfg.guest_steps_per_entry {
            let ran = match self.guest_interruption(lp)? {
                Some(exit) => self.run_event(lp, slots, GuestEvent::Exit(exit), None)?,
                None => {
                    let slot = slots.current();
                    let Some(op) = slot.repeat.take().or_else(|| slot.ask()) else {
                        continue;
                    };
                    self.run_op(lp, slots, op)?
                }
            };
            if let Ran::Left(host) = ran {
                return Ok(host);
            }
        }
        // The host's timer.
        match self.run_event(lp, slots, GuestEvent::Exit(interrupt()), None)? {
            Ran::Left(host) => Ok(host),
            Ran::On => Err(LpError::OutsideTd { lp }),
        }
    }

    /// The event that comes before the next instruction of the guest on a processor: an interrupt, NMI or SMI of the
    /// host, or the NMI window. A caller who plays the guest plays it as [`GuestEvent::Exit`]; the NMI window once the guest can
    /// take an NMI, which its handler of another one and the shadow of STI and MOV SS put off.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_interruption(&self, lp: usize) -> Result<Option<VmExit>, LpError> {
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
        let in_l1 = guest.ctx.vm() == 0;
        let nmi = in_l1 && guest.ctx.pend_nmi != 0 && guest.ctx.ve_info.is_none();
        Ok(nmi.then(|| VmExit {
            reason: REASON_NMI_WINDOW,
            ..VmExit::default()
        }))
    }

    fn run_op(&self, lp: usize, slots: &mut Slots, op: GuestOp) -> Result<Ran, LpError> {
        match op {
            GuestOp::Tdcall(_) => {
                self.run_event(lp, slots, GuestEvent::Tdcall { mode_64bit: true }, Some(op))
            }
            GuestOp::Instruction(exit) => {
                self.run_event(lp, slots, GuestEvent::Exit(exit), Some(op))
            }
            GuestOp::Fault(exit) => {
                slots.current().completed(Outcome::Done);
                self.run_event(lp, slots, GuestEvent::Exit(exit), None)
            }
            GuestOp::Nop => {
                slots.current().advance += INSTRUCTION_LENGTH;
                slots.current().completed(Outcome::Done);
                Ok(Ran::On)
            }
            GuestOp::Read { gpa, len } => {
                let mut buf = vec![0; len.min(MAX_READ)];
                let advance = std::mem::take(&mut slots.current().advance);
                let fault = self.guest_access(lp, gpa, Access::Read(&mut buf), advance)?;
                self.after_access(lp, slots, op, fault, Outcome::Data(buf))
            }
            GuestOp::Write { gpa, ref data } => {
                let advance = std::mem::take(&mut slots.current().advance);
                let fault = self.guest_access(lp, gpa, Access::Write(data), advance)?;
                self.after_access(lp, slots, op, fault, Outcome::Done)
            }
        }
    }

    fn after_access(
        &self,
        lp: usize,
        slots: &mut Slots,
        op: GuestOp,
        fault: Option<GuestFlow>,
        done: Outcome,
    ) -> Result<Ran, LpError> {
        match fault {
            None => {
                slots.current().advance = INSTRUCTION_LENGTH;
                slots.current().completed(done);
                Ok(Ran::On)
            }
            Some(flow) => self.after_event(lp, slots, flow, Some(op)),
        }
    }

    /// Plays an event; `op` is the instruction that caused it, if one did.
    fn run_event(
        &self,
        lp: usize,
        slots: &mut Slots,
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
        let advance = std::mem::take(&mut slots.current().advance);
        let flow = self.guest_event(lp, gprs, event, advance)?;
        self.after_event(lp, slots, flow, op)
    }

    fn after_event(
        &self,
        lp: usize,
        slots: &mut Slots,
        flow: GuestFlow,
        op: Option<GuestOp>,
    ) -> Result<Ran, LpError> {
        let is_tdcall = matches!(op, Some(GuestOp::Tdcall(_)));
        let before = slots.vm();
        match flow {
            GuestFlow::Resume {
                guest,
                injected,
                vm,
                ..
            } if usize::from(vm) != before => match before {
                0 => {
                    let vm = usize::from(vm);
                    let rip = self.rip_of(lp, vm)?;
                    slots.l1_entered(vm, guest, injected, rip);
                }
                l2_vm => slots.left_to_l1(guest, op, self.rip_of(lp, l2_vm)?),
            },
            GuestFlow::Resume {
                injected: Some(event),
                ..
            } => {
                slots.current().deliver(event);
            }
            GuestFlow::Resume {
                guest,
                completed: true,
                ..
            } => {
                if let Some(op) = op {
                    slots.current().completed(match op {
                        GuestOp::Tdcall(_) => Outcome::Registers(guest),
                        _ => Outcome::Done,
                    });
                }
            }
            GuestFlow::Resume { .. } => slots.current().repeat = op,
            GuestFlow::Exit { host } => {
                let status = Status(host.rax);
                let is_vmcall = status == Code::SUCCESS.detail(u32::from(REASON_TDCALL));
                let timed_out = status.code() == Code::HOST_PRIORITY_BUSY_TIMEOUT;
                if is_tdcall && (is_vmcall || timed_out) {
                    slots.current().completes_at_entry = true;
                } else if op.is_some() {
                    slots.current().repeat = op;
                }
                return Ok(Ran::Left(host));
            }
        }
        Ok(Ran::On)
    }

    /// RIP of a VM of the vCPU that runs on a processor.
    fn rip_of(&self, lp: usize, vm: usize) -> Result<u64, LpError> {
        let (this, state) = self.lp(lp)?;
        Ok(self.guest(lp, this, &state)?.ctx.rip_of(vm))
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
