//! The processor of a guest: TDCALL, memory and instructions that exit.

use super::exit::{from_module, to_module};
use super::fault::{Access, Exception, StopCause, Stopped};
use super::instruction::Instruction;
use super::processor::{Op, Step};
use super::td::Inner;
use super::{Exit, Fault, Hypervisor};
use crate::pieces::pieces;
use crate::sync::lock;
use kvm_ops_guest::tdx::{Regs, TdcallPort};
use soft_tdx_module::{Event, EventType, Regs as ModuleRegs, SeptState};
use std::sync::Arc;

/// Exits, exceptions or busy locks in a row at one instruction, after which nothing is expected any more.
const PATIENCE: u32 = 10_000;

/// A guest's handler of exceptions, such as #VE.
pub(super) type Handler = Box<dyn FnMut(&mut Vcpu, &Exception) -> Handled + Send>;

/// What a guest's handler of an exception did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// It returns to the instruction, which is executed again.
    Again,
    /// It did the instruction's work, and returns behind it. A read, IN or RDMSR has the first value,
    /// CPUID all four (EAX, EBX, ECX, EDX).
    Emulated([u64; 4]),
    /// It does not know what to do.
    No,
}

/// A vCPU of a [`TestTd`](super::TestTd), as the code that runs on it has it.
///
/// As a [`TdcallPort`] it is what `kvm_ops_guest` takes. Kernels with a `tdcall` of their own use
/// [`tdcall_registers`](Self::tdcall_registers) or [`tdcall`](super::tdcall).
pub struct Vcpu {
    inner: Arc<Inner>,
    index: usize,
}

impl Vcpu {
    pub(super) fn new(inner: Arc<Inner>, index: usize) -> Self {
        Self { inner, index }
    }

    pub(super) fn same(&self) -> Self {
        Self::new(Arc::clone(&self.inner), self.index)
    }

    /// Its number, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Sets the guest's handler of exceptions. It runs on the vCPU, where the exception came; an
    /// exception inside it is nobody's. Without one an exception is the result of the instruction, and
    /// interrupts are ignored.
    pub fn set_handler(
        &mut self,
        handler: impl FnMut(&mut Vcpu, &Exception) -> Handled + Send + 'static,
    ) {
        lock(&self.inner.vcpus[self.index]).handler = Some(Box::new(handler));
    }

    /// TDCALL.
    ///
    /// # Errors
    /// It did not complete: an exception came without a handler (a leaf was given a page that is not
    /// accepted), or the vCPU stopped.
    pub fn try_tdcall(&mut self, regs: &mut Regs) -> Result<(), Fault> {
        let done = self.registers(to_module(regs))?;
        *regs = from_module(&done);
        Ok(())
    }

    /// TDCALL with the sixteen general-purpose registers in encoding order: RAX, RCX, RDX, RBX, RSP, RBP,
    /// RSI, RDI, R8 to R15.
    ///
    /// # Errors
    /// As [`Vcpu::try_tdcall`].
    pub fn tdcall_registers(&mut self, registers: &mut [u64; 16]) -> Result<(), Fault> {
        *registers = self
            .registers(ModuleRegs::from_array(*registers))?
            .to_array();
        Ok(())
    }

    fn registers(&mut self, regs: ModuleRegs) -> Result<ModuleRegs, Fault> {
        self.execute(None, &mut Op::Tdcall(regs))
            .map(|done| match done {
                Done::Registers(regs) => regs,
                Done::Emulated([rax, ..]) => ModuleRegs { rax, ..regs },
            })
    }

    /// Reads memory.
    ///
    /// # Errors
    /// An exception came that no handler took, or the vCPU stopped.
    pub fn read(&mut self, gpa: u64, len: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::new();
        for (at, len) in pieces(gpa, len) {
            let start = bytes.len();
            bytes.resize(start + len, 0);
            self.read_piece(at, &mut bytes[start..])?;
        }
        Ok(bytes)
    }

    /// Reads memory into `bytes`.
    ///
    /// # Errors
    /// As [`Vcpu::read`]; `bytes` then has what was read before.
    pub fn read_into(&mut self, gpa: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let mut rest = bytes;
        for (at, len) in pieces(gpa, rest.len()) {
            let (piece, after) = rest.split_at_mut(len);
            self.read_piece(at, piece)?;
            rest = after;
        }
        Ok(())
    }

    fn read_piece(&mut self, gpa: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let access = Access {
            gpa,
            len: bytes.len(),
            is_write: false,
            data: 0,
        };
        let done = self.execute(Some(access), &mut Op::Read(access, bytes))?;
        if let Done::Emulated([value, ..]) = done {
            let value = value.to_le_bytes();
            let len = bytes.len().min(value.len());
            bytes[..len].copy_from_slice(&value[..len]);
        }
        Ok(())
    }

