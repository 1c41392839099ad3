//! A guest program between two exits: the inside of a vCPU that runs programs.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use kvm_ops::guest::{Action, GuestFault, GuestProgram, MAX_ACCESS};
use kvm_ops::{Error, Exit, Gpa, Irqchip, MpState, Privacy, Result, SharedMask, VcpuId};

use crate::access::{Copy, Piece, Touch, first_piece};
use crate::irq::{self, Wake};
use crate::registers::Registers;
use crate::reported::Reported;
use crate::sev;
use crate::table::GPA_BITS;
use crate::vm::VmInner;

/// A guest program and its registers, which the handle of a vCPU and its VM share.
pub(crate) struct Core {
    pub(crate) id: VcpuId,
    pub(crate) vm: Arc<VmInner>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) program: Option<Box<dyn GuestProgram>>,
    pub(crate) state: State,
    /// The bytes that the program reads or writes, across exits.
    pub(crate) buffer: Box<[u8; MAX_ACCESS]>,
    /// The data of the last exit, in `buffer`, and the answer to it.
    pub(crate) data: Range<usize>,
    pub(crate) ret: u64,
    pub(crate) registers: Registers,
    pub(crate) irq_window: bool,
}

/// Between two calls of the program: the next outcome for it, or the action that is under way.
#[derive(Clone, Copy, Debug)]
pub(crate) enum State {
    /// Report this to the program.
    Report(Reported),
    Access(Access),
    /// A port read that left as an exit.
    PortRead {
        len: usize,
    },
    /// A hypercall that left as an exit.
    Hypercall,
    /// A conversion between private and shared memory.
    #[allow(dead_code)] // Never in a build without SEV.
    Converting(sev::Converting),
    /// The program halted.
    Halted,
    /// The program shut down, or there is none.
    Off,
}

/// A memory access, done up to `done`; `mmio` bytes from there left as an exit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    write: bool,
    gpa: Gpa,
    len: usize,
    done: usize,
    mmio: usize,
}

/// The result of a step of the vCPU.
#[allow(dead_code)] // Only the encrypted memory of a SEV guest lets a run fail.
pub(crate) enum Flow {
    /// Goes on with this state.
    Go(State),
    /// Leaves, and goes on with this state in the next run.
    Leave(State, Exit),
    /// The run fails, and the next one goes on with this state.
    Fail(State, Error),
}

impl Flow {
    pub(crate) const fn report(reported: Reported) -> Self {
        Self::Go(State::Report(reported))
    }

    pub(crate) const fn fault(fault: GuestFault) -> Self {
        Self::report(Reported::Fault(fault))
    }
}

impl Core {
    pub(crate) fn new(id: VcpuId, vm: Arc<VmInner>, wake: Arc<Wake>) -> Self {
        Self {
            id,
            vm,
            wake,
            program: None,
            state: State::Off,
            buffer: Box::new([0; MAX_ACCESS]),
            data: 0..0,
            ret: 0,
            registers: Registers::power_on(id.0 == 0),
            irq_window: false,
        }
    }

    /// Takes the embedder's answer to the last exit, and runs until the next.
    pub(crate) fn run(&mut self, data: &[u8], ret: u64) -> Result<Exit> {
        let answered = self.data.clone();
        let bytes = self.buffer[answered].iter_mut().zip(data);
        bytes.for_each(|(own, answer)| *own = *answer);
        self.ret = ret;
        self.finish();
        self.data = 0..0;
        loop {
            self.vm.require_open()?;
            if self.wake.take_kick() {
                return Ok(Exit::Interrupted);
            }
            match self.step() {
                Flow::Go(state) => self.state = state,
                Flow::Leave(state, exit) => {
                    self.state = state;
                    return Ok(exit);
                }
                Flow::Fail(state, error) => {
                    self.state = state;
                    tracing::debug!(vcpu = self.id.0, ?state, %error, "run failed");
                    return Err(error);
                }
            }
        }
    }

    /// The data of the last exit.
    pub(crate) fn exit_data(&self) -> &[u8] {
        &self.buffer[self.data.clone()]
    }

    fn step(&mut self) -> Flow {
        match self.state {
            State::Off => Flow::Leave(State::Off, Exit::Shutdown),
            // A guest program has no handlers, so an exception becomes a triple fault.
            _ if self.registers.events.exception.is_some()
                || self.registers.events.triple_fault =>
            {
                self.registers.events.exception = None;
                self.registers.events.triple_fault = false;
                Flow::Leave(State::Off, Exit::Shutdown)
            }
            _ if self.registers.mp_state != MpState::Runnable => self.wait_for_start(),
            State::Report(reported) => self.ask_program(reported),
            State::Access(access) => self.go_on_with_access(access),
            State::PortRead { .. } | State::Hypercall => {
                self.finish();
                Flow::Go(self.state)
            }
            State::Converting(now) => self.go_on_converting(now),
            State::Halted => self.halted(),
        }
    }

