//! TDH.VP.ENTER and what comes back.
//!
//! | file | what it does |
//! |---|---|
//! | `exits` | TD exits by reason; EPT violations |
//! | `vmcall` | TDG.VP.VMCALL by sub-function, and its registers |
//! | `mapgpa` | MapGPA: checks, chunks, answers |
//! | `answer` | the embedder's answer to the last exit |
//! | `exit_state` | what is owed to the guest, for a TD that goes on at another host |
//!
//! In each turn of the loop the vCPU passes the gate (`Td::enter`), which marks it as inside, and only
//! then looks for a kick, so that none is lost. It is out again as soon as TDH.VP.ENTER returns,
//! before the exit is handled. docs/tdx-run.md has the rules.

mod answer;
mod exit_state;
mod exits;
mod mapgpa;
mod vmcall;

use alloc::vec::Vec;

use kvm_ops::{
    Answer, CpuId, Diagnosis, Error, Exit, ExitKind, Gpa, Host, Irqchip, PAGE_SIZE, Result,
    SeamPort, SeamRegs, Step, VcpuOps,
};

use crate::status::CompletionStatus;
use crate::td::Td;
use crate::vcpu::{Resume, Tried};
use crate::{Leaf, TdxVcpu, trace};
pub use exit_state::ExitState;
use mapgpa::Conversion;

/// The state of a vCPU between two exits.
#[derive(Debug, Default)]
pub(crate) struct Run {
    /// The host's registers of the last exit, which are those of the next entry: after a
    /// TDG.VP.VMCALL the module hands the registers that the guest named to it.
    regs: SeamRegs,
    pending: Pending,
    /// The last exit, and the embedder's answer to it.
    exit: Option<ExitKind>,
    answer: Option<Answer>,
    /// The data of the last exit.
    data: Vec<u8>,
}

/// The work that the last exit left for the next entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Pending {
    /// Nothing.
    #[default]
    Nothing,
    /// The guest reads the data.
    Read,
    /// R10 is 0 (success).
    Success,
    /// A KVM hypercall: R10 is the embedder's value.
    Hypercall,
    /// `KVM_HC_MAP_GPA_RANGE`.
    MapGpaHypercall,
    /// R10 is the embedder's status, or `default`; with `values`, R11 to R14 are the embedder's.
    Request { default: u64, values: bool },
    /// An MSR is read.
    MsrRead,
    /// An MSR is written.
    MsrWrite,
    /// A piece of a MapGPA was handed out.
    MapGpa(Conversion),
    /// The guest halted.
    Halt,
    /// The guest shut down, for good.
    ShutDown,
}

impl Pending {
    /// True for an exit that the embedder answers.
    pub(crate) const fn waits_for_answer(self) -> bool {
        match self {
            Self::Nothing | Self::Success | Self::Halt | Self::ShutDown => false,
            Self::Read
            | Self::Hypercall
            | Self::MapGpaHypercall
            | Self::Request { .. }
            | Self::MsrRead
            | Self::MsrWrite
            | Self::MapGpa(_) => true,
        }
    }
}

/// `KVM_SYSTEM_EVENT_TDX_FATAL`.
const SYSTEM_EVENT_TDX_FATAL: u32 = 7;
/// `KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON`.
const INTERNAL_ERROR_UNEXPECTED_EXIT: u32 = 4;

impl<H: Host> TdxVcpu<H> {
    /// Runs the guest until something needs the embedder.
    pub(crate) fn run(&mut self) -> Result<Exit> {
        self.sit()?;
        let ended = self.run_to_exit();
        self.stand();
        ended
    }

    /// Takes the vCPU, with the registers of its next entry, from its place.
    fn sit(&mut self) -> Result<()> {
        loop {
            match self.record.seat.sit(|| self.td.relax()) {
                Tried::Done(resume) => {
                    self.run.regs = resume.regs;
                    self.run.pending = resume.pending;
                    return Ok(());
                }
                Tried::Wait => {
                    // The vCPU may be on its way to another VM.
                    self.td.life.require(Step::Runnable)?;
                    self.td.relax();
                }
                Tried::No => return Err(Error::Poisoned),
            }
        }
    }

    /// Puts them back.
    fn stand(&self) {
        let resume = Resume {
            regs: self.run.regs,
            pending: self.run.pending,
        };
        self.record.seat.stand(|| self.td.relax(), resume);
    }

    /// Lets a turn pass, with the vCPU out of its handle's hands: it may move meanwhile.
    fn stand_aside(&mut self, wait: impl FnOnce(&Td<H>)) -> Result<()> {
        self.stand();
        wait(&self.td);
        self.sit()
    }

    fn run_to_exit(&mut self) -> Result<Exit> {
        loop {
            match self.turn() {
                Ok(None) => {}
                Ok(Some(exit)) => {
                    self.run.exit = Some(exit.kind());
                    self.run.answer = None;
                    return Ok(exit);
                }
                Err(error) => {
                    self.td.life.note_vcpu(error, self.record.id);
                    return Err(error);
                }
            }
        }
    }

