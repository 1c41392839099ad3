//! A vCPU: a guest program between two exits.

use std::fmt;
use std::sync::Arc;

use kvm_ops::control::{cr0_is_valid, cr4_is_valid, exception_vector};
use kvm_ops::guest::{Action, GuestFault, GuestProgram, MAX_ACCESS, Outcome};
use kvm_ops::{
    CpuidEntry, DescTable, Error, Exception, Exit, Field, Gpa, Irqchip, Kick, Regs, Result,
    Segment, SegmentName, SharedMask, VcpuId, VcpuOps,
};

use crate::access::{Copy, Piece, first_piece};
use crate::irq::{Wake, Woken};
use crate::registers::Registers;
#[cfg(feature = "sev")]
use crate::sev::Touch;
use crate::table::GPA_BITS;
use crate::vm::VmInner;

/// A vCPU of the software platform.
pub struct SimVcpu {
    id: VcpuId,
    pub(crate) vm: Arc<VmInner>,
    wake: Arc<Wake>,
    program: Option<Box<dyn GuestProgram>>,
    state: State,
    /// What the program reads or writes, across exits.
    buffer: Box<[u8; MAX_ACCESS]>,
    /// The answer to a hypercall.
    pub(crate) ret: u64,
    registers: Registers,
    irq_window: bool,
}

/// Between two calls of the program: what it is told next, or what is still under way.
#[derive(Clone, Copy, Debug)]
pub(crate) enum State {
    /// Tell the program this.
    Tell(Told),
    /// A memory access, done up to `done`; `mmio` bytes from there left as an exit.
    Access {
        write: bool,
        gpa: Gpa,
        len: usize,
        done: usize,
        mmio: usize,
    },
    /// A port read that left as an exit.
    PortRead { len: usize },
    /// A hypercall that left as an exit.
    Hypercall,
    /// A conversion between private and shared memory.
    #[cfg(feature = "sev")]
    Converting(crate::sev::Converting),
    /// The program halted.
    Halted,
    /// The program shut down, or there is none.
    Off,
}

/// An [`Outcome`] without a borrow.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Told {
    Start,
    Done,
    Data(usize),
    Value(u64),
    Fault(GuestFault),
    Interrupt(u8),
}

/// What a step of the vCPU asks of `vcpu_run`.
pub(crate) enum Next {
    /// Goes on with this state.
    Go(State),
    /// Leaves, and goes on with this state next time.
    Leave(State, Leave),
    /// The run fails, and goes on with this state next time.
    #[cfg(feature = "sev")]
    Fail(State, Error),
}

pub(crate) enum Leave {
    PortRead {
        port: u16,
        size: u8,
    },
    PortWrite {
        port: u16,
        len: usize,
    },
    MmioRead {
        gpa: Gpa,
        from: usize,
        len: usize,
    },
    MmioWrite {
        gpa: Gpa,
        from: usize,
        len: usize,
    },
    Hypercall {
        nr: u64,
        args: [u64; 4],
    },
    #[cfg(feature = "sev")]
    MapGpaRange {
        gpa: Gpa,
        pages: u64,
        to: kvm_ops::Privacy,
    },
    /// Of one page.
    #[cfg(feature = "sev")]
    MemoryFault {
        gpa: Gpa,
        access: kvm_ops::Privacy,
    },
    /// The guest terminates itself; the GHCB MSR is in `ret`.
    #[cfg(feature = "sev")]
    SevTerm,
    Hlt,
    Shutdown,
    Interrupted,
    IrqWindow,
}

/// `KVM_SYSTEM_EVENT_SEV_TERM`.
#[cfg(feature = "sev")]
const SEV_TERM: u32 = 6;

impl SimVcpu {
    pub(crate) fn new(id: VcpuId, vm: Arc<VmInner>, wake: Arc<Wake>) -> Self {
        Self {
            id,
            vm,
            wake,
            program: None,
            state: State::Off,
            buffer: Box::new([0; MAX_ACCESS]),
            ret: 0,
            registers: Registers::power_on(),
            irq_window: false,
        }
    }

    fn step(&mut self) -> Next {
        match self.state {
            State::Tell(told) => self.ask_program(told),
            State::Access {
                write,
                gpa,
                len,
                done,
                mmio,
            } => self.go_on_with_access(write, gpa, len, done + mmio),
            State::PortRead { len } => Next::Go(State::Tell(Told::Data(len))),
            State::Hypercall => Next::Go(State::Tell(Told::Value(self.ret))),
            #[cfg(feature = "sev")]
            State::Converting(now) => self.go_on_converting(now),
            State::Halted => self.halted(),
            State::Off => Next::Leave(State::Off, Leave::Shutdown),
        }
    }

