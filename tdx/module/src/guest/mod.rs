//! The guest's side: events of a processor inside a TD.

mod accept;
mod access;
mod exits;
pub(crate) mod extended_state;
mod l2;
mod metadata;
mod pages;
mod program;
mod registers;
mod report;
mod run;
mod servtd;
mod slots;
mod stepping;
mod tdcall;
mod virtual_apic;
mod virtual_cpu;

pub use exits::VmExit;
pub(crate) use l2::pending_entry_event;
pub use pages::GuestPage;
pub use program::{GuestOp, GuestProgram, Outcome, Script};
pub use registers::{ProcessorState, SegmentState};
pub(crate) use slots::Programs;
pub use virtual_apic::VirtualApic;

use crate::l2::guest_state as l2_state;
use crate::lock::LockMode;
use crate::meta::vcpu_initial;
use crate::pamt::PageSize;
use crate::platform::{Lp, LpError, LpState, Platform};
use crate::regs::Regs;
use crate::status::{Code, Status};
use crate::td::Td;
use crate::vcpu::{Event, LastExit, Vcpu, VcpuContext, VcpuState};
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

/// Something a running guest does that the module handles.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestEvent {
    /// TDCALL, in 64-bit mode or not.
    Tdcall {
        /// True if the processor is in 64-bit mode.
        mode_64bit: bool,
    },
    /// Any other VM exit.
    Exit(VmExit),
}

/// Result of a [`GuestEvent`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestFlow {
    /// The guest runs on.
    Resume {
        /// Its registers.
        guest: Regs,
        /// An event delivered to it.
        injected: Option<Event>,
        /// The VM that runs next: 0 is L1, 1 to 3 are its L2 VMs.
        vm: u8,
        /// True if the instruction is done; if not, the guest executes it again.
        completed: bool,
    },
    /// TD exit, which returns to TDH.VP.ENTER's caller.
    Exit {
        /// The host's registers, all of them.
        host: Regs,
    },
}

/// Result of handling an event.
enum Next {
    /// The instruction is done; RIP moves on by `length` bytes.
    Done { length: u64 },
    /// The instruction is to be repeated.
    Repeat,
    /// An event is delivered instead of the instruction's completion.
    Inject(Event),
    /// To the host.
    Leave(Box<TdExit>),
}

/// A TD exit.
#[derive(Default)]
struct TdExit {
    status: Status,
    rcx: u64,
    rdx: u64,
    r8: u64,
    r9: u64,
    /// The registers of TDG.VP.VMCALL; overrides all others.
    vmcall: Option<Regs>,
    last_exit: LastExit,
    /// A private GPA whose violation counts for zero-step filtering.
    zero_step: Option<u64>,
    /// State afterwards; `None` leaves the vCPU ACTIVE, for ever.
    state: Option<VcpuState>,
    /// The TD's memory cannot be trusted: the epoch bookkeeping in it is left as it is.
    inaccessible: bool,
}

impl TdExit {
    fn new(code: Code, reason: u16) -> Self {
        TdExit {
            status: code.detail(u32::from(reason)),
            state: Some(VcpuState::Ready),
            ..TdExit::default()
        }
    }
}

/// A processor inside a TD.
struct Guest<'p> {
    p: &'p Platform,
    this: &'p Lp,
    td: &'p Td,
    vcpu: &'p Vcpu,
    ctx: MutexGuard<'p, VcpuContext>,
    tdvpr: u64,
}

/// TDCALL's exit reason.
const REASON_TDCALL: u16 = 77;
const TDCALL_LENGTH: u64 = 4;
/// RCX of a TD exit: the VM that exited.
pub(crate) const EXIT_VM_SHIFT: u32 = 32;

impl Platform {
    /// Plays one event of the guest that runs on a processor: `gprs` are its registers at that moment,
    /// `advance` is how far RIP has moved since the last one.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_event(
        &self,
        lp: usize,
        gprs: Regs,
        event: GuestEvent,
        advance: u64,
    ) -> Result<GuestFlow, LpError> {
        let (this, mut state) = self.lp(lp)?;
        let mut guest = self.guest(lp, this, &state)?;
        self.machine.advance(self.cfg.ticks_per_guest_event);
        guest.ctx.gprs = gprs;
        guest.ctx.advance_rip(advance);
        let from_l2 = guest.ctx.vm() != 0;
        let flow = guest.event(event);
        self.observer
            .record_guest(lp, from_l2, &gprs, &event, &flow);
        if matches!(flow, GuestFlow::Exit { .. }) {
            state.running = None;
        }
        Ok(flow)
    }

    fn guest<'p>(&'p self, lp: usize, this: &'p Lp, state: &LpState) -> Result<Guest<'p>, LpError> {
        let outside = LpError::OutsideTd { lp };
        let running = state.running.ok_or(outside)?;
        let vcpu = self.vcpus.get(running.vcpu).ok_or(outside)?;
        let td = self.tds.get(running.td).ok_or(outside)?;
        Ok(Guest {
            p: self,
            this,
            td,
            vcpu,
            ctx: vcpu.context(),
            tdvpr: running.tdvpr,
        })
    }
}

