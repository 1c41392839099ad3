//! TDH.VP.ENTER and what comes back.
//!
//! | file | what it does |
//! |---|---|
//! | `exits` | TD exits by reason; EPT violations |
//! | `vmcall` | TDG.VP.VMCALL by sub-function, and its registers |
//! | `mapgpa` | MapGPA: checks, chunks, answers |
//! | `answer` | what the embedder left in the last exit, for the guest |
//!
//! In each turn of the loop the vCPU passes the gate (`Td::enter`), which marks it as inside, and only
//! then looks for a kick, so that none is lost. It is out again as soon as TDH.VP.ENTER returns,
//! before the exit is handled. docs/tdx-run.md has the rules.

mod answer;
mod exits;
mod mapgpa;
mod vmcall;

use kvm_ops::{
    CpuId, Error, Exit, Gpa, Host, Irqchip, Privacy, Result, SeamPort, SeamRegs, Step, TdxRequest,
};

use crate::status::CompletionStatus;
use crate::{Leaf, TdxVcpu};
use mapgpa::Conversion;

/// The state of a vCPU between two exits.
#[derive(Debug, Default)]
pub(crate) struct Run {
    /// The host's registers of the last exit, which are those of the next entry: after a
    /// TDG.VP.VMCALL the module hands those that the guest named to it.
    regs: SeamRegs,
    pending: Pending,
    /// The data that the guest reads or writes in an exit.
    data: [u8; 8],
    /// The embedder's answers.
    ret: u64,
    error: u8,
    values: [u64; 4],
    /// The words of a system event or an internal error.
    details: [u64; 16],
}

/// The work that the last exit left for the next entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Pending {
    /// Nothing.
    #[default]
    Nothing,
    /// The guest reads so many bytes of `data`.
    Read(usize),
    /// R10 is 0 (success).
    Success,
    /// R10 is the embedder's `ret`.
    Ret,
    /// R10 is `ret`, R11 to R14 are `values`.
    RetAndValues,
    /// An MSR was read.
    MsrRead,
    /// An MSR was written.
    MsrWritten,
    /// `KVM_HC_MAP_GPA_RANGE`: the embedder's errno becomes a negative one.
    HypercallErrno,
    /// A piece of a MapGPA was handed out.
    MapGpa(Conversion),
    /// It halted.
    Halt,
    /// It shut down, for good.
    ShutDown,
}

/// The result of a turn of the loop.
enum Next {
    /// The guest goes on.
    Enter,
    Leave(Leave),
}

/// An [`Exit`] without its borrows.
#[derive(Clone, Copy)]
enum Leave {
    IoIn { port: u16, size: usize },
    IoOut { port: u16, size: usize },
    MmioRead { gpa: Gpa, size: usize },
    MmioWrite { gpa: Gpa, size: usize },
    Hlt,
    Shutdown,
    Interrupted,
    MapGpaRange { gpa: Gpa, pages: u64, to: Privacy },
    MemoryFault { gpa: Gpa, access: Privacy },
    Hypercall { nr: u64, args: [u64; 4] },
    Tdx(TdxRequest),
    ReadMsr { index: u32 },
    WriteMsr { index: u32, value: u64 },
    Fatal,
    InternalError,
}

/// `KVM_SYSTEM_EVENT_TDX_FATAL`.
const SYSTEM_EVENT_TDX_FATAL: u32 = 7;
/// `KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON`.
const INTERNAL_ERROR_UNEXPECTED_EXIT: u32 = 4;