    /// The mask of the guest's addresses, `NONE` but for a SEV guest.
    fn mask(&self) -> SharedMask {
        #[cfg(feature = "sev")]
        if self.vm.is_sev() {
            return self.vm.sev.mask();
        }
        SharedMask::NONE
    }

    fn ask_program(&mut self, told: Told) -> Next {
        let mask = self.mask();
        let Some(program) = &mut self.program else {
            return Next::Leave(State::Off, Leave::Shutdown);
        };
        let outcome = match told {
            Told::Start => Outcome::Start {
                vcpu: self.id,
                mask,
            },
            Told::Done => Outcome::Done,
            Told::Data(len) => Outcome::Data(&self.buffer[..len]),
            Told::Value(value) => Outcome::Value(value),
            Told::Fault(fault) => Outcome::Fault(fault),
            Told::Interrupt(vector) => Outcome::Interrupt(vector),
        };
        let fault = |fault| Next::Go(State::Tell(Told::Fault(fault)));
        match program.step(outcome) {
            Action::Read { gpa, len } => match access_fits(mask, gpa, len) {
                true => Next::Go(State::Access {
                    write: false,
                    gpa,
                    len,
                    done: 0,
                    mmio: 0,
                }),
                false => fault(GuestFault::BadOperand),
            },
            Action::Write { gpa, data } => match access_fits(mask, gpa, data.len()) {
                true => {
                    let len = data.len();
                    self.buffer[..len].copy_from_slice(data);
                    Next::Go(State::Access {
                        write: true,
                        gpa,
                        len,
                        done: 0,
                        mmio: 0,
                    })
                }
                false => fault(GuestFault::BadOperand),
            },
            Action::In {
                port,
                size: size @ (1 | 2 | 4),
            } => {
                let len = usize::from(size);
                self.buffer[..len].fill(0);
                Next::Leave(State::PortRead { len }, Leave::PortRead { port, size })
            }
            Action::Out { port, data } if matches!(data.len(), 1 | 2 | 4) => {
                let len = data.len();
                self.buffer[..len].copy_from_slice(data);
                Next::Leave(State::Tell(Told::Done), Leave::PortWrite { port, len })
            }
            Action::In { .. } | Action::Out { .. } => fault(GuestFault::BadOperand),
            Action::Hypercall { nr, args } => {
                self.ret = 0;
                Next::Leave(State::Hypercall, Leave::Hypercall { nr, args })
            }
            #[cfg(feature = "sev")]
            Action::Share { gpa, pages } if self.vm.is_sev() => {
                self.convert(gpa, pages, kvm_ops::Privacy::Shared)
            }
            #[cfg(feature = "sev")]
            Action::Unshare { gpa, pages } if self.vm.is_sev() => {
                self.convert(gpa, pages, kvm_ops::Privacy::Private)
            }
            #[cfg(feature = "sev")]
            Action::Accept { gpa, level } if self.vm.is_sev() => self.accept(gpa, level),
            #[cfg(feature = "sev")]
            Action::GhcbMsr { value } if self.vm.is_sev() => self.ghcb_msr(value),
            Action::Halt => Next::Go(State::Halted),
            Action::Shutdown => Next::Leave(State::Off, Leave::Shutdown),
            // A normal VM has no private memory to convert or accept.
            _ => fault(GuestFault::NotOffered),
        }
    }

    fn go_on_with_access(&mut self, write: bool, gpa: Gpa, len: usize, mut done: usize) -> Next {
        let mask = self.mask();
        while done < len {
            let at = Gpa::new(gpa.get() + done as u64);
            let piece = match write {
                true => Copy::ToGuest(&self.buffer[done..len]),
                false => Copy::FromGuest(&mut self.buffer[done..len]),
            };
            #[cfg(feature = "sev")]
            let piece = match self.vm.is_sev() {
                false => first_piece(&self.vm, at, piece),
                true => {
                    let state = State::Access {
                        write,
                        gpa,
                        len,
                        done,
                        mmio: 0,
                    };
                    match crate::sev::first_touch(&self.vm, at, piece) {
                        Touch::Memory(bytes) => Piece::Memory(bytes),
                        Touch::Mmio(bytes) => Piece::Mmio(bytes),
                        Touch::Fault(fault) => return Next::Go(State::Tell(Told::Fault(fault))),
                        Touch::Fail(error) => return Next::Fail(state, error),
                        Touch::Leave(access) => {
                            let gpa = page_of(mask, at);
                            return Next::Leave(state, Leave::MemoryFault { gpa, access });
                        }
                    }
                }
            };
            #[cfg(not(feature = "sev"))]
            let piece = first_piece(&self.vm, at, piece);
            let at = without_mask(mask, at);
            match piece {
                Piece::Memory(bytes) => done += bytes,
                // A normal VM has no private frames.
                Piece::NotShared => {
                    let fault = GuestFault::Integrity(at);
                    return Next::Go(State::Tell(Told::Fault(fault)));
                }
                Piece::Mmio(mmio) => {
                    let state = State::Access {
                        write,
                        gpa,
                        len,
                        done,
                        mmio,
                    };
                    let leave = match write {
                        true => Leave::MmioWrite {
                            gpa: at,
                            from: done,
                            len: mmio,
                        },
                        false => {
                            self.buffer[done..done + mmio].fill(0);
                            Leave::MmioRead {
                                gpa: at,
                                from: done,
                                len: mmio,
                            }
                        }
                    };
                    return Next::Leave(state, leave);
                }
            }
        }
        Next::Go(State::Tell(if write {
            Told::Done
        } else {
            Told::Data(len)
        }))
    }

