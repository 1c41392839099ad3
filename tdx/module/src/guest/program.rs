//! Guest programs: Rust values that run inside TDH.VP.ENTER, an instruction at a time.

use super::access::{Access, Fault as AccessFault};
use super::exits::{REASON_EXCEPTION_OR_NMI, REASON_INTERRUPT, REASON_NMI_WINDOW};
use super::{Guest, GuestEvent, GuestFlow, Next, REASON_TDCALL, VmExit};
use crate::arena::lock;
use crate::faults::pending;
use crate::leaf::GuestLeaf;
use crate::platform::{LpError, Platform};
use crate::regs::Regs;
use crate::status::{Code, Status};
use crate::vcpu::Event;
use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

/// Longest single [`GuestOp::Read`]; longer ones are cut to it.
const MAX_READ: usize = 2 << 20;
/// How far RIP jumps to an exception handler.
const HANDLER_DISTANCE: u64 = 0x1000;
const INSTRUCTION_LENGTH: u64 = 3;

/// One instruction of a guest program.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum GuestOp {
    /// Reads guest-physical memory, private or (with the shared bit) shared. At most 2 MiB.
    Read {
        /// Where.
        gpa: u64,
        /// How much.
        len: usize,
    },
    /// Writes guest-physical memory.
    Write {
        /// Where.
        gpa: u64,
        /// What.
        data: Vec<u8>,
    },
    /// TDCALL with these registers.
    Tdcall(Regs),
    /// An instruction that exits, by its exit reason: CPUID, HLT, I/O, MSR access, ...
    Instruction(VmExit),
    /// An instruction without effect outside the processor.
    Nop,
}

impl GuestOp {
    /// TDG.MEM.PAGE.ACCEPT of the page at `gpa`; level 0 is 4 KiB, 1 is 2 MiB.
    #[must_use]
    pub fn accept(gpa: u64, level: u8) -> Self {
        GuestOp::Tdcall(Regs {
            rcx: gpa | u64::from(level),
            ..Regs::leaf(GuestLeaf::MemPageAccept.number())
        })
    }

    /// TDG.VP.VMCALL of a sub-function in R11 with arguments in R12 to R15, R10 being 0.
    #[must_use]
    pub fn vmcall(function: u64, arguments: [u64; 4]) -> Self {
        const R10_TO_R15: u64 = 0xFC00;
        let [r12, r13, r14, r15] = arguments;
        GuestOp::Tdcall(Regs {
            rcx: R10_TO_R15,
            r11: function,
            r12,
            r13,
            r14,
            r15,
            ..Regs::leaf(GuestLeaf::VpVmcall.number())
        })
    }

    /// HLT, which a TD takes as #VE.
    #[must_use]
    pub fn hlt() -> Self {
        GuestOp::Instruction(VmExit {
            reason: 12,
            ilen: 1,
            ..VmExit::default()
        })
    }

    /// Any other TDCALL without operands beyond RCX and RDX.
    #[must_use]
    pub fn tdcall(leaf: GuestLeaf, rcx: u64, rdx: u64) -> Self {
        GuestOp::Tdcall(Regs {
            rcx,
            rdx,
            ..Regs::leaf(leaf.number())
        })
    }
}

/// What became of the program's last operation.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// Nothing yet: the registers of the first entry.
    Start(Regs),
    /// Done, nothing to tell.
    Done,
    /// The bytes read.
    Data(Vec<u8>),
    /// The registers after a TDCALL; RAX is its status.
    Registers(Regs),
    /// An exception or interrupt was delivered. The operation was **not** executed, the program may issue
    /// it again.
    Event(Fault),
}

/// An event delivered to a program.
pub type Fault = Event;

impl Outcome {
    /// Status of a completed TDCALL.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        match self {
            Outcome::Registers(r) => Some(Status(r.rax)),
            _ => None,
        }
    }
}

/// A program a vCPU runs.
///
/// The platform asks for one operation at a time and executes it as hardware would: an access to a page that
/// is not mapped makes TDH.VP.ENTER return to the host with an EPT violation, and the next TDH.VP.ENTER
/// executes the same operation again without asking. The program sees completed operations and the events
/// delivered to it.
pub trait GuestProgram: Send {
    /// The next operation, given what became of the last.
    fn step(&mut self, last: &Outcome) -> GuestOp;
}

impl<F: FnMut(&Outcome) -> GuestOp + Send> GuestProgram for F {
    fn step(&mut self, last: &Outcome) -> GuestOp {
        self(last)
    }
}

/// A program that runs a list of operations, then asks the host to halt it, for ever. An event delivered to
/// it makes it repeat the operation.
#[derive(Clone, Debug, Default)]
pub struct Script {
    ops: VecDeque<GuestOp>,
    current: Option<GuestOp>,
}

impl Script {
    /// A program of these operations.
    pub fn new(ops: impl IntoIterator<Item = GuestOp>) -> Self {
        Script {
            ops: ops.into_iter().collect(),
            current: None,
        }
    }
}

impl GuestProgram for Script {
    fn step(&mut self, last: &Outcome) -> GuestOp {
        const HLT: u64 = 12;
        if !matches!(last, Outcome::Event(_)) || self.current.is_none() {
            self.current = self.ops.pop_front();
        }
        self.current
            .clone()
            .unwrap_or_else(|| GuestOp::vmcall(HLT, [0; 4]))
    }
}

/// A program and where it stands.
struct Slot {
    program: Box<dyn GuestProgram>,
    /// An operation to execute again.
    repeat: Option<GuestOp>,
    /// A TDCALL that completes with the next entry.
    completes_at_entry: bool,
    last: Option<Outcome>,
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
                    let op = match slot.repeat.take() {
                        Some(op) => op,
                        None => slot
                            .program
                            .step(slot.last.as_ref().unwrap_or(&Outcome::Done)),
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
        let nmi = guest.ctx.pend_nmi && guest.ctx.ve_info.is_none();
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
            GuestOp::Nop => {
                slot.advance += INSTRUCTION_LENGTH;
                slot.last = Some(Outcome::Done);
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
                slot.last = Some(done);
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
        // An offline processor still has to leave the TD.
        let flow = self.event_on(lp, gprs, event, advance)?;
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
                    slot.last = Some(match op {
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

    fn event_on(
        &self,
        lp: usize,
        gprs: Regs,
        event: GuestEvent,
        advance: u64,
    ) -> Result<GuestFlow, LpError> {
        self.guest_event(lp, gprs, event, advance)
    }
}

impl Slot {
    fn entered(&mut self, guest: Regs, injected: Option<Event>) {
        if self.last.is_none() {
            self.last = Some(Outcome::Start(guest));
        }
        if std::mem::take(&mut self.completes_at_entry) {
            self.last = Some(Outcome::Registers(guest));
        }
        if let Some(event) = injected {
            self.deliver(event);
        }
    }

    fn deliver(&mut self, event: Event) {
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