    /// True while the last exit waits for the embedder's answer.
    pub(crate) fn owes(&self) -> bool {
        match self.state {
            State::PortRead { .. } | State::Hypercall => true,
            State::Access(access) => access.mmio != 0,
            State::Converting(now) => now.asks(),
            State::Report(_) | State::Halted | State::Off => false,
        }
    }

    /// Takes the embedder's answer to the last exit, before anything else happens.
    fn finish(&mut self) {
        self.state = match self.state {
            State::PortRead { len } => State::Report(Reported::Data(len)),
            State::Hypercall => State::Report(Reported::Value(self.ret)),
            State::Access(access) => State::Access(Access {
                done: access.done + access.mmio,
                mmio: 0,
                ..access
            }),
            State::Converting(now) if now.asks() => match self.go_on_converting(now) {
                Flow::Go(state) | Flow::Leave(state, _) | Flow::Fail(state, _) => state,
            },
            state => state,
        };
    }

    /// Exchanges the guest of two vCPUs: its program, how far that is, and its registers.
    pub(crate) fn exchange(&mut self, other: &mut Self) {
        use std::mem::swap;
        swap(&mut self.program, &mut other.program);
        swap(&mut self.state, &mut other.state);
        swap(&mut self.buffer, &mut other.buffer);
        swap(&mut self.registers, &mut other.registers);
        swap(&mut self.irq_window, &mut other.irq_window);
    }

    /// The mask of the guest's addresses, `NONE` but for a SEV guest.
    fn mask(&self) -> SharedMask {
        match self.vm.is_sev() {
            true => self.vm.sev.mask(),
            false => SharedMask::NONE,
        }
    }

    fn ask_program(&mut self, reported: Reported) -> Flow {
        let mask = self.mask();
        let Some(program) = &mut self.program else {
            return Flow::Leave(State::Off, Exit::Shutdown);
        };
        let outcome = reported.outcome(self.id, mask, &*self.buffer);
        let access = |write, gpa, len| {
            Flow::Go(State::Access(Access {
                write,
                gpa,
                len,
                done: 0,
                mmio: 0,
            }))
        };
        let is_sev = self.vm.is_sev();
        match program.step(outcome) {
            Action::Read { gpa, len } if access_fits(mask, gpa, len) => access(false, gpa, len),
            Action::Write { gpa, data } if access_fits(mask, gpa, data.len()) => {
                let len = data.len();
                self.buffer[..len].copy_from_slice(data);
                access(true, gpa, len)
            }
            Action::In {
                port,
                size: size @ (1 | 2 | 4),
            } => {
                let len = usize::from(size);
                self.buffer[..len].fill(0);
                self.data = 0..len;
                let count = 1;
                Flow::Leave(State::PortRead { len }, Exit::IoIn { port, size, count })
            }
            Action::Out { port, data } if matches!(data.len(), 1 | 2 | 4) => {
                let (size, count) = (data.len() as u8, 1);
                self.buffer[..data.len()].copy_from_slice(data);
                self.data = 0..data.len();
                let done = State::Report(Reported::Done);
                Flow::Leave(done, Exit::IoOut { port, size, count })
            }
            Action::Read { .. } | Action::Write { .. } | Action::In { .. } | Action::Out { .. } => {
                Flow::fault(GuestFault::BadOperand)
            }
            Action::Hypercall {
                nr,
                args: [a, b, c, d],
            } => {
                let args = [a, b, c, d, 0, 0];
                Flow::Leave(State::Hypercall, Exit::Hypercall { nr, args })
            }
            Action::Share { gpa, pages } if is_sev => self.convert(gpa, pages, Privacy::Shared),
            Action::Unshare { gpa, pages } if is_sev => self.convert(gpa, pages, Privacy::Private),
            Action::Accept { gpa, level } if is_sev => self.accept(gpa, level),
            Action::GhcbMsr { value } if is_sev => self.ghcb_msr(value),
            Action::Halt => Flow::Go(State::Halted),
            Action::Shutdown => Flow::Leave(State::Off, Exit::Shutdown),
            // A normal VM has no private memory to convert or accept.
            _ => Flow::fault(GuestFault::NotOffered),
        }
    }