    /// With an irqchip in the platform a halted vCPU waits here, as in KVM_RUN; without, the halt
    /// is an exit, and the vCPU goes on when it is run again with an interrupt injected.
    fn halted(&mut self) -> Next {
        if self.vm.irqchip() != Irqchip::None {
            return match self.wake.wait() {
                Woken::Kicked => Next::Leave(State::Halted, Leave::Interrupted),
                Woken::Interrupt(vector) => Next::Go(State::Tell(Told::Interrupt(vector))),
            };
        }
        match self.wake.take_vector() {
            Some(vector) => Next::Go(State::Tell(Told::Interrupt(vector))),
            None if std::mem::take(&mut self.irq_window) => {
                Next::Leave(State::Halted, Leave::IrqWindow)
            }
            None => Next::Leave(State::Halted, Leave::Hlt),
        }
    }

    fn exit(&mut self, leave: Leave) -> Exit<'_> {
        match leave {
            Leave::PortRead { port, size } => Exit::IoIn {
                port,
                size,
                data: &mut self.buffer[..usize::from(size)],
            },
            Leave::PortWrite { port, len } => Exit::IoOut {
                port,
                size: len as u8,
                data: &self.buffer[..len],
            },
            Leave::MmioRead { gpa, from, len } => Exit::MmioRead {
                gpa,
                data: &mut self.buffer[from..from + len],
            },
            Leave::MmioWrite { gpa, from, len } => Exit::MmioWrite {
                gpa,
                data: &self.buffer[from..from + len],
            },
            Leave::Hypercall {
                nr,
                args: [a, b, c, d],
            } => Exit::Hypercall {
                nr,
                args: [a, b, c, d, 0, 0],
                ret: &mut self.ret,
            },
            #[cfg(feature = "sev")]
            Leave::MapGpaRange { gpa, pages, to } => Exit::MapGpaRange {
                gpa,
                pages,
                to,
                ret: &mut self.ret,
            },
            #[cfg(feature = "sev")]
            Leave::MemoryFault { gpa, access } => Exit::MemoryFault {
                gpa,
                bytes: kvm_ops::PAGE_SIZE,
                access,
            },
            #[cfg(feature = "sev")]
            Leave::SevTerm => Exit::SystemEvent {
                kind: SEV_TERM,
                data: std::slice::from_ref(&self.ret),
            },
            Leave::Hlt => Exit::Hlt,
            Leave::Shutdown => Exit::Shutdown,
            Leave::Interrupted => Exit::Interrupted,
            Leave::IrqWindow => Exit::IrqWindow,
        }
    }
}

/// The address without the bit that tells private from shared.
fn without_mask(mask: SharedMask, gpa: Gpa) -> Gpa {
    Gpa::new(gpa.get() & !mask.bits())
}

/// The page of an address, without the mask bit.
#[cfg(feature = "sev")]
fn page_of(mask: SharedMask, gpa: Gpa) -> Gpa {
    Gpa::new(without_mask(mask, gpa).get() & !(kvm_ops::PAGE_SIZE - 1))
}

/// Whether an access is of an allowed length and within the width of guest-physical addresses.
fn access_fits(mask: SharedMask, gpa: Gpa, len: usize) -> bool {
    (1..=MAX_ACCESS).contains(&len)
        && without_mask(mask, gpa)
            .checked_add(len as u64 - 1)
            .is_some_and(|last| last.get() >> GPA_BITS == 0)
}