    /// Writes memory.
    ///
    /// # Errors
    /// As [`Vcpu::read`]; pages before the one at fault are written.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), Fault> {
        let mut rest = bytes;
        for (at, len) in pieces(gpa, bytes.len()) {
            let (piece, after) = rest.split_at(len);
            self.write_piece(at, piece)?;
            rest = after;
        }
        Ok(())
    }

    fn write_piece(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), Fault> {
        let low = bytes.iter().take(8).rev();
        let access = Access {
            gpa,
            len: bytes.len(),
            is_write: true,
            data: low.fold(0, |data, byte| data << 8 | u64::from(*byte)),
        };
        self.execute(Some(access), &mut Op::Write(access, bytes))
            .map(|_| ())
    }

    /// Executes an instruction that exits from a TD. Most raise #VE: the handler emulates them with the
    /// host's help. The values are those of [`Handled::Emulated`].
    ///
    /// # Errors
    /// As [`Vcpu::read`].
    pub fn instruction(&mut self, instruction: Instruction) -> Result<[u64; 4], Fault> {
        let Some((exit, regs)) = instruction.exit() else {
            return Err(Fault::Exception(Exception::UD));
        };
        Ok(match self.execute(None, &mut Op::Exit(exit, regs))? {
            Done::Registers(regs) => instruction.values(&regs),
            Done::Emulated(values) => values,
        })
    }

    /// Executes an instruction to its end.
    fn execute(&self, access: Option<Access>, op: &mut Op<'_>) -> Result<Done, Fault> {
        self.inner.quotes_come_in();
        let mut patience = PATIENCE;
        loop {
            let step = self.inner.step(self.index, op)?;
            let last = patience == 0;
            patience = patience.saturating_sub(1);
            match step {
                Step::Done(regs) => return Ok(Done::Registers(regs)),
                Step::Again => {}
                Step::Busy => std::thread::yield_now(),
                Step::Event(event) => match self.handle(event, access) {
                    Ok(Some(values)) => return Ok(Done::Emulated(values)),
                    Ok(None) if !last => {}
                    Ok(None) => return Err(Fault::Exception(self.exception(event, access))),
                    Err(exception) => return Err(Fault::Exception(exception)),
                },
                Step::Exit(exit) if last => {
                    return Err(self
                        .stop(access, StopCause::NoProgress(Box::new(exit)))
                        .into());
                }
                Step::Exit(exit) => self.ask_host(access, exit)?,
            }
        }
    }

    /// The host's turn.
    fn ask_host(&self, access: Option<Access>, exit: Exit) -> Result<(), Stopped> {
        self.inner.note(self.index, exit.clone());
        let hypervisor = Hypervisor {
            inner: &self.inner,
            vcpu: self.index,
        };
        let reply = (lock(&self.inner.host))(&hypervisor, &exit);
        match reply.registers() {
            Some(regs) => {
                lock(&self.inner.vcpus[self.index]).answer(regs);
                Ok(())
            }
            None => Err(self.stop(access, self.inner.why(&exit))),
        }
    }

    fn stop(&self, access: Option<Access>, cause: StopCause) -> Stopped {
        let stopped = Stopped {
            vcpu: self.index,
            access,
            cause,
        };
        lock(&self.inner.vcpus[self.index]).stopped = Some(stopped.clone());
        stopped
    }

    /// The guest's turn: values if its handler did the work, `None` if the instruction is to be executed
    /// again.
    fn handle(&self, event: Event, access: Option<Access>) -> Result<Option<[u64; 4]>, Exception> {
        let exception = self.exception(event, access);
        let processor = &self.inner.vcpus[self.index];
        let handler = lock(processor).handler.take();
        let Some(mut handler) = handler else {
            return match event.kind {
                EventType::Interrupt | EventType::Nmi => Ok(None),
                _ => Err(exception),
            };
        };
        let handled = handler(&mut self.same(), &exception);
        lock(processor).handler.get_or_insert(handler);
        match handled {
            Handled::Again => Ok(None),
            Handled::Emulated(values) => Ok(Some(values)),
            Handled::No => Err(exception),
        }
    }

    fn exception(&self, event: Event, access: Option<Access>) -> Exception {
        let state = access.map(|access| self.inner.machine.entry(access.gpa, 0).state);
        Exception {
            vector: event.vector,
            error: event.error,
            access,
            is_pending: state == Some(SeptState::Pending),
        }
    }

    /// Leaves the guest's code.
    fn unwind(&self, fault: Fault) -> ! {
        let stopped = match fault {
            Fault::Stopped(stopped) => stopped,
            Fault::Exception(exception) => {
                self.stop(None, StopCause::Unhandled(Box::new(exception)))
            }
        };
        crate::running::leave(stopped)
    }

    /// TDCALL with the registers in encoding order, for code that has no other way out.
    pub(super) fn tdcall_or_unwind(&mut self, registers: &mut [u64; 16]) {
        if let Err(fault) = self.tdcall_registers(registers) {
            self.unwind(fault);
        }
    }
}

impl TdcallPort for Vcpu {
    /// TDCALL. A vCPU that the host never enters again does not come back: the code under test is
    /// unwound, up to [`TestTd::run`](super::TestTd::run), which returns the reason; outside of it, this
    /// panics with the reason.
    fn tdcall(&mut self, regs: &mut Regs) {
        if let Err(fault) = self.try_tdcall(regs) {
            self.unwind(fault);
        }
    }
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpu")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

/// The end of an instruction.
enum Done {
    Registers(ModuleRegs),
    Emulated([u64; 4]),
}

impl Inner {
    /// Why a host stops after an exit.
    fn why(&self, exit: &Exit) -> StopCause {
        let bit = self.machine.gpaw.shared_bit();
        let is_shared = match exit {
            Exit::Violation { gpa, .. } => self.is_shared(gpa & !bit),
            _ => false,
        };
        StopCause::of(exit, bit, self.machine.ram, is_shared)
    }
}