impl Guest<'_> {
    /// Records the parts of an exit that L1's VMCS and zero-step filtering keep.
    fn note_l1_exit(&mut self, event: &GuestEvent) {
        self.ctx.exit = match event {
            GuestEvent::Exit(exit) => *exit,
            GuestEvent::Tdcall { .. } => VmExit {
                reason: REASON_TDCALL,
                ilen: TDCALL_LENGTH as u32,
                ..VmExit::default()
            },
        };
        // Guests without registers are taken to run in 64-bit mode unless an event says otherwise.
        let is_64_bit = *event != GuestEvent::Tdcall { mode_64bit: false };
        if !self.ctx.has_processor {
            self.ctx.set_64_bit_mode(is_64_bit);
        }
        if !self.td.is_fatal() {
            self.ctx.note_progress();
        }
    }

    fn event(&mut self, event: GuestEvent) -> GuestFlow {
        if self.ctx.vm() == 0 {
            self.note_l1_exit(&event);
        }
        let next = match event {
            _ if self.td.is_fatal() => self.fatal_exit(&event),
            _ if self.ctx.curr_vm != 0 => self.l2_event(&event),
            GuestEvent::Tdcall { mode_64bit: false } => Next::Inject(Event::GP),
            GuestEvent::Tdcall { mode_64bit: true } => self.tdcall(),
            GuestEvent::Exit(exit) => self.vm_exit(&exit),
        };
        match next {
            Next::Done { length } => {
                if length != 0 {
                    self.ctx.step_over(length);
                }
                self.resume(None, true)
            }
            Next::Repeat => self.resume(None, false),
            Next::Inject(event) => {
                self.ctx.note_injection(event);
                self.resume(Some(event), false)
            }
            Next::Leave(exit) => GuestFlow::Exit {
                host: self.leave(*exit),
            },
        }
    }

    fn resume(&self, injected: Option<Event>, completed: bool) -> GuestFlow {
        GuestFlow::Resume {
            guest: self.ctx.gprs,
            injected,
            vm: self.ctx.curr_vm,
            completed,
        }
    }

    /// Every exit of a TD that is already lost.
    fn fatal_exit(&self, event: &GuestEvent) -> Next {
        let (reason, rcx, r9) = match event {
            GuestEvent::Tdcall { .. } => (REASON_TDCALL, 0, 0),
            GuestEvent::Exit(e) => (e.reason, e.qualification, e.info),
        };
        let exit = TdExit::new(Code::NON_RECOVERABLE_TD_NON_ACCESSIBLE, reason);
        Next::Leave(Box::new(TdExit {
            rcx,
            r9,
            state: None,
            inaccessible: true,
            ..exit
        }))
    }

    /// Leaves the TD: bookkeeping, locks, and the registers the host sees.
    fn leave(&mut self, exit: TdExit) -> Regs {
        if !self.ctx.has_run {
            self.ctx.has_run = true;
            vcpu_initial::note_first_run(self.td, &mut self.ctx.store);
        }
        if let Some(gpa) = exit.zero_step {
            self.ctx.note_zero_step(gpa);
        }
        self.ctx.tsc_at_exit = self.p.machine.tsc();
        self.ctx.last_exit = exit.last_exit;
        self.ctx.last_td_exit = exit.last_exit.number();
        let vm = self.ctx.vm();
        if vm != 0 && exit.vmcall.is_none() && !exit.inaccessible {
            // L1 finds the VM's registers where it finds them after an exit to itself.
            let stored = l2_state::store(self.p, self.td, &self.ctx, vm);
            self.td.fatal.fetch_or(stored.is_err(), Ordering::AcqRel);
        }
        if !exit.inaccessible {
            let epoch = self.vcpu.epoch.load(Ordering::Acquire);
            self.td.refcount[(epoch & 1) as usize].fetch_sub(1, Ordering::AcqRel);
        }
        if let Some(state) = exit.state {
            self.vcpu.set_state(state);
        }
        self.p.in_td.fetch_sub(1, Ordering::AcqRel);
        self.this.kicked.store(false, Ordering::Release);
        if let Some(pamt) = self.p.pamt.get() {
            if let Some(tdr) = pamt.entry(self.td.pa(), PageSize::Size4K) {
                tdr.lock.unlock(LockMode::Shared);
            }
            pamt.unlock_shared_walk(self.tdvpr);
        }
        let mut host = exit.vmcall.unwrap_or(Regs {
            rax: exit.status.0,
            rcx: exit.rcx,
            rdx: exit.rdx,
            r8: exit.r8,
            r9: exit.r9,
            ..Regs::default()
        });
        host.rcx = host.rcx & !(3 << EXIT_VM_SHIFT) | (vm as u64) << EXIT_VM_SHIFT;
        host
    }

    /// Delivers #VE, or #DF if the guest has not fetched the last one's information yet.
    fn inject_ve(&mut self, info: crate::vcpu::VeInfo) -> Next {
        if self.ctx.ve_info.is_some() {
            return Next::Inject(Event::DF);
        }
        self.ctx.set_ve_info(info);
        Next::Inject(Event::VE)
    }
}