    /// Finishes the pending work, enters once, and handles the exit. `None` to go on.
    fn turn(&mut self) -> Result<Option<Exit>> {
        if let Some(exit) = self.finish()? {
            return Ok(Some(exit));
        }
        self.take_nmi()?;
        let cpu = self.target_cpu()?;
        match self.enter(cpu)? {
            Some(status) => self.handle(status, cpu),
            None => Ok(Some(Exit::Interrupted)),
        }
    }

    /// TDH.VP.ENTER. `None` if a kick came before.
    #[allow(unsafe_code)]
    fn enter(&mut self, cpu: CpuId) -> Result<Option<CompletionStatus>> {
        let inside = loop {
            if let Some(inside) = self.td.enter(&self.record, cpu)? {
                break inside;
            }
            self.stand_aside(Td::relax)?;
        };
        if self.take_interruption() {
            return Ok(None);
        }
        self.run.regs.rcx = self.record.tdvpr.get();
        let seam = self.td.seam()?;
        // SAFETY: the only page among the operands is the TDVPR, which the TD's record owns. The gate
        // that `inside` holds keeps the teardown from taking it.
        let rax = unsafe { seam.seamcall(cpu, Leaf::VpEnter.rax(), &mut self.run.regs) };
        drop(inside);
        let status = CompletionStatus::new(rax?);
        trace::entry(cpu, &self.run.regs, self.record.tdvpr.get(), status);
        Ok(Some(status))
    }

    /// Finishes the work that the last exit left. Its data is gone then.
    fn finish(&mut self) -> Result<Option<Exit>> {
        let pending = core::mem::take(&mut self.run.pending);
        self.run.finish(pending);
        self.run.data.clear();
        match pending {
            Pending::ShutDown => {
                self.run.pending = pending;
                self.td.life.require(Step::Runnable)?;
                Ok(Some(Exit::Shutdown))
            }
            Pending::Halt => self.halted(),
            Pending::MapGpa(conversion) => Ok(self.map_gpa_answered(conversion)),
            _ => Ok(None),
        }
    }

    /// With local APICs in the platform a halted vCPU waits here, as in KVM_RUN. Without, the halt
    /// was an exit, and running the vCPU again ends it. R12 says that the guest takes no interrupts
    /// (GHCI, "TDG.VP.VMCALL<Instruction.HLT>").
    fn halted(&mut self) -> Result<Option<Exit>> {
        let (id, interrupts) = (self.record.id, self.run.regs.r12 == 0);
        while self.td.params.irqchip != Irqchip::None && !self.record.take_wake() {
            self.run.pending = Pending::Halt;
            if self.take_interruption() {
                return Ok(Some(Exit::Interrupted));
            }
            self.td.life.require(Step::Runnable)?;
            let mut woken = false;
            self.stand_aside(|td| woken = td.wait_for_event(id, interrupts))?;
            if woken {
                break;
            }
        }
        self.run.pending = Pending::Nothing;
        self.run.finish(Pending::Success);
        Ok(None)
    }

    /// Leaves an NMI that came by the local APIC with the module.
    fn take_nmi(&mut self) -> Result<()> {
        let id = self.record.id;
        match self.td.params.irqchip != Irqchip::None && self.td.takes_nmi(id) {
            true => self.inject_nmi(),
            false => Ok(()),
        }
    }

    /// Breaks the TD for good, as `KVM_BUG_ON` does, and reports the event. `advice` is for the author
    /// of the guest: the host can only destroy the TD.
    #[cold]
    fn bug(&self, error: Error, gpa: Gpa, cause: &'static str, advice: &'static str) -> Error {
        let (gfn, access) = self.td.mask.split(gpa);
        let gpa = Gpa::new(gfn.get() * PAGE_SIZE);
        let (vm, vcpu) = (self.td.life.id().0, self.record.id.0);
        tracing::error!(
            technology = "tdx", vm, vcpu, %gpa, %access, %error,
            "{cause}; {advice}"
        );
        let diagnosis = self.explain(error).at(gpa, access);
        self.td.poison_by(diagnosis.because(cause).advise(advice));
        error
    }

    /// A failure of this vCPU with that error.
    fn explain(&self, error: Error) -> Diagnosis {
        let life = &self.td.life;
        let diagnosis = Diagnosis::of(life.tech(), life.id(), error).on_vcpu(self.record.id);
        match error {
            Error::Firmware(word) => {
                diagnosis.called(CompletionStatus::new(word).answer_of(Leaf::VpEnter))
            }
            _ => diagnosis,
        }
    }
}

impl Run {
    /// The data of the last exit.
    pub(crate) fn data(&mut self) -> &mut [u8] {
        &mut self.data
    }

    /// Leaves with data; `pending` finishes the exit.
    fn leave_with(&mut self, pending: Pending, data: &[u8], exit: Exit) -> Option<Exit> {
        self.data.extend_from_slice(data);
        self.leave(pending, exit)
    }

    /// Leaves; `pending` finishes the exit.
    fn leave(&mut self, pending: Pending, exit: Exit) -> Option<Exit> {
        self.pending = pending;
        Some(exit)
    }
}