impl VcpuOps for SimVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }

    fn vcpu_run(&mut self) -> Result<Exit<'_>> {
        loop {
            self.vm.require_open()?;
            if self.wake.take_kick() {
                return Ok(Exit::Interrupted);
            }
            match self.step() {
                Next::Go(state) => self.state = state,
                Next::Leave(state, leave) => {
                    self.state = state;
                    return Ok(self.exit(leave));
                }
                #[cfg(feature = "sev")]
                Next::Fail(state, error) => {
                    self.state = state;
                    return Err(error);
                }
            }
        }
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.wake) as Arc<dyn Kick>
    }

    /// Power-on drops the program's progress with the registers; INIT keeps MSRs. In both cases
    /// the program has no way to start over, so it is gone: load it again.
    fn vcpu_reset(&mut self, init_event: bool) -> Result<()> {
        if init_event {
            self.registers.init();
        } else {
            self.registers = Registers::power_on();
        }
        self.program = None;
        self.state = State::Off;
        self.wake.cancel();
        Ok(())
    }

    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }

    fn load_program(&mut self, program: Box<dyn GuestProgram>) -> Result<()> {
        self.program = Some(program);
        self.state = State::Tell(Told::Start);
        Ok(())
    }

    fn get_regs(&self) -> Result<Regs> {
        Ok(self.registers.regs)
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        self.registers.regs = *regs;
        Ok(())
    }

    /// Accepted: a guest program does not execute CPUID.
    fn set_cpuid(&mut self, _: &[CpuidEntry]) -> Result<()> {
        Ok(())
    }

    fn get_msr(&self, index: u32) -> Result<u64> {
        self.registers.msr(index)
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        self.registers.set_msr(index, value)
    }

    fn set_efer(&mut self, value: u64) -> Result<()> {
        self.registers.set_efer(value)
    }

    fn get_segment(&self, segment: SegmentName) -> Result<Segment> {
        Ok(self.registers.segment(segment))
    }

    fn set_segment(&mut self, segment: SegmentName, value: &Segment) -> Result<()> {
        self.registers.set_segment(segment, *value);
        Ok(())
    }

    /// Checked; a guest program has no paging that it could change.
    fn set_cr0(&mut self, value: u64) -> Result<()> {
        if cr0_is_valid(value) {
            Ok(())
        } else {
            Err(Error::Invalid(Field::Cr0, value))
        }
    }

    /// Checked; a guest program has no paging that it could change.
    fn set_cr4(&mut self, value: u64) -> Result<()> {
        if cr4_is_valid(value) {
            Ok(())
        } else {
            Err(Error::Invalid(Field::Cr4, value))
        }
    }

    fn get_idt(&self) -> Result<DescTable> {
        Ok(self.registers.idt)
    }

    fn set_idt(&mut self, table: DescTable) -> Result<()> {
        self.registers.idt = table;
        Ok(())
    }

    fn get_gdt(&self) -> Result<DescTable> {
        Ok(self.registers.gdt)
    }

    fn set_gdt(&mut self, table: DescTable) -> Result<()> {
        self.registers.gdt = table;
        Ok(())
    }

    fn set_dr7(&mut self, value: u64) -> Result<()> {
        self.registers.dr7 = value;
        Ok(())
    }

    fn inject_irq(&mut self, vector: u8) -> Result<()> {
        if self.vm.irqchip() != Irqchip::None {
            return kvm_ops::unsupported!("inject_irq with an irqchip in the platform");
        }
        if self.wake.has_pending() {
            return Err(Error::Exists(Field::Vector, vector.into()));
        }
        self.wake.post(vector);
        Ok(())
    }

    /// An NMI ends a halt as vector 2 does.
    fn inject_nmi(&mut self) -> Result<()> {
        self.wake.post(2);
        Ok(())
    }

    /// Checked and dropped: a guest program has no exception handlers.
    fn inject_exception(&mut self, exception: Exception) -> Result<()> {
        exception_vector(exception.vector).map(drop)
    }

    fn cancel_injection(&mut self) -> Result<()> {
        self.wake.cancel();
        Ok(())
    }

    fn interrupt_allowed(&self) -> Result<bool> {
        Ok(matches!(self.state, State::Halted))
    }

    fn get_nmi_mask(&self) -> Result<bool> {
        Ok(self.registers.nmi_masked)
    }

    fn set_nmi_mask(&mut self, masked: bool) -> Result<()> {
        self.registers.nmi_masked = masked;
        Ok(())
    }

    fn enable_irq_window(&mut self) -> Result<()> {
        self.irq_window = true;
        Ok(())
    }

    fn get_interrupt_shadow(&self) -> Result<u32> {
        Ok(self.registers.interrupt_shadow)
    }

    fn set_interrupt_shadow(&mut self, shadow: u32) -> Result<()> {
        self.registers.interrupt_shadow = shadow;
        Ok(())
    }
}

impl fmt::Debug for SimVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimVcpu")
            .field("id", &self.id)
            .field("state", &self.state)
            .field("registers", &self.registers)
            .finish_non_exhaustive()
    }
}
