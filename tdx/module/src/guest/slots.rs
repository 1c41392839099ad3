//! The programs of vCPUs and their progress.

use super::{GuestOp, GuestProgram, Outcome, Script};
use crate::arena::lock;
use crate::l2;
use crate::regs::Regs;
use crate::vcpu::Event;
use std::collections::HashMap;
use std::sync::Mutex;

/// Distance of an exception handler from RIP.
const HANDLER_DISTANCE: u64 = 0x1000;
/// L1 and its L2 VMs.
const VMS: usize = 1 + l2::MAX_VMS;

/// A program and its progress.
pub(super) struct Slot {
    program: Box<dyn GuestProgram>,
    /// An operation to execute again.
    pub(super) repeat: Option<GuestOp>,
    /// A TDCALL that completes with the next entry.
    pub(super) completes_at_entry: bool,
    last: Option<Outcome>,
    /// True if `last` is a completion that the program has not received yet.
    untold: bool,
    /// An event to deliver after that completion.
    event: Option<Event>,
    pub(super) advance: u64,
    /// RIP when an L2 VM exited to L1.
    left_at: u64,
}

impl Slot {
    fn new(program: Box<dyn GuestProgram>) -> Self {
        Slot {
            program,
            repeat: None,
            completes_at_entry: false,
            last: None,
            untold: false,
            event: None,
            advance: 0,
            left_at: 0,
        }
    }

    /// The host has entered the VM.
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

    /// L1 has entered the VM. An instruction whose RIP L1 has left behind is done; one that it has not is
    /// executed again.
    fn entered_by_l1(&mut self, guest: Regs, injected: Option<Event>, rip: u64) {
        if rip != self.left_at
            && let Some(op) = self.repeat.take()
        {
            self.completed(match op {
                GuestOp::Tdcall(_) => Outcome::Registers(guest),
                _ => Outcome::Done,
            });
        }
        self.entered(guest, injected);
    }

    pub(super) fn completed(&mut self, outcome: Outcome) {
        self.last = Some(outcome);
        self.untold = true;
    }

    /// Asks the program for its next operation. `None` if an event comes before it.
    pub(super) fn ask(&mut self) -> Option<GuestOp> {
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

    pub(super) fn deliver(&mut self, event: Event) {
        if self.untold {
            self.event = Some(event);
            return;
        }
        self.repeat = None;
        self.last = Some(Outcome::Event(event));
        self.advance = HANDLER_DISTANCE;
    }
}

/// The programs of a vCPU: L1's and those of the L2 VMs.
#[derive(Default)]
pub(super) struct Slots {
    /// The VM that runs.
    vm: usize,
    slots: [Option<Slot>; VMS],
}

impl Slots {
    pub(super) fn vm(&self) -> usize {
        self.vm
    }

    /// The program that runs. A VM without one asks its host to halt it.
    pub(super) fn current(&mut self) -> &mut Slot {
        self.slots[self.vm % VMS].get_or_insert_with(|| Slot::new(Box::new(Script::default())))
    }

    /// The host has entered the vCPU, which runs `vm` now. If that is L1 though an L2 VM ran before, up to RIP
    /// `left_at`, L1's TDG.VP.ENTER is complete.
    pub(super) fn host_entered(
        &mut self,
        vm: usize,
        guest: Regs,
        injected: Option<Event>,
        left_at: u64,
    ) {
        let routed = self.vm != 0 && vm == 0;
        if !routed {
            self.vm = vm;
            return self.current().entered(guest, injected);
        }
        // The VM itself goes on when L1 enters it.
        self.current().left_at = left_at;
        self.vm = 0;
        let l1 = self.current();
        l1.repeat = None;
        l1.completed(Outcome::Registers(guest));
    }

    /// L1 has entered an L2 VM, whose RIP is `rip`.
    pub(super) fn l1_entered(&mut self, vm: usize, guest: Regs, injected: Option<Event>, rip: u64) {
        self.vm = vm;
        self.current().entered_by_l1(guest, injected, rip);
    }

    /// The L2 VM has exited to L1, at `rip` and on account of `op`. L1's TDG.VP.ENTER is complete.
    pub(super) fn left_to_l1(&mut self, guest: Regs, op: Option<GuestOp>, rip: u64) {
        let l2 = self.current();
        if op.is_some() {
            l2.repeat = op;
        }
        l2.left_at = rip;
        self.vm = 0;
        self.current().completed(Outcome::Registers(guest));
    }
}

/// The programs of a platform's vCPUs, by TDVPR.
#[derive(Default)]
pub(crate) struct Programs(Mutex<HashMap<u64, Slots>>);

impl Programs {
    pub(super) fn attach(&self, tdvpr: u64, vm: usize, program: Box<dyn GuestProgram>) {
        if let Some(slot) = lock(&self.0).entry(tdvpr).or_default().slots.get_mut(vm) {
            *slot = Some(Slot::new(program));
        }
    }

    pub(crate) fn detach(&self, tdvpr: u64) {
        lock(&self.0).remove(&tdvpr);
    }

    /// Takes a vCPU's programs out while they run: other vCPUs' programs must not wait for them.
    pub(super) fn take(&self, tdvpr: u64) -> Slots {
        lock(&self.0).remove(&tdvpr).unwrap_or_default()
    }

    /// Puts them back, less the ones that have been replaced meanwhile.
    pub(super) fn put_back(&self, tdvpr: u64, mut ran: Slots) {
        let mut programs = lock(&self.0);
        if let Some(replaced) = programs.remove(&tdvpr) {
            for (slot, new) in ran.slots.iter_mut().zip(replaced.slots) {
                if new.is_some() {
                    *slot = new;
                }
            }
        }
        programs.insert(tdvpr, ran);
    }
}