impl<H: Host> TdxVcpu<H> {
    /// Runs the guest until something needs the embedder.
    pub(crate) fn run(&mut self) -> Result<Exit<'_>> {
        let leave = loop {
            match self.turn()? {
                Next::Enter => {}
                Next::Leave(leave) => break leave,
            }
        };
        Ok(self.run.exit(leave))
    }

    /// Finishes what is pending, enters once, and handles what comes back.
    fn turn(&mut self) -> Result<Next> {
        if let Next::Leave(leave) = self.finish()? {
            return Ok(Next::Leave(leave));
        }
        let cpu = self.target_cpu()?;
        match self.enter(cpu)? {
            Some(status) => self.handle(status, cpu),
            None => Ok(Next::Leave(Leave::Interrupted)),
        }
    }

    /// TDH.VP.ENTER. `None` where a kick came before.
    fn enter(&mut self, cpu: CpuId) -> Result<Option<CompletionStatus>> {
        let inside = self.td.enter(&self.record, cpu)?;
        if self.record.take_kick() {
            return Ok(None);
        }
        self.run.regs.rcx = self.record.tdvpr.get();
        let rax = self
            .td
            .seam()?
            .seamcall(cpu, Leaf::VpEnter.rax(), &mut self.run.regs);
        drop(inside);
        rax.map(|rax| Some(CompletionStatus::new(rax)))
    }

    /// Finishes what the last exit left.
    fn finish(&mut self) -> Result<Next> {
        match core::mem::take(&mut self.run.pending) {
            Pending::ShutDown => {
                self.run.pending = Pending::ShutDown;
                self.td.step.get().require(Step::Runnable)?;
                Ok(Next::Leave(Leave::Shutdown))
            }
            Pending::Halt => self.halted(),
            Pending::MapGpa(conversion) => Ok(self.map_gpa_answered(conversion)),
            pending => {
                self.run.answer(pending);
                Ok(Next::Enter)
            }
        }
    }

    /// With local APICs in the platform a halted vCPU waits here, as in KVM_RUN. Without, the halt
    /// was an exit, and running the vCPU again ends it.
    fn halted(&mut self) -> Result<Next> {
        while self.td.params.irqchip != Irqchip::None && !self.record.take_wake() {
            self.run.pending = Pending::Halt;
            if self.record.take_kick() {
                return Ok(Next::Leave(Leave::Interrupted));
            }
            self.td.step.get().require(Step::Runnable)?;
            self.td.seam()?.idle();
        }
        self.run.pending = Pending::Nothing;
        self.run.answer(Pending::Success);
        Ok(Next::Enter)
    }

    /// Breaks the TD for good, as `KVM_BUG_ON` does: an error of the module's or of this file's.
    fn bug(&self, error: Error) -> Error {
        self.td.poison();
        error
    }
}

impl Run {
    fn exit(&mut self, leave: Leave) -> Exit<'_> {
        match leave {
            Leave::IoIn { port, size } => Exit::IoIn {
                port,
                size: size as u8,
                data: &mut self.data[..size],
            },
            Leave::IoOut { port, size } => Exit::IoOut {
                port,
                size: size as u8,
                data: &self.data[..size],
            },
            Leave::MmioRead { gpa, size } => Exit::MmioRead {
                gpa,
                data: &mut self.data[..size],
            },
            Leave::MmioWrite { gpa, size } => Exit::MmioWrite {
                gpa,
                data: &self.data[..size],
            },
            Leave::Hlt => Exit::Hlt,
            Leave::Shutdown => Exit::Shutdown,
            Leave::Interrupted => Exit::Interrupted,
            Leave::MapGpaRange { gpa, pages, to } => Exit::MapGpaRange {
                gpa,
                pages,
                to,
                ret: &mut self.ret,
            },
            Leave::MemoryFault { gpa, access } => Exit::MemoryFault {
                gpa,
                bytes: kvm_ops::PAGE_SIZE,
                access,
            },
            Leave::Hypercall {
                nr,
                args: [a, b, c, d],
            } => Exit::Hypercall {
                nr,
                args: [a, b, c, d, 0, 0],
                ret: &mut self.ret,
            },
            Leave::Tdx(request) => Exit::Tdx {
                request,
                ret: &mut self.ret,
                values: &mut self.values,
            },
            Leave::ReadMsr { index } => Exit::ReadMsr {
                index,
                value: &mut self.values[0],
                error: &mut self.error,
            },
            Leave::WriteMsr { index, value } => Exit::WriteMsr {
                index,
                value,
                error: &mut self.error,
            },
            Leave::Fatal => Exit::SystemEvent {
                kind: SYSTEM_EVENT_TDX_FATAL,
                data: &self.details,
            },
            Leave::InternalError => Exit::InternalError {
                suberror: INTERNAL_ERROR_UNEXPECTED_EXIT,
                data: &self.details[..2],
            },
        }
    }
}