    fn go_on_with_access(&mut self, mut access: Access) -> Flow {
        while access.done < access.len {
            let at = Gpa::new(access.gpa.get() + access.done as u64);
            let rest = access.done..access.len;
            let copy = match access.write {
                true => Copy::ToGuest(&self.buffer[rest]),
                false => Copy::FromGuest(&mut self.buffer[rest]),
            };
            match first_touch(&self.vm, at, copy) {
                Touch::Memory(bytes) => access.done += bytes,
                Touch::Mmio(bytes) => return self.leave_as_mmio(access, at, bytes),
                Touch::Fault(fault) => return Flow::fault(fault),
                Touch::Fail(error) => return Flow::Fail(State::Access(access), error),
                Touch::Leave(access_as) => {
                    let page = without_mask(self.mask(), at).get() & !(kvm_ops::PAGE_SIZE - 1);
                    let exit = Exit::MemoryFault {
                        gpa: Gpa::new(page),
                        bytes: kvm_ops::PAGE_SIZE,
                        access: access_as,
                    };
                    return Flow::Leave(State::Access(access), exit);
                }
            }
        }
        Flow::report(match access.write {
            true => Reported::Done,
            false => Reported::Data(access.len),
        })
    }

    fn leave_as_mmio(&mut self, access: Access, at: Gpa, mmio: usize) -> Flow {
        let gpa = without_mask(self.mask(), at);
        let len = mmio as u8;
        self.data = access.done..access.done + mmio;
        let exit = match access.write {
            true => Exit::MmioWrite { gpa, len },
            false => {
                self.buffer[self.data.clone()].fill(0);
                Exit::MmioRead { gpa, len }
            }
        };
        Flow::Leave(State::Access(Access { mmio, ..access }), exit)
    }

    /// With an irqchip in the platform a halted vCPU waits here, as in KVM_RUN; without, the halt
    /// is an exit, and the vCPU goes on when it is run again with an interrupt injected.
    fn halted(&mut self) -> Flow {
        if self.vm.irqchip() != Irqchip::None {
            return match self.wake.wait(irq::State::take) {
                None => Flow::Leave(State::Halted, Exit::Interrupted),
                Some(vector) => Flow::report(Reported::Interrupt(vector)),
            };
        }
        match self.wake.take_vector() {
            Some(vector) => Flow::report(Reported::Interrupt(vector)),
            None if std::mem::take(&mut self.irq_window) => {
                Flow::Leave(State::Halted, Exit::IrqWindow)
            }
            None => Flow::Leave(State::Halted, Exit::Hlt),
        }
    }

    /// A vCPU that is not runnable waits, as in KVM_RUN: a halted one for an event, any other one
    /// until the embedder changes its state.
    fn wait_for_start(&mut self) -> Flow {
        let halted = self.registers.mp_state == MpState::Halted;
        let event = |wake: &mut irq::State| if halted { wake.any() } else { None };
        match self.wake.wait(event) {
            Some(()) => {
                self.registers.mp_state = MpState::Runnable;
                Flow::Go(self.state)
            }
            None => Flow::Leave(self.state, Exit::Interrupted),
        }
    }
}

/// Does the first piece of an access.
fn first_touch(vm: &VmInner, gpa: Gpa, mut copy: Copy<'_>) -> Touch {
    if vm.is_sev() {
        return sev::first_touch(vm, gpa, copy);
    }
    match first_piece(vm, gpa, &mut copy) {
        Piece::Memory(bytes) => Touch::Memory(bytes),
        Piece::Mmio(bytes) => Touch::Mmio(bytes),
        // A normal VM has no private frames.
        Piece::NotShared => Touch::Fault(GuestFault::Integrity(gpa)),
    }
}

/// The address without the bit that tells private from shared.
fn without_mask(mask: SharedMask, gpa: Gpa) -> Gpa {
    Gpa::new(gpa.get() & !mask.bits())
}

/// True if an access is of an allowed length and within the width of guest-physical addresses.
fn access_fits(mask: SharedMask, gpa: Gpa, len: usize) -> bool {
    (1..=MAX_ACCESS).contains(&len)
        && without_mask(mask, gpa)
            .checked_add(len as u64 - 1)
            .is_some_and(|last| last.get() >> GPA_BITS == 0)
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimVcpu")
            .field("id", &self.id)
            .field("state", &self.state)
            .field("registers", &self.registers)
            .finish_non_exhaustive()
    }
}
